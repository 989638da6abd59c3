// Whole models: model/<shape>/<weights>/<phase>. Shapes are those of named_config (tiny, mid, olmoe-1b-7b), weights random.
//   prefill    1 x 512 tokens, logits of every position (as Hugging Face's forward)
//   prefill_last   the same with the logits of the last position alone (as an inference engine)
//   decode     64 tokens, one at a time, after a prompt of 16
//   train_step     4 x 256 tokens: forward, backward, clip, AdamW on every parameter
// Counters: tokens/s; peak MiB of the phase by category accounting (weights, gradients, moments, activations) and of the process.

#include <benchmark/benchmark.h>

#include <functional>
#include <memory>

#include "autograd/optimizer.h"
#include "model/olmoe.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

struct Variant {
  std::string shape, name;  // "mid", "f32"
  DType weights;
  GemmCompute compute;
};

std::vector<int32_t> random_ids(int64_t count, int64_t vocab, uint64_t seed) {
  Philox random(seed, 5);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab)));
  return ids;
}

// One model at a time: mid with its training state takes 7 GB.
Olmoe& model_for(const Variant& variant) {
  static std::unique_ptr<Olmoe> model;
  static std::string loaded;
  const std::string key = variant.shape + "/" + std::string(name_of(variant.weights));
  if (loaded != key) {
    model.reset();
    trim_memory_cache();
    model = random_model(named_config(variant.shape).value(), variant.weights, 1);
    loaded = key;
  }
  reset_peak_memory();
  return *model;
}

void report(benchmark::State& state, int64_t tokens) {
  state.counters["tokens/s"] =
      benchmark::Counter(static_cast<double>(tokens), benchmark::Counter::kIsIterationInvariantRate);
  state.counters["peak_MiB"] = static_cast<double>(memory_use_total().peak_bytes) / 1048576.0;
  state.counters["weights_MiB"] = static_cast<double>(memory_use(MemoryCategory::kWeights).live_bytes) / 1048576.0;
  state.counters["process_peak_MiB"] = static_cast<double>(process_peak_rss_bytes()) / 1048576.0;
}

void prefill(benchmark::State& state, const Variant& variant, bool all_logits) {
  Olmoe& model = model_for(variant);
  const ForwardOptions options{.compute = variant.compute};
  const Batch batch = make_batch(random_ids(512, model.config.vocab_size, 2), 1, 512);
  for (auto _ : state) {
    const Tensor hidden = model.forward(batch, options);
    benchmark::DoNotOptimize(model.logits(all_logits ? hidden : hidden.slice(511, 512), options).raw());
  }
  report(state, 512);
}

void decode(benchmark::State& state, const Variant& variant) {
  Olmoe& model = model_for(variant);
  const ForwardOptions options{.compute = variant.compute};
  const std::vector<int32_t> ids = random_ids(16 + 64, model.config.vocab_size, 3);
  for (auto _ : state) {
    state.PauseTiming();
    KvCache cache(model.config, 1, 128, variant.weights == DType::kBF16 ? DType::kBF16 : DType::kF32);
    model.forward_cached({ids.begin(), ids.begin() + 16}, {16}, cache, options);
    state.ResumeTiming();
    for (size_t i = 16; i < ids.size(); ++i) {
      const Tensor hidden = model.forward_cached({ids[i]}, {1}, cache, options);
      benchmark::DoNotOptimize(model.logits(hidden, options).raw());
    }
  }
  report(state, 64);
}

void train_step(benchmark::State& state, const Variant& variant) {
  Olmoe& model = model_for(variant);
  const std::vector<int32_t> ids = random_ids(1024, model.config.vocab_size, 4);
  const Batch batch = make_batch(ids, 4, 256, ids);
  Optimizer optimizer(model.parameters(), {});
  const TrainOptions options{.compute = variant.compute, .loss_scale = 1.0 / (4 * 255), .aux_coef = 0.01};
  const auto step = [&] {
    optimizer.zero_grad();
    model.forward_backward(batch, options);
    optimizer.step(1e-4, optimizer.gradient_norm());
  };
  step();  // moments and gradients exist from here on
  for (auto _ : state) step();
  report(state, 1024);
  for (const ParameterPtr& parameter : model.parameters()) parameter->grad.reset();
}

void add(const Variant& variant, const char* phase, const std::function<void(benchmark::State&)>& body) {
  benchmark::RegisterBenchmark(("model/" + variant.shape + "/" + variant.name + "/" + phase).c_str(), body)
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
}

const bool registered = [] {
  const std::vector<Variant> variants = {{"tiny", "f32", DType::kF32, GemmCompute::kF32},
                                         {"tiny", "bf16_products", DType::kF32, GemmCompute::kBF16},
                                         {"tiny", "bf16", DType::kBF16, GemmCompute::kBF16},
                                         {"mid", "f32", DType::kF32, GemmCompute::kF32},
                                         {"mid", "bf16_products", DType::kF32, GemmCompute::kBF16},
                                         {"mid", "bf16", DType::kBF16, GemmCompute::kBF16},
                                         {"olmoe-1b-7b", "bf16", DType::kBF16, GemmCompute::kBF16}};
  for (const Variant& v : variants) {
    add(v, "prefill", [v](benchmark::State& s) { prefill(s, v, true); });
    add(v, "prefill_last", [v](benchmark::State& s) { prefill(s, v, false); });
    add(v, "decode", [v](benchmark::State& s) { decode(s, v); });
    if (v.weights == DType::kF32) add(v, "train_step", [v](benchmark::State& s) { train_step(s, v); });
  }
  return true;
}();

}  // namespace
}  // namespace lightmoe
