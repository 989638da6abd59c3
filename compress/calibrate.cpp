#include "compress/calibrate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "compress/unit_gradients.h"
#include "compress/weights.h"
#include "kernels/dispatch_plan.h"
#include "kernels/swiglu.h"
#include "runtime/parallel.h"
#include "runtime/philox.h"
#include "runtime/trace.h"

namespace lightmoe {
namespace {

std::vector<uint32_t> shuffled_order(size_t count, uint64_t seed) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0u);
  Philox random(seed, 0xca11b);
  for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
  return order;
}

double norm_of(const float* x, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  return std::sqrt(sum);
}

// What one layer's router saw in one batch, added to its statistics.
class Collector {
 public:
  Collector(const Olmoe& model, const CalibrateOptions& options, Statistics& statistics)
      : model_(model), options_(options), statistics_(statistics) {}

  // The rows of the next batch that belong to the sample, ascending.
  std::vector<int64_t> sampled_rows;

  // The experts run where the model is; sums are the host's.
  void add(const RouterView& view) {
    LayerStatistics& layer = statistics_.layers[static_cast<size_t>(view.layer)];
    add_logits(view, layer);
    add_routed(view, layer);
    if (options_.all_outputs) add_all(view, layer);
  }

 private:
  void add_logits(const RouterView& view, LayerStatistics& layer) const;
  void add_routed(const RouterView& view, LayerStatistics& layer) const;
  void add_all(const RouterView& view, LayerStatistics& layer) const;
  // On the host: output of every pair, the pairs of each slot, and where a pair's gate stands.
  struct Routed {
    Tensor outputs, offsets, index, gates;
  };
  static void add_rows(const Routed& routed, int layer_index, int64_t e, LayerStatistics& layer);

  const Olmoe& model_;
  const CalibrateOptions& options_;
  Statistics& statistics_;
};

void Collector::add_logits(const RouterView& view, LayerStatistics& layer) const {
  const int64_t slots = view.logits.dim(1);
  const Tensor host_logits = view.logits.on(DeviceKind::kCpu);
  const float* logits = host_logits.data<float>();
  for (int64_t t = 0; t < view.logits.dim(0); ++t) {
    const double norm = norm_of(logits + t * slots, slots);
    check(std::isfinite(norm), ErrorKind::kNumeric, "layer {}: the router's logits are not finite; calibration stops",
          view.layer);
    layer.logit_norm += norm;
  }
  const Tensor host_x = options_.sample_inputs && !sampled_rows.empty() ? view.x.on(DeviceKind::kCpu) : Tensor();
  for (const int64_t t : sampled_rows) {
    layer.sample_logits.insert(layer.sample_logits.end(), logits + t * slots, logits + (t + 1) * slots);
    if (!options_.sample_inputs) continue;
    const int64_t d = view.x.dim(1);
    const float* x = host_x.data<float>() + t * d;
    layer.sample_inputs.insert(layer.sample_inputs.end(), x, x + d);
  }
}

// f of every (token, chosen slot): the grouped products of the layer itself, kept apart per slot.
void Collector::add_routed(const RouterView& view, LayerStatistics& layer) const {
  const MoeLayer& moe = model_.blocks[static_cast<size_t>(view.layer)].moe;
  const int64_t slots = moe.num_slots(), f = model_.config.intermediate_size, d = model_.config.hidden_size;
  std::vector<int32_t> own(static_cast<size_t>(slots));
  std::iota(own.begin(), own.end(), 0);
  const DispatchPlan plan = make_dispatch_plan(view.slots, own, slots);
  std::vector<Tensor> gate_up, down;
  for (const Expert& expert : moe.experts) gate_up.push_back(expert.gate_up->value), down.push_back(expert.down->value);
  const Tensor h = Tensor::empty({plan.num_pairs, 2 * f}, DType::kF32),
               a = Tensor::empty({plan.num_pairs, f}, DType::kF32);
  const Tensor out = Tensor::empty({plan.num_pairs, d}, DType::kF32);
  run(GroupedGemmM{.a = view.x,
                   .a_rows = plan.pair_token,
                   .offsets = plan.pair_group_offsets,
                   .b = gate_up,
                   .c = h,
                   .trans_b = true,
                   .compute = options_.compute});
  run(SwiGlu{.h = h, .a = a});
  run(GroupedGemmM{
      .a = a, .offsets = plan.pair_group_offsets, .b = down, .c = out, .trans_b = true, .compute = options_.compute});
  const Routed routed{.outputs = out.on(DeviceKind::kCpu),
                      .offsets = plan.pair_group_offsets.on(DeviceKind::kCpu),
                      .index = plan.pair_index.on(DeviceKind::kCpu),
                      .gates = view.gates.on(DeviceKind::kCpu)};
  parallel_items(slots, [&](int64_t e) { add_rows(routed, view.layer, e, layer); });
}

