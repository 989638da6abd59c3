// Whole models, original and compressed side by side: model/<shape>/<kind>/<numbers>/<phase>. Shapes are those of named_config (tiny,
// mid, olmoe-1b-7b), weights random; kinds are those of model_session.h; numbers: f32, bf16_products (weights f32, products bf16), bf16.
//   prefill             1 x 512 tokens, logits of every position (as Hugging Face's forward); prefill_2048 on a GPU: 1 x 2048
//   prefill_last        the same with the logits of the last position alone (as an inference engine)
//   decode              64 tokens, one at a time, after a prompt of 16
//   generate_B          B = 1, 8, 32 sequences side by side, 64 new tokens each after a prompt of 16, as `lightmoe generate` runs them (on a
//                       GPU one graph a step, greedy); tokens/s of the steps alone
//   *_per_slot          the compressed model with every slot running its base for itself (base-once off)
//   train_step          4 x 256 tokens: forward, backward, clip, AdamW on every parameter (of bf16 weights on their f32 master copies)
//   recovery_step       the same on what recovery trains, bases and adapters; recovery_annealing: with the originals blended in
//   *_64k               on a GPU: a step over 16 passes of 4 x 1024 tokens
// Steps of olmoe-1b-7b and the models between (lightmoe-30, -40) in bf16 only, the steps on a GPU only: a host has not their memory.
// Counters: tokens/s; of_gemm and of_memory, the shares of the measured ceilings (products of that type; reading memory) that the
// phase's useful FLOPs and its weight bytes come to; MiB: stored (weights of the model), live (all tensors after the phase), peak (of all
// tensors during it), rss (the process, after its cache is given back); saved_*: against the original in the same phase; activations_KiB/token
// of a step: peak above weights, gradients and moments. On a GPU also its clocks (bench/gpu_clocks.h).

#include <benchmark/benchmark.h>

#include <functional>
#include <map>

#include "bench/gpu_clocks.h"
#include "bench/model_session.h"
#include "bench/op_bench.h"
#include "model/generate.h"
#include "model/moe_op.h"
#include "runtime/device.h"
#include "runtime/philox.h"

namespace lightmoe::bench {
namespace {

struct Variant {
  std::string shape, numbers;  // "mid", "f32"
  DType weights;
  GemmCompute compute;
  ModelKind kind;
};
constexpr const char* kKindNames[] = {"original",    "lightmoe-30", "lightmoe-40",
                                      "lightmoe-50", "lightmoe-50", "lightmoe-50"};

std::vector<int32_t> random_ids(int64_t count, int64_t vocab, uint64_t seed) {
  Philox random(seed, 5);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab)));
  return ids;
}

double mib(int64_t bytes) { return static_cast<double>(bytes) / 1048576; }

// rss of the original by shape, numbers and phase, for what is measured after it in the same process.
double& original_rss(const Variant& v, const std::string& phase) {
  static std::map<std::string, double> known;
  return known[v.shape + v.numbers + phase];
}

void report(benchmark::State& state, const Variant& v, const std::string& phase, int64_t tokens, double flop,
            double weight_bytes) {
  using benchmark::Counter;
  constexpr auto kRate = Counter::kIsIterationInvariantRate;
  const Ceilings& best = measured_ceilings();
  ModelSession& session = ModelSession::get(v.shape, v.weights, v.kind);
  state.counters["tokens/s"] = Counter(static_cast<double>(tokens), kRate);
  state.counters["GFLOP/s"] = Counter(flop * 1e-9, kRate);
  state.counters["of_gemm"] = Counter(flop / (v.compute == GemmCompute::kBF16 ? best.bf16_flop : best.f32_flop), kRate);
  if (weight_bytes > 0) state.counters["of_memory"] = Counter(weight_bytes / best.read_bytes, kRate);
  state.counters["peak_MiB"] = mib(memory_use_total().peak_bytes);
  state.counters["live_MiB"] = mib(memory_use_total().live_bytes);
  state.counters["stored_MiB"] = mib(session.model().stored_bytes());
  state.counters["saved_stored_MiB"] = mib(session.original_bytes() - session.model().stored_bytes());
  trim_memory_cache();
  const double rss = mib(process_rss_bytes());
  state.counters["rss_MiB"] = rss;
  double& original = original_rss(v, phase);
  if (v.kind == ModelKind::kOriginal) original = rss;
  if (original > 0) state.counters["saved_rss_MiB"] = original - rss;
}

