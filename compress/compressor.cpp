#include "compress/compressor.h"

#include <algorithm>
#include <set>

#include "compress/adapter.h"
#include "compress/streamed_tensors.h"
#include "compress/text.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "runtime/version.h"

namespace lightmoe {
namespace {

// Everything that is known before the first byte is written.
class Compression {
 public:
  explicit Compression(const CompressJob& job);

  CompressionRecord record;
  int64_t peak_bytes = 0;
  OlmoeConfig output_config() const;
  const StreamedTensors& tensors() const { return tensors_; }

 private:
  void choose();
  void list_tensors();
  void add_expert(const ParameterInfo& info, size_t layer, size_t entry, ExpertMatrix matrix);
  void add_adapter(const ParameterInfo& info, size_t layer, size_t adapter, ExpertMatrix matrix, bool b);
  AdapterFactors factors(size_t layer, size_t adapter, ExpertMatrix matrix) const;
  std::vector<WeightedMatrix> sources(size_t layer, size_t entry, ExpertMatrix matrix) const;
  void account();
  void estimate_peak();

  const CompressJob& job_;
  Checkpoint input_;
  OlmoeConfig config_;
  ExpertSource experts_;
  Statistics statistics_;  // computed tensors may read it
  StreamedTensors tensors_;
  // A and B of one matrix are written one after the other: the last pair is kept.
  mutable std::string last_site_;
  mutable AdapterFactors last_factors_;
};

Compression::Compression(const CompressJob& job)
    : job_(job),
      input_(job.model),
      config_(read_config(job.model)),
      experts_(input_, config_),
      tensors_(job.dtype, job.allow_nonfinite) {
  check(config_.lightmoe_json.empty(), ErrorKind::kInput,
        "{}: is compressed already (config.json has a \"lightmoe\" object); compress the original", job.model.string());
  choose();
  list_tensors();
  account();
}

// Statistics, then the method's plan.
void Compression::choose() {
  const Method& method = find_method(job_.method);
  check_options(method, job_.options);
  const ModelSize size = model_size(config_);
  record = {.version = version(), .method = method.name, .options = job_.options, .model = model_fingerprint(input_)};
  record.budget = method.compresses ? describe(job_.options.budget) : "none";
  statistics_ = uniform_statistics(size.layers, size.slots, config_.hidden_size);
  record.statistics = "uniform";
  if (method.compresses && !job_.statistics.empty()) {
    statistics_ = load_statistics(job_.statistics);
    check_statistics(statistics_, record.model, size.layers, size.slots, config_.hidden_size, job_.statistics.string());
    record.statistics = hash_file(job_.statistics);
  } else if (method.needs != Needs::kNothing && job_.say) {
    job_.say("no statistics given: every expert counts the same (lightmoe calibrate measures them)");
  }
  check_needs(method, job_.options, statistics_);
  const DType source = experts_.place(0, 0, ExpertMatrix::kGate).dtype;
  const MethodInput input{.config = config_,
                          .statistics = statistics_,
                          .options = job_.options,
                          .bytes_per_parameter = static_cast<double>(size_of(tensors_.output_dtype(source))),
                          .experts = &experts_};
  record.plan = method.plan(input);
  record.rank = recovery_rank(method, input, record.plan);
  record.factors = trained_factors(method, input, record.plan);
  record.original_parameters = size.total();
  record.stored_parameters = stored_parameters(record.plan.shapes(), size);
  record.trainable_parameters = trainable_parameters(method, input, record.plan);
  record.original_bytes = input_.total_bytes();
  estimate_peak();
}

void Compression::list_tensors() {
  const bool plain = record.plan.is_plain();
  const auto list = plain ? stock_parameters(config_) : compressed_parameters(config_, record.plan.shapes());
  std::map<std::string, std::function<void(const ParameterInfo&)>> made;
  for (size_t l = 0; l < record.plan.layers.size(); ++l) {
    const auto layer = static_cast<int64_t>(l);
    for (size_t j = 0; j < record.plan.layers[l].bank.size(); ++j) {
      for (const ExpertMatrix m : kExpertMatrices) {
        const auto entry = static_cast<int64_t>(j);
        const std::string name = plain ? expert_tensor_name(layer, entry, m) : bank_tensor_name(layer, entry, m);
        made[name] = [=, this](const ParameterInfo& info) { add_expert(info, l, j, m); };
      }
    }
    for (size_t a = 0; a < record.plan.layers[l].adapter_slot.size(); ++a) {
      for (const ExpertMatrix m : kExpertMatrices) {
        for (const bool b : {false, true}) {
          made[adapter_tensor_name(layer, static_cast<int64_t>(a), m, b)] = [=, this](const ParameterInfo& info) {
            add_adapter(info, l, a, m, b);
          };
        }
      }
    }
  }
  const DType source = experts_.place(0, 0, ExpertMatrix::kGate).dtype;
  for (const ParameterInfo& info : list) {
    const auto found = made.find(info.name);
    const auto computed = record.plan.computed.find(info.name);
    if (computed != record.plan.computed.end())
      tensors_.add_computed(info.name, info.shape, source, computed->second);
    else if (found != made.end())
      found->second(info);
    else
      tensors_.add_copy(info.name, info.shape, place_of(input_, info.name, info.shape));
  }
  record.stored_bytes = tensors_.total_bytes();
}

std::vector<WeightedMatrix> Compression::sources(size_t layer, size_t entry, ExpertMatrix matrix) const {
  const BankEntry& made = record.plan.layers[layer].bank[entry];
  std::vector<WeightedMatrix> out;
  for (size_t i = 0; i < made.experts.size(); ++i) {
    const int64_t from = made.layer >= 0 ? made.layer : static_cast<int64_t>(layer);
    out.push_back({experts_.place(from, made.experts[i], matrix), made.weights[i]});
  }
  return out;
}

void Compression::add_expert(const ParameterInfo& info, size_t layer, size_t entry, ExpertMatrix matrix) {
  const std::vector<WeightedMatrix> from = sources(layer, entry, matrix);
  if (record.plan.layers[layer].bank[entry].is_copy())
    tensors_.add_copy(info.name, info.shape, from[0].place);
  else
    tensors_.add_mix(info.name, info.shape, from);
}

void Compression::add_adapter(const ParameterInfo& info, size_t layer, size_t adapter, ExpertMatrix matrix, bool b) {
  const DType source = experts_.place(static_cast<int64_t>(layer), 0, matrix).dtype;
  tensors_.add_computed(info.name, info.shape, source, [=, this] {
    const std::string site = fmt::format("{}.{}.{}", layer, adapter, static_cast<int>(matrix));
    if (site != last_site_) last_factors_ = factors(layer, adapter, matrix), last_site_ = site;
    return b ? last_factors_.b : last_factors_.a;
  });
}

AdapterFactors Compression::factors(size_t layer, size_t adapter, ExpertMatrix matrix) const {
  const LayerPlan& plan = record.plan.layers[layer];
  const int32_t slot = plan.adapter_slot[adapter];
  const auto entry = static_cast<size_t>(plan.shape.slots[static_cast<size_t>(slot)].expert);
  const std::vector<int64_t> shape = expert_matrix_shape(config_, matrix);
  const AdapterSite site{.layer = static_cast<int64_t>(layer),
                         .slot = slot,
                         .matrix = matrix,
                         .out = shape[0],
                         .in = shape[1],
                         .rank = plan.shape.adapter_rank[adapter],
                         .zero_base = plan.bank[entry].is_zero()};
  const MethodOptions& options = job_.options;
  if (options.adapter_init == AdapterInit::kGaussian) return gaussian_factors(site, options.adapter_std, options.seed);
  std::vector<WeightedMatrix> residual = {{experts_.place(site.layer, slot, matrix), 1.0}};
  for (WeightedMatrix& base : sources(layer, entry, matrix)) residual.push_back({base.place, -base.weight});
  return svd_factors(site, mixed(residual, DType::kF32), options.seed);
}

// Every tensor of the input once.
void Compression::account() {
  Coverage& coverage = record.coverage;
  std::set<std::string> copied, changed, experts;
  for (const ParameterInfo& info : stock_parameters(config_)) {
    if (info.kind != ParameterKind::kExpert) copied.insert(info.name);
  }
  for (size_t l = 0; l < record.plan.layers.size(); ++l) {
    const auto layer = static_cast<int64_t>(l);
    const std::vector<std::string> names = experts_.tensors_of(layer);
    experts.insert(names.begin(), names.end());
    for (size_t j = 0; j < record.plan.layers[l].bank.size(); ++j) {
      const BankEntry& entry = record.plan.layers[l].bank[j];
      const int64_t from = entry.layer >= 0 ? entry.layer : layer;
      for (const int32_t e : entry.experts) {
        for (const ExpertMatrix m : kExpertMatrices) {
          const bool computed = record.plan.computed.contains(bank_tensor_name(layer, static_cast<int64_t>(j), m));
          (entry.is_copy() && !computed ? copied : changed).insert(experts_.place(from, e, m).info->name);
        }
      }
    }
    // What latents are made of went into them.
    for (size_t s = 0; s < record.plan.layers[l].shape.slots.size(); ++s) {
      if (record.plan.layers[l].shape.slots[s].kind != SlotKind::kLatent) continue;
      for (const ExpertMatrix m : kExpertMatrices) {
        changed.insert(experts_.place(layer, static_cast<int64_t>(s), m).info->name);
      }
    }
  }
  for (const std::string& name : input_.names()) {
    ++coverage.seen;
    if (changed.contains(name))
      ++coverage.changed;
    else if (copied.contains(name))
      ++coverage.copied;
    else if (experts.contains(name))
      ++coverage.dropped;
    else
      coverage.skipped.push_back(name);
  }
}

void Compression::estimate_peak() {
  constexpr int64_t kProgram = int64_t{48} << 20, kPerTensor = 2 << 10;
  int64_t in_statistics = 0;
  if (!statistics_.uniform) in_statistics = 2 * static_cast<int64_t>(std::filesystem::file_size(job_.statistics));
  const int64_t matrix = config_.hidden_size * config_.intermediate_size;
  const int64_t adapters = record.rank * (config_.hidden_size + config_.intermediate_size) * 4;
  const bool svd = job_.options.adapter_init == AdapterInit::kSvd && !record.plan.is_plain();
  const int64_t experts = record.plan.computed.empty() ? 0 : 16 * 3 * matrix * 8;  // a few experts in f64
  const int64_t computed = std::max(experts, record.plan.working_bytes);
  peak_bytes = computed + kProgram + kPerTensor * static_cast<int64_t>(input_.names().size()) + in_statistics +
               StreamedTensors::working_bytes() + 2 * adapters + (svd ? matrix * (4 + 8 + 8 + 8) : 0);
}

OlmoeConfig Compression::output_config() const {
  OlmoeConfig config = config_;
  if (job_.dtype) {
    config.torch_dtype = *job_.dtype == DType::kBF16 ? "bfloat16" : *job_.dtype == DType::kF16 ? "float16" : "float32";
  }
  if (record.plan.is_plain()) return config;
  const Json method = {
      {"name", record.method}, {"bases", record.options.bases}, {"rank", record.rank}, {"budget", record.budget}};
  config.lightmoe_json = slot_tables_to_json(record.plan.shapes(), method).dump();
  return config;
}

}  // namespace

CompressEstimate estimate_compression(const CompressJob& job) {
  const DeviceScope host(DeviceKind::kCpu);  // whatever --device says: this works on files
  Compression compression(job);
  compression.record.plan.computed.clear();  // they refer to what goes out of scope here
  return {.record = compression.record, .peak_bytes = compression.peak_bytes};
}

CompressionRecord compress_model(const CompressJob& job) {
  const DeviceScope host(DeviceKind::kCpu);  // whatever --device says: this works on files
  OutputDirectory output(job.output, job.force, {job.model});
  Compression compression(job);
  CompressionRecord& record = compression.record;
  for (const std::string& name : record.coverage.skipped) {
    if (job.say) job.say(fmt::format("tensor \"{}\" is none of OLMoE's: not copied", name));
  }
  write_file_atomically(output.path() / "config.json", config_to_json(compression.output_config()));
  SafetensorsWriter writer(output.path(), compression.tensors().specs(), {.max_shard_bytes = job.max_shard_bytes});
  record.coverage.non_finite = compression.tensors().write(writer, [&](size_t done, size_t all) {
    if (job.say && all >= 1000 && done % (all / 10) == 0) job.say(fmt::format("{} of {} tensors", done, all));
  });
  copy_side_files(job.model, output.path());
  write_file_atomically(output.path() / kRecordFile, record_to_json(record, nullptr));
  output.commit();
  record.plan.computed.clear();  // they refer to what goes out of scope here
  return record;
}

std::string describe(const CompressEstimate& estimate) {
  const CompressionRecord& r = estimate.record;
  const double less = 100 * (1 - static_cast<double>(r.stored_parameters) / static_cast<double>(r.original_parameters));
  std::string text = fmt::format("method       {} ({})\n", r.method, r.budget);
  text += fmt::format("parameters   {} -> {} ({:.1f} % less)\n", human_count(r.original_parameters),
                      human_count(r.stored_parameters), less);
  text += fmt::format("weights      {} -> {} on disk ({} bytes)\n", human_bytes(r.original_bytes),
                      human_bytes(r.stored_bytes), r.stored_bytes);
  text += fmt::format("trainable    {} parameters in recovery\n", human_count(r.trainable_parameters));
  if (estimate.peak_bytes > 0)
    text += fmt::format("peak memory  about {} to compress\n", human_bytes(estimate.peak_bytes));
  text += "replaced per layer";
  for (const LayerPlan& layer : r.plan.layers) text += fmt::format(" {}", layer.replaced.size());
  return text + "\n";
}

}  // namespace lightmoe