void Collector::add_rows(const Routed& routed, int layer_index, int64_t e, LayerStatistics& layer) {
  const int64_t d = routed.outputs.dim(1), begin = routed.offsets.data<int32_t>()[e],
                end = routed.offsets.data<int32_t>()[e + 1];
  const auto slot = static_cast<size_t>(e);
  double *sum = layer.routed_output.data() + e * d, *squares = layer.routed_output2.data() + e * d;
  for (int64_t p = begin; p < end; ++p) {
    const float* f = routed.outputs.data<float>() + p * d;
    const double gate = routed.gates.data<float>()[routed.index.data<int32_t>()[p]], norm = norm_of(f, d);
    check(std::isfinite(norm), ErrorKind::kNumeric,
          "layer {}: the output of expert {} is not finite; calibration stops", layer_index, e);
    layer.count[slot] += 1;
    layer.gate_mass[slot] += gate;
    layer.output_norm[slot] += norm;
    layer.gate_output_norm[slot] += gate * norm;
    layer.output_norm2[slot] += norm * norm;
    layer.gate_output_norm2[slot] += gate * norm * norm;
    for (int64_t i = 0; i < d; ++i) {
      const auto v = static_cast<double>(f[i]);
      sum[i] += v, squares[i] += v * v;
    }
  }
}

void Collector::add_all(const RouterView& view, LayerStatistics& layer) const {
  const MoeLayer& moe = model_.blocks[static_cast<size_t>(view.layer)].moe;
  const int64_t rows = view.x.dim(0), f = model_.config.intermediate_size, d = model_.config.hidden_size;
  const Tensor h = Tensor::empty({rows, 2 * f}, DType::kF32), a = Tensor::empty({rows, f}, DType::kF32);
  const Tensor out = Tensor::empty({rows, d}, DType::kF32);
  for (size_t e = 0; e < moe.experts.size(); ++e) {
    run(Gemm{.a = view.x, .b = moe.experts[e].gate_up->value, .c = h, .trans_b = true, .compute = options_.compute});
    run(SwiGlu{.h = h, .a = a});
    run(Gemm{.a = a, .b = moe.experts[e].down->value, .c = out, .trans_b = true, .compute = options_.compute});
    const Tensor outputs = out.on(DeviceKind::kCpu);
    double* sum = layer.all_output.data() + static_cast<int64_t>(e) * d;
    parallel_for(0, d, 64, [&](int64_t first, int64_t last) {
      for (int64_t t = 0; t < rows; ++t) {
        for (int64_t i = first; i < last; ++i) sum[i] += static_cast<double>(outputs.data<float>()[t * d + i]);
      }
    });
  }
}

}  // namespace