ModelSession& session_for(const Variant& v) {
  measured_ceilings();  // before the model, so that its memory is not in the figures
  ModelSession& session = ModelSession::get(v.shape, v.weights, v.kind);
  reset_peak_memory();
  return session;
}

void prefill(benchmark::State& state, const Variant& v, bool all_logits, int64_t tokens = 512) {
  ModelSession& session = session_for(v);
  const Olmoe& model = session.model();
  const ForwardOptions options{.compute = v.compute};
  const Batch batch = make_batch(random_ids(tokens, model.config.vocab_size, 2), 1, tokens);
  const PassWork work = session.count(batch, all_logits);
  reset_peak_memory();
  const GpuClocks clocks(state);
  for (auto _ : state) {
    const Tensor hidden = model.forward(batch, options);
    benchmark::DoNotOptimize(model.logits(all_logits ? hidden : hidden.slice(tokens - 1, tokens), options).raw());
    wait_for_device(default_device());
  }
  report(state, v, fmt::format("prefill_{}_{}", tokens, all_logits), tokens, work.forward_flop(), 0);
}

void decode(benchmark::State& state, const Variant& v) {
  constexpr int64_t kPrompt = 16, kNew = 64;
  ModelSession& session = session_for(v);
  const Olmoe& model = session.model();
  const ForwardOptions options{.compute = v.compute};
  const std::vector<int32_t> ids = random_ids(kPrompt + kNew, model.config.vocab_size, 3);
  const PassWork work =
      session.count_decode(make_batch({ids.begin() + kPrompt, ids.end()}, 1, kNew), kPrompt + kNew / 2);
  reset_peak_memory();
  const GpuClocks clocks(state);
  for (auto _ : state) {
    state.PauseTiming();
    KvCache cache(model.config, 1, 128, v.weights == DType::kBF16 ? DType::kBF16 : DType::kF32);
    model.forward_cached({ids.begin(), ids.begin() + kPrompt}, {kPrompt}, cache, options);
    wait_for_device(default_device());
    state.ResumeTiming();
    for (size_t i = kPrompt; i < ids.size(); ++i) {
      const Tensor hidden = model.forward_cached({ids[i]}, {1}, cache, options);
      benchmark::DoNotOptimize(model.logits(hidden, options).raw());
      wait_for_device(default_device());  // the next token is chosen from these
    }
  }
  report(state, v, "decode", kNew, work.forward_flop(), work.weight_bytes);
}

// A batch of sequences through the decoder that the program uses; the model ends none of them early.
void generate_batch(benchmark::State& state, const Variant& v, int64_t sequences) {
  constexpr int64_t kPrompt = 16, kNew = 64;
  ModelSession& session = session_for(v);
  const Olmoe& model = session.model();
  std::vector<std::vector<int32_t>> prompts;
  for (int64_t i = 0; i < sequences; ++i) {
    prompts.push_back(random_ids(kPrompt, model.config.vocab_size, static_cast<uint64_t>(10 + i)));
  }
  const GenerateOptions options{.sampling = {},
                                .max_new_tokens = kNew,
                                .batch = sequences,
                                .cache_dtype = v.weights == DType::kBF16 ? DType::kBF16 : DType::kF32,
                                .forward = {.compute = v.compute}};
  reset_peak_memory();
  GenerateReport times;
  const GpuClocks clocks(state);
  for (auto _ : state) {
    generate(model, prompts, options, &times);
    state.SetIterationTime(times.decode_seconds);
  }
  report(state, v, fmt::format("generate_{}", sequences), times.decode_tokens, 0, 0);
}

// A step of `passes` over 4 x `length` tokens.
void train_step(benchmark::State& state, const Variant& v, int64_t length = 256, int64_t passes = 1) {
  constexpr int64_t kRows = 4;
  ModelSession& session = session_for(v);
  const std::vector<int32_t> ids = random_ids(kRows * length, session.model().config.vocab_size, 4);
  const Batch batch = make_batch(ids, kRows, length, ids);
  const PassWork work = session.count(batch, true);
  session.start_training(batch, v.compute);
  reset_peak_memory();
  const int64_t lasting = memory_use_total().live_bytes;
  const GpuClocks clocks(state);
  for (auto _ : state) {
    session.train_step(batch, v.compute, passes);
    wait_for_device(default_device());
  }
  const int64_t tokens = kRows * length;
  report(state, v, fmt::format("step_{}", tokens * passes), tokens * passes,
         work.step_flop() * static_cast<double>(passes), 0);
  state.counters["activations_KiB/token"] =
      static_cast<double>(memory_use_total().peak_bytes - lasting) / 1024 / static_cast<double>(tokens);
}

