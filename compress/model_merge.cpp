#include "compress/model_merge.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "compress/record.h"
#include "compress/streamed_tensors.h"
#include "loaders/output.h"
#include "loaders/safetensors_header.h"
#include "model/config.h"
#include "model/summary.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

struct Input {
  std::filesystem::path path;
  OlmoeConfig config;
  Checkpoint files;
  explicit Input(const std::filesystem::path& directory)
      : path(directory), config(read_config(directory)), files(directory) {
    check(config.lightmoe_json.empty(), ErrorKind::kInput, "{}: a compressed model; merge first, then compress",
          directory.string());
  }
};

// Every tensor as rows: [E,2F,D] of fused experts too.
MatrixPlace rows_of(const Input& input, const TensorInfo& like) {
  check(input.files.contains(like.name), ErrorKind::kInput, "{}: has no tensor \"{}\", the other models have",
        input.path.string(), like.name);
  const TensorInfo& info = input.files.info(like.name);
  check(info.shape == like.shape, ErrorKind::kInput, "{}: tensor \"{}\" is {}, in the other models {}",
        input.path.string(), like.name, shape_text(info.shape), shape_text(like.shape));
  const std::optional<DType> dtype = info.dtype();
  check(dtype && is_floating(*dtype), ErrorKind::kInput, "{}: tensor \"{}\" is {}, expected a floating type",
        input.path.string(), like.name, info.file_dtype);
  const int64_t columns = info.shape.empty() ? 1 : info.shape.back();
  return {.file = &input.files.file_of(like.name),
          .info = &info,
          .rows = columns == 0 ? 0 : info.numel() / columns,
          .columns = columns,
          .dtype = *dtype};
}

std::vector<double> values_of(const MatrixPlace& place, bool allow_nonfinite) {
  const Tensor t = place.read(DType::kF64);
  FiniteCheck scan(place, allow_nonfinite);
  scan.scan(t.raw(), DType::kF64, t.numel());
  scan.finish();
  return {t.data<double>(), t.data<double>() + t.numel()};
}

std::vector<double> weights_of(const ModelMergeJob& job) {
  std::vector<double> weights = job.weights;
  if (weights.empty()) weights.assign(job.models.size(), 1.0);
  check(weights.size() == job.models.size(), ErrorKind::kUsage, "--weights: {} numbers for {} models", weights.size(),
        job.models.size());
  for (const double w : weights) check(std::isfinite(w), ErrorKind::kUsage, "--weights {}: expected finite numbers", w);
  if (job.rule != MergeRule::kAverage) return weights;
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  check(std::isfinite(sum) && sum > 0, ErrorKind::kUsage, "--weights: their sum is {:g}, an average needs more than 0",
        sum);
  for (double& w : weights) w /= sum;
  return weights;
}

void check_job(const ModelMergeJob& job) {
  check(!job.models.empty(), ErrorKind::kUsage, "no model to merge");
  const bool average = job.rule == MergeRule::kAverage;
  check(average || !job.base.empty(), ErrorKind::kUsage, "this rule needs --base, the model the others come from");
  check(!average || job.base.empty(), ErrorKind::kUsage,
        "--base: an average has no base (--rule task, ties or dare has)");
  check(job.density > 0 && job.density <= 1, ErrorKind::kUsage, "--density {:g}: expected more than 0, at most 1",
        job.density);
  check(std::isfinite(job.scale), ErrorKind::kUsage, "--scale {:g}: expected a finite number", job.scale);
}

class Merger {
 public:
  explicit Merger(const ModelMergeJob& job)
      : job_(job), weights_(weights_of(job)), tensors_(job.dtype, job.allow_nonfinite) {
    for (const auto& path : job.models) inputs_.push_back(std::make_unique<Input>(path));
    if (!job.base.empty()) base_ = std::make_unique<Input>(job.base);
    const Input& first = *inputs_.front();
    for (const auto& input : inputs_) check_names(*input, first);
    if (base_) check_names(*base_, first);
    for (const ParameterInfo& p : expected_parameters(first.config, first.files, first.path.string())) add(p.name);
  }

  const StreamedTensors& tensors() const { return tensors_; }
  OlmoeConfig config() const {
    OlmoeConfig config = inputs_.front()->config;
    if (job_.dtype)
      config.torch_dtype = *job_.dtype == DType::kBF16  ? "bfloat16"
                           : *job_.dtype == DType::kF16 ? "float16"
                                                        : "float32";
    return config;
  }

 private:
  static void check_names(const Input& input, const Input& first) {
    const OlmoeConfig &a = input.config, &b = first.config;
    check(a.num_experts_per_token == b.num_experts_per_token && a.num_heads == b.num_heads &&
              a.rope_theta == b.rope_theta && a.norm_topk_prob == b.norm_topk_prob && a.num_layers == b.num_layers,
          ErrorKind::kInput, "{}: top-k, heads, layers, rope_theta or norm_topk_prob differ from those of {}",
          input.path.string(), first.path.string());
    for (const std::string& name : input.files.names()) {
      check(first.files.contains(name), ErrorKind::kInput, "{}: has no tensor \"{}\", {} has", first.path.string(),
            name, input.path.string());
    }
  }

