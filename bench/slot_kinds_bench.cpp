// What each kind of slot costs to hold and to run: slots/<shape>/<numbers>/<kind>, one model of every kind, weights random. Every
// kind but the first stores half of the expert weights or a little less, in all layers alike:
//   stored      every slot its own expert, as in the original
//   base        3 bases with adapters of rank 16 for the replaced slots (LightMoE)
//   shared      an expert for every two slots (merging, ConMoE)
//   removed     every other slot masked (pruning)
//   constant    every other slot a vector (MoNE)
//   latent      gate and up through a projection that eight slots share (MoLAE); mixed: through mixes of E/4 bases (MoBE)
//   narrow      experts of half the units; ragged: of E different widths from a quarter to three quarters (units pruned inside them)
// Counters: stored_MiB, of the weights; live_MiB, all tensors while nothing runs; peak_MiB, of all tensors during prefill; prefill/s and
// decode/s, tokens a second of 1 x 512 tokens at once (logits of the last one) and of 32 tokens one by one after a prompt of 16; best_*
// of the fastest iteration, for machines that are not idle.

#include <benchmark/benchmark.h>

#include <chrono>

#include "bench/op_bench.h"
#include "compress/budget.h"
#include "model/olmoe.h"
#include "model/weights.h"

namespace lightmoe::bench {
namespace {

constexpr int64_t kPrefill = 512, kPrompt = 16, kNew = 32;

// Bank of `experts`, slot s pointing to entry(s).
LayerShape banked(const ModelSize& size, int64_t experts, const std::function<int64_t(int64_t)>& entry) {
  LayerShape shape;
  shape.zero_expert.assign(static_cast<size_t>(experts), 0);
  for (int64_t s = 0; s < size.slots; ++s) shape.slots.push_back({.expert = static_cast<int32_t>(entry(s))});
  return shape;
}

int64_t half(const ModelSize& size) { return size.slots * size.expert / 2; }

LayerShape stored(const ModelSize& size) { return plain_layer_shape(size.slots); }
LayerShape shared(const ModelSize& size) {
  return banked(size, (size.slots + 1) / 2, [](int64_t s) { return s / 2; });
}

LayerShape every_other(const ModelSize& size, SlotKind kind) {
  LayerShape shape = shared(size);
  for (int64_t s = 1; s < size.slots; s += 2) {
    shape.slots[static_cast<size_t>(s)] = {.kind = kind};
    if (kind != SlotKind::kConstant) continue;
    shape.slots[static_cast<size_t>(s)].constant = static_cast<int32_t>(shape.constants++);
  }
  return shape;
}
LayerShape removed(const ModelSize& size) { return every_other(size, SlotKind::kRemoved); }
LayerShape constant(const ModelSize& size) { return every_other(size, SlotKind::kConstant); }

// The first slots are replaced.
LayerShape base(const ModelSize& size) {
  const ReplacementCost cost{.size = size, .bases = 3, .rank = 16};
  int64_t n = 0;
  while (cost.layer_parameters(n) > half(size)) ++n;
  LayerShape shape =
      banked(size, size.slots - n + cost.bases, [&](int64_t s) { return s < n ? s % cost.bases : s - n + cost.bases; });
  for (int64_t s = 0; s < n; ++s) {
    shape.slots[static_cast<size_t>(s)].adapter = static_cast<int32_t>(s);
    shape.adapter_rank.push_back(cost.rank);
  }
  return shape;
}

// The largest latent space that fits.
LayerShape latents(const ModelSize& size, bool mixed) {
  LayerShape shape;
  shape.projections = mixed ? size.slots / 4 : (size.slots + 7) / 8, shape.latent_mix = mixed;
  for (int32_t s = 0; s < size.slots; ++s) {
    shape.slots.push_back({.kind = SlotKind::kLatent, .latent = s});
    shape.latent_projection.push_back(mixed ? -1 : s / 8);
  }
  shape.latent_size = 1;
  while (stored_parameters(shape, size) <= half(size)) ++shape.latent_size;
  --shape.latent_size;
  return shape;
}
LayerShape latent(const ModelSize& size) { return latents(size, false); }
LayerShape latent_mixed(const ModelSize& size) { return latents(size, true); }

LayerShape narrow(const ModelSize& size) {
  LayerShape shape = stored(size);
  shape.widths.assign(static_cast<size_t>(size.slots), size.width / 2);
  return shape;
}
LayerShape ragged(const ModelSize& size) {
  LayerShape shape = stored(size);
  for (int64_t e = 0; e < size.slots; ++e) {
    shape.widths.push_back(size.width / 4 + e * (size.width / 2) / (size.slots - 1));
  }
  return shape;
}

struct Kind {
  const char* name;
  LayerShape (*shape)(const ModelSize&);
};
constexpr Kind kKinds[] = {
    {"stored", &stored}, {"base", &base},          {"shared", &shared}, {"removed", &removed}, {"constant", &constant},
    {"latent", &latent}, {"mixed", &latent_mixed}, {"narrow", &narrow}, {"ragged", &ragged},
};

std::unique_ptr<Olmoe> model_of(const OlmoeConfig& config, const Kind& kind, DType dtype) {
  const LayerShape shape = kind.shape(model_size(config));
  std::unique_ptr<Olmoe> model =
      declare_model(config, std::vector<LayerShape>(static_cast<size_t>(config.num_layers), shape));
  allocate_weights(*model, dtype);
  uint64_t seed = 1;
  for (const ParameterPtr& p : model->parameters()) {
    const Tensor host = Tensor::empty(p->value.shape(), DType::kF32, DeviceKind::kCpu);
    fill_normal(host.data<float>(), host.numel(), 0.02f, seed++, 11);
    p->value.copy_from(host.to(dtype).on(p->value.device()));
  }
  return model;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Timing {
  double prefill = 0, decode = 0;  // seconds
};

// Both phases once.
Timing run(const Olmoe& model, const std::vector<int32_t>& ids, DType dtype, int64_t* peak) {
  const ForwardOptions options{.compute = dtype == DType::kBF16 ? GemmCompute::kBF16 : GemmCompute::kF32};
  Timing timing;
  reset_peak_memory();
  auto start = std::chrono::steady_clock::now();
  const Tensor hidden = model.forward(make_batch(ids, 1, kPrefill), options);
  benchmark::DoNotOptimize(model.logits(hidden.slice(kPrefill - 1, kPrefill), options).raw());
  wait_for_device();
  timing.prefill = seconds_since(start);
  *peak = memory_use_total().peak_bytes;
  KvCache cache(model.config, 1, kPrompt + kNew, dtype);
  model.forward_cached({ids.begin(), ids.begin() + kPrompt}, {kPrompt}, cache, options);
  wait_for_device();
  start = std::chrono::steady_clock::now();
  for (int64_t i = kPrompt; i < kPrompt + kNew; ++i) {
    const Tensor next = model.forward_cached({ids[static_cast<size_t>(i)]}, {1}, cache, options);
    benchmark::DoNotOptimize(model.logits(next, options).raw());
    wait_for_device();
  }
  timing.decode = seconds_since(start);
  return timing;
}

void measure(benchmark::State& state, const char* shape, const Kind& kind, DType dtype) {
  const OlmoeConfig config = named_config(shape).value();
  const std::unique_ptr<Olmoe> model = model_of(config, kind, dtype);
  Philox random(2, 5);
  std::vector<int32_t> ids(kPrefill);
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(static_cast<uint64_t>(config.vocab_size)));
  int64_t peak = 0;
  run(*model, ids, dtype, &peak);
  trim_memory_cache();
  const int64_t live = memory_use_total().live_bytes;
  Timing sum, best{1e30, 1e30};
  for (auto _ : state) {
    const Timing t = run(*model, ids, dtype, &peak);
    sum.prefill += t.prefill, sum.decode += t.decode;
    best.prefill = std::min(best.prefill, t.prefill), best.decode = std::min(best.decode, t.decode);
    state.SetIterationTime(t.prefill + t.decode);
  }
  const auto runs = static_cast<double>(state.iterations());
  constexpr double kMiB = 1048576;
  state.counters["stored_MiB"] = static_cast<double>(model->stored_bytes()) / kMiB;
  state.counters["live_MiB"] = static_cast<double>(live) / kMiB;
  state.counters["peak_MiB"] = static_cast<double>(peak) / kMiB;
  state.counters["prefill/s"] = runs * kPrefill / sum.prefill;
  state.counters["decode/s"] = runs * kNew / sum.decode;
  state.counters["best_prefill/s"] = kPrefill / best.prefill;
  state.counters["best_decode/s"] = kNew / best.decode;
}

const bool registered = bench::registered([] {
  for (const char* const shape : {"tiny", "mid"}) {
    for (const DType dtype : kStorageTypes) {
      for (const Kind& kind : kKinds) {
        const std::string name = fmt::format("slots/{}/{}/{}", shape, name_of(dtype), kind.name);
        benchmark::RegisterBenchmark(
            name.c_str(), [shape, kind, dtype](benchmark::State& state) { measure(state, shape, kind, dtype); })
            ->UseManualTime()
            ->Iterations(2)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
});

}  // namespace
}  // namespace lightmoe::bench