enum class Clock : uint8_t { kOfBenchmark, kOfBody };  // kOfBody: it sets the time of an iteration itself
void add(const Variant& v, const std::string& phase, const std::function<void(benchmark::State&)>& body,
         Clock clock = Clock::kOfBenchmark) {
  const std::string name =
      fmt::format("model/{}/{}/{}/{}", v.shape, kKindNames[static_cast<int>(v.kind)], v.numbers, phase);
  auto* const added = benchmark::RegisterBenchmark(name.c_str(), body)->Unit(benchmark::kMillisecond);
  clock == Clock::kOfBody ? added->UseManualTime() : added->UseRealTime();
}

// The same with base-once off.
std::function<void(benchmark::State&)> per_slot(const std::function<void(benchmark::State&)>& body) {
  return [body](benchmark::State& state) {
    const MoeExecutionScope scope({.base_once = false});
    body(state);
  };
}

void add_inference(const Variant& v) {
  add(v, "prefill", [v](benchmark::State& s) { prefill(s, v, true); });
  add(v, "prefill_last", [v](benchmark::State& s) { prefill(s, v, false); });
  if (is_for_gpu()) add(v, "prefill_2048", [v](benchmark::State& s) { prefill(s, v, true, 2048); });
  add(v, "decode", [v](benchmark::State& s) { decode(s, v); });
  for (const int64_t sequences : {1, 8, 32}) {
    const std::string phase = fmt::format("generate_{}", sequences);
    const auto body = [v, sequences](benchmark::State& s) { generate_batch(s, v, sequences); };
    add(v, phase, body, Clock::kOfBody);
    if (v.kind == ModelKind::kLightMoe50) add(v, phase + "_per_slot", per_slot(body), Clock::kOfBody);
  }
  if (v.kind == ModelKind::kLightMoe50) {
    add(v, "prefill_per_slot", per_slot([v](benchmark::State& s) { prefill(s, v, true); }));
  }
}

void add_steps(const Variant& v) {
  const std::string name = v.kind == ModelKind::kOriginal   ? "train_step"
                           : v.kind == ModelKind::kRecovery ? "recovery_step"
                                                            : "recovery_annealing";
  add(v, name, [v](benchmark::State& s) { train_step(s, v); });
  if (is_for_gpu()) add(v, name + "_64k", [v](benchmark::State& s) { train_step(s, v, 1024, 16); });
}

using Numbers = std::pair<const char*, GemmCompute>;
// Kinds outside, so that a model in memory serves all that is measured on it before it is changed; steps last, as a process that has trained
// does not give all of its memory back.
void add_model(const std::string& shape, DType weights, const std::vector<Numbers>& numbers,
               const std::vector<ModelKind>& kinds) {
  for (const ModelKind kind : kinds) {
    for (const auto& [name, compute] : numbers) add_inference({shape, name, weights, compute, kind});
  }
  if (shape == "olmoe-1b-7b" && !is_for_gpu()) return;
  for (const ModelKind kind : {ModelKind::kOriginal, ModelKind::kRecovery, ModelKind::kAnnealing}) {
    for (const auto& [name, compute] : numbers) add_steps({shape, name, weights, compute, kind});
  }
}

const bool registered = [] {
  for (const char* const shape : {"tiny", "mid", "olmoe-1b-7b"}) {
    if (shape != std::string_view("olmoe-1b-7b")) {
      add_model(shape, DType::kF32, {{"f32", GemmCompute::kF32}, {"bf16_products", GemmCompute::kBF16}},
                {ModelKind::kOriginal, ModelKind::kLightMoe50});
    }
    add_model(shape, DType::kBF16, {{"bf16", GemmCompute::kBF16}},
              {ModelKind::kOriginal, ModelKind::kLightMoe30, ModelKind::kLightMoe40, ModelKind::kLightMoe50});
  }
  return true;
}();

}  // namespace
}  // namespace lightmoe::bench