  void add(const std::string& name) {
    const TensorInfo& like = inputs_.front()->files.info(name);
    std::vector<WeightedMatrix> sources;
    for (size_t i = 0; i < inputs_.size(); ++i) sources.push_back({rows_of(*inputs_[i], like), weights_[i]});
    if (job_.rule == MergeRule::kAverage) return tensors_.add_mix(name, like.shape, sources);
    const MatrixPlace base = rows_of(*base_, like);
    tensors_.add_computed(name, like.shape, base.dtype,
                          [this, name, base, sources] { return merged(name, base, sources); });
  }

  Tensor merged(const std::string& name, const MatrixPlace& base, const std::vector<WeightedMatrix>& sources) const {
    const std::vector<double> start = values_of(base, job_.allow_nonfinite);
    TaskVectors tasks;
    for (size_t i = 0; i < sources.size(); ++i) {
      std::vector<double>& delta = tasks.deltas.emplace_back(values_of(sources[i].place, job_.allow_nonfinite));
      for (size_t j = 0; j < delta.size(); ++j) delta[j] -= start[j];
      if (job_.rule == MergeRule::kTies) keep_largest(delta, job_.density);
      if (job_.rule == MergeRule::kDare) drop_at_random(delta, job_.density, job_.seed, stream_of(name, i));
      tasks.weights.push_back(sources[i].weight);
    }
    const std::vector<double> sum = job_.rule == MergeRule::kTies ? elect_and_mean(tasks) : weighted_sum(tasks);
    const Tensor out = Tensor::empty({base.rows, base.columns}, DType::kF64);
    for (size_t j = 0; j < start.size(); ++j) out.data<double>()[j] = start[j] + job_.scale * sum[j];
    return out;
  }

  static uint64_t stream_of(const std::string& name, size_t model) {
    const std::string hash = hash_bytes(name.data(), name.size());
    return std::stoull(hash.substr(0, 16), nullptr, 16) + model;
  }

  const ModelMergeJob& job_;
  std::vector<double> weights_;
  std::vector<std::unique_ptr<Input>> inputs_;
  std::unique_ptr<Input> base_;
  StreamedTensors tensors_;
};

}  // namespace

MergeRule parse_merge_rule(std::string_view name) {
  if (name == "average") return MergeRule::kAverage;
  if (name == "task") return MergeRule::kTask;
  if (name == "ties") return MergeRule::kTies;
  check(name == "dare", ErrorKind::kUsage, "--rule {}: expected average, task, ties or dare", name);
  return MergeRule::kDare;
}

void keep_largest(std::vector<double>& values, double density) {
  const auto keep = static_cast<size_t>(std::ceil(density * static_cast<double>(values.size())));
  if (keep >= values.size()) return;
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  const auto larger = [&](size_t a, size_t b) {
    const double x = std::fabs(values[a]), y = std::fabs(values[b]);
    return x != y ? x > y : a < b;
  };
  std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(keep), order.end(), larger);
  for (size_t i = keep; i < order.size(); ++i) values[order[i]] = 0;
}

void drop_at_random(std::vector<double>& values, double density, uint64_t seed, uint64_t stream) {
  Philox random(seed, stream);
  for (double& v : values) v = random.uniform() < density ? v / density : 0.0;
}

std::vector<double> weighted_sum(const TaskVectors& tasks) {
  std::vector<double> sum(tasks.deltas.front().size(), 0.0);
  for (size_t i = 0; i < tasks.deltas.size(); ++i) {
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += tasks.weights[i] * tasks.deltas[i][j];
  }
  return sum;
}

std::vector<double> elect_and_mean(const TaskVectors& tasks) {
  std::vector<double> elected = weighted_sum(tasks);
  for (size_t j = 0; j < elected.size(); ++j) {
    double sum = 0, weight = 0;
    for (size_t i = 0; i < tasks.deltas.size(); ++i) {
      if (tasks.deltas[i][j] * elected[j] <= 0) continue;
      sum += tasks.weights[i] * tasks.deltas[i][j], weight += tasks.weights[i];
    }
    elected[j] = weight > 0 ? sum / weight : 0;
  }
  return elected;
}

ModelMergeReport merge_models(const ModelMergeJob& job) {
  check_job(job);
  std::vector<std::filesystem::path> inputs = job.models;
  if (!job.base.empty()) inputs.push_back(job.base);
  const Merger merger(job);
  OutputDirectory output(job.output, job.force, inputs);
  write_file_atomically(output.path() / "config.json", config_to_json(merger.config()));
  SafetensorsWriter writer(output.path(), merger.tensors().specs(), {});
  merger.tensors().write(writer, {});
  copy_side_files(job.models.front(), output.path());
  output.commit();
  return {.tensors = static_cast<int64_t>(merger.tensors().specs().size()), .bytes = merger.tensors().total_bytes()};
}

}  // namespace lightmoe
