// The experts of one MoE layer at OLMoE's shape, forward and backward apart: layer/<shape>/<kind>/<numbers>/<routing>/<tokens>/<phase>.
// Kinds are those of model_session.h. Routing: uniform; skewed (slot s as likely as 1 / (1 + s)); one (every token chooses the same
// slots). FLOPs are those of what is computed: forward 6 n d for each stored expert that a token meets, once, and 6 R (n + d) for each adapter;
// backward twice that where weights train, else as much again as forward. For the original and uniform routing this is the published
// convention 6 T K n d. Counters: bases/token and replaced/token say how much there was to share. On a GPU LIGHTMOE_BENCH_TOKENS lists the
// numbers of tokens (1,8,64,4096,32768 when unset); elsewhere 1 and 64.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <set>
#include <sstream>

#include "bench/model_session.h"
#include "bench/op_bench.h"
#include "model/moe_op.h"

namespace lightmoe::bench {
namespace {

enum class RoutingKind : uint8_t { kUniform, kSkewed, kOne };
constexpr const char* kRoutingNames[] = {"uniform", "skewed", "one"};
constexpr const char* kKinds[] = {"original", "lightmoe-50", "recovery", "annealing"};

// K different slots for each token, drawn without replacement by weight.
std::vector<int32_t> choose_slots(int64_t tokens, int64_t slots, int64_t k, RoutingKind routing) {
  Philox random(9);
  std::vector<int32_t> all;
  std::vector<std::pair<double, int32_t>> keys(static_cast<size_t>(slots));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int32_t s = 0; s < slots;
         ++s) {  // exponential keys: the smallest K are a weighted draw (Efraimidis and Spirakis 2006)
      const double weight = routing == RoutingKind::kSkewed ? 1.0 / (1 + s) : 1;
      const double key = routing == RoutingKind::kOne ? s : -std::log(1 - random.uniform()) / weight;
      keys[static_cast<size_t>(s)] = {key, s};
    }
    std::partial_sort(keys.begin(), keys.begin() + k, keys.end());
    for (int64_t i = 0; i < k; ++i) all.push_back(keys[static_cast<size_t>(i)].second);
  }
  return all;
}

struct LayerCase {
  std::string shape;
  ModelKind kind;
  DType dtype;
  RoutingKind routing;
  int64_t tokens;
  bool backward;
};

struct Load {
  double flops = 0, bases = 0, replaced = 0;
};
Load load_of(const MoeLayer& moe, const OlmoeConfig& c, const std::vector<int32_t>& slots, int64_t tokens) {
  Load load;
  const auto n = static_cast<double>(c.intermediate_size), d = static_cast<double>(c.hidden_size);
  const int64_t k = c.num_experts_per_token;
  for (int64_t t = 0; t < tokens; ++t) {
    std::set<int32_t> stored, shared;
    for (int64_t i = 0; i < k; ++i) {
      const Slot& slot = moe.slots[static_cast<size_t>(slots[static_cast<size_t>(t * k + i)])];
      stored.insert(slot.expert);
      if (slot.adapter < 0) continue;
      load.flops += 6 * static_cast<double>(moe.adapters[static_cast<size_t>(slot.adapter)].rank()) * (n + d);
      load.replaced += 1, shared.insert(slot.expert);
    }
    load.flops += 6 * n * d * static_cast<double>(stored.size());
    load.bases += static_cast<double>(shared.size());
  }
  load.bases /= static_cast<double>(tokens), load.replaced /= static_cast<double>(tokens);
  return load;
}

// One layer in memory at a time: its model has a small vocabulary and nothing else of size.
const Olmoe& layer_model(const LayerCase& c) {
  static std::unique_ptr<Olmoe> model;
  static std::string key;
  const std::string wanted = fmt::format("{} {} {}", c.shape, static_cast<int>(c.kind), name_of(c.dtype));
  if (key != wanted) {
    model.reset();
    trim_memory_cache();
    OlmoeConfig config = named_config(c.shape).value();
    config.num_layers = 1, config.vocab_size = 64;
    model = make_model(config, c.dtype, c.kind);
    key = wanted;
  }
  return *model;
}