CalibrationSet calibration_set(const std::vector<Document>& documents, const CalibrateOptions& o) {
  check(o.tokens >= 1 && o.length >= 1 && o.batch_tokens >= o.length && o.sample_tokens >= 0 && o.sample_length >= 1,
        ErrorKind::kUsage, "calibration of {} tokens in sequences of {}, batches of {}: expected 1 <= length <= batch",
        o.tokens, o.length, o.batch_tokens);
  CalibrationSet set;
  std::vector<int64_t> head;  // flat ids and borders, for the hash
  for (const uint32_t i : shuffled_order(documents.size(), o.seed)) {
    const std::vector<int32_t>& ids = documents[i].ids;
    const std::vector<uint8_t>& loss = documents[i].loss;  // empty: on every token
    for (int64_t begin = 0; begin < static_cast<int64_t>(ids.size()) && set.tokens < o.tokens; begin += o.length) {
      const int64_t count = std::min({o.length, static_cast<int64_t>(ids.size()) - begin, o.tokens - set.tokens});
      set.sequences.emplace_back(ids.begin() + begin, ids.begin() + begin + count);
      std::vector<int32_t>& labels = set.labels.emplace_back(static_cast<size_t>(count), -100);
      for (int64_t t = begin + 1; t < begin + count; ++t) {
        const auto at = static_cast<size_t>(t);
        if (loss.empty() || loss[at] != 0) labels[at - static_cast<size_t>(begin) - 1] = ids[at];
      }
      set.tokens += count;
      head.push_back(count);
      head.insert(head.end(), ids.begin() + begin, ids.begin() + begin + count);
      head.insert(head.end(), labels.begin(), labels.end());
    }
  }
  check(set.tokens > 0, ErrorKind::kInput, "calibration: no tokens in {} documents", documents.size());
  set.hash = hash_bytes(head.data(), head.size() * sizeof head[0]);
  int64_t seen = 0, taken = 0;
  for (const std::vector<int32_t>& sequence : set.sequences) {  // evenly: never ahead of the share of tokens seen
    const bool due = taken * set.tokens <= std::min(o.sample_tokens, set.tokens) * seen;
    const int64_t count =
        due ? std::min({static_cast<int64_t>(sequence.size()), o.sample_length, o.sample_tokens - taken}) : 0;
    set.sampled.push_back(count);
    taken += count;
    seen += static_cast<int64_t>(sequence.size());
  }
  return set;
}

Statistics calibrate(const Olmoe& model, const CalibrationSet& set, const std::string& fingerprint,
                     const CalibrateOptions& options, const std::function<void(int64_t, int64_t)>& progress) {
  const OlmoeConfig& config = model.config;
  for (const Block& block : model.blocks) {
    check(block.moe.is_plain() && config.lightmoe_json.empty(), ErrorKind::kInput,
          "calibrate: {} belongs to a compressed model; calibrate the original", block.moe.router->name);
  }
  Statistics statistics =
      empty_statistics(config.num_layers, config.num_experts, config.hidden_size, options.all_outputs);
  statistics.model = fingerprint;
  statistics.data = set.hash;
  statistics.tokens = set.tokens;
  Collector collector(model, options, statistics);
  const Observer observer{.on_router = [&](const RouterView& view) { collector.add(view); }};
  int64_t done = 0, batch = 0;
  for (size_t next = 0; next < set.sequences.size();) {
    std::vector<int32_t> ids, positions, begins;
    collector.sampled_rows.clear();
    for (; next < set.sequences.size(); ++next) {
      const std::vector<int32_t>& sequence = set.sequences[next];
      const auto first = static_cast<int64_t>(ids.size()), count = static_cast<int64_t>(sequence.size());
      if (first > 0 && first + count > options.batch_tokens) break;
      begins.push_back(static_cast<int32_t>(first));
      ids.insert(ids.end(), sequence.begin(), sequence.end());
      for (int64_t t = 0; t < count; ++t) positions.push_back(static_cast<int32_t>(t));
      for (int64_t t = 0; t < set.sampled[next]; ++t) {
        collector.sampled_rows.push_back(first + t);
        statistics.sample_token.push_back(done + first + t);
        statistics.sample_sequence.push_back(static_cast<int32_t>(next));
        statistics.sample_ids.push_back(sequence[static_cast<size_t>(t)]);
        statistics.sample_labels.push_back(set.labels[next][static_cast<size_t>(t)]);
      }
    }
    begins.push_back(static_cast<int32_t>(ids.size()));
    profile_step(batch++);
    const TraceRange range(TraceLevel::kStep, "calibrate", static_cast<int64_t>(ids.size()));
    model.forward(make_packed_batch(ids, {}, positions, begins), {.compute = options.compute, .observer = &observer});
    done += static_cast<int64_t>(ids.size());
    if (progress) progress(done, set.tokens);
  }
  if (options.unit_gradients) add_unit_gradients(model, set.sequences, set.labels, options.compute, statistics);
  return statistics;
}

}  // namespace lightmoe