void run_layer(benchmark::State& state, const LayerCase& c) {
  const Olmoe& model = layer_model(c);
  const MoeLayer& moe = model.blocks[0].moe;
  const int64_t k = model.config.num_experts_per_token;
  const std::vector<int32_t> chosen = choose_slots(c.tokens, model.config.num_experts, k, c.routing);
  const Tensor slots = Tensor::from(chosen, {c.tokens, k});
  const Tensor x = random({c.tokens, model.config.hidden_size}, c.dtype), gates = random({c.tokens, k}, DType::kF32);
  const Tensor dy = random({c.tokens, model.config.hidden_size}, c.dtype);
  const GemmCompute compute = c.dtype == DType::kBF16 ? GemmCompute::kBF16 : GemmCompute::kF32;
  const auto forward = [&](Tape& tape) {
    return moe_experts(tape, Tape::variable(x), moe, slots, Tape::variable(gates), compute);
  };
  const Load load = load_of(moe, model.config, chosen, c.tokens);
  const bool trains = c.kind != ModelKind::kCompressed;
  const double flops = load.flops * (c.backward ? (trains ? 2 : 1) : 1);
  DeviceTimer timer(default_device());
  double best = std::numeric_limits<double>::infinity();
  for (auto _ : state) {
    Tape tape(c.backward);
    if (!c.backward) {
      flush_caches();
      timer.start();
      forward(tape);
    } else {
      const Var y = forward(tape);
      y.grad->add(dy.clone());
      timer.start();
      tape.backward();
    }
    const double seconds = timer.stop_us() * 1e-6;
    state.SetIterationTime(seconds);
    best = std::min(best, seconds);
  }
  for (const ParameterPtr& p : moe.parameters()) p->grad.reset();
  using benchmark::Counter;
  state.counters["tokens/s"] = Counter(static_cast<double>(c.tokens), Counter::kIsIterationInvariantRate);
  state.counters["best_TFLOP/s"] = flops / best * 1e-12;
  const Ceilings& ceiling = measured_ceilings();
  state.counters["of_gemm"] = flops / best / (compute == GemmCompute::kBF16 ? ceiling.bf16_flop : ceiling.f32_flop);
  state.counters["bases/token"] = load.bases;
  state.counters["replaced/token"] = load.replaced;
}

std::vector<int64_t> token_counts() {
  if (!is_for_gpu()) return {1, 64};
  const char* list = std::getenv("LIGHTMOE_BENCH_TOKENS");
  std::istringstream text(list != nullptr ? list : "1,8,64,4096,32768");
  std::vector<int64_t> counts;
  for (std::string one; std::getline(text, one, ',');) counts.push_back(std::stoll(one));
  return counts;
}

const bool registered = bench::registered([] {
  for (const char* const shape : {"tiny", "olmoe-1b-7b"}) {
    for (const ModelKind kind : {ModelKind::kOriginal, ModelKind::kCompressed, ModelKind::kRecovery}) {
      for (const RoutingKind routing : {RoutingKind::kUniform, RoutingKind::kSkewed, RoutingKind::kOne}) {
        for (const int64_t tokens : token_counts()) {
          for (const bool backward : {false, true}) {
            const LayerCase c{shape, kind, DType::kBF16, routing, tokens, backward};
            const std::string name =
                fmt::format("layer/{}/{}/bf16/{}/{}/{}", shape, kKinds[static_cast<int>(kind)],
                            kRoutingNames[static_cast<int>(routing)], tokens, backward ? "backward" : "forward");
            benchmark::RegisterBenchmark(name.c_str(), [c](benchmark::State& s) { run_layer(s, c); })
                ->UseManualTime()
                ->Unit(benchmark::kMicrosecond);
          }
        }
      }
    }
  }
});

}  // namespace
}  // namespace lightmoe::bench
