// How cost grows: time and peak activation memory of a forward pass and of forward plus backward, against sequence length,
// number of experts, and batch, each with the others fixed. Shape: tiny (hidden 256, 4 layers, top-4, inter 128).
//   scaling/<forward|train>/S:128 .. S:4096 (batch 1)   /E:8 .. E:64 (4 x 256)   /B:1 .. B:16 (S 256)

#include <benchmark/benchmark.h>

#include <functional>

#include "model/olmoe.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

struct Point {
  int64_t rows = 4, length = 256, experts = 16;
};

void measure(benchmark::State& state, const Point& point, bool train) {
  OlmoeConfig config = named_config("tiny").value();
  config.num_experts = point.experts;
  config.max_position_embeddings = 4096;
  const std::unique_ptr<Olmoe> model = random_model(config, DType::kF32, 1);
  Philox random(9, 5);
  std::vector<int32_t> ids(static_cast<size_t>(point.rows * point.length));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(static_cast<uint64_t>(config.vocab_size)));
  const Batch batch = make_batch(ids, point.rows, point.length, ids);
  const auto pass = [&] {
    if (train) {
      model->forward_backward(batch, {.loss_scale = 1.0 / static_cast<double>(ids.size())});
    } else {
      benchmark::DoNotOptimize(model->forward(batch, {}).raw());
    }
  };
  pass();
  reset_peak_memory();
  for (auto _ : state) pass();
  const double tokens = static_cast<double>(ids.size());
  state.counters["tokens/s"] = benchmark::Counter(tokens, benchmark::Counter::kIsIterationInvariantRate);
  state.counters["activations_KiB/token"] =
      static_cast<double>(memory_use(MemoryCategory::kActivations).peak_bytes) / 1024 / tokens;
  state.counters["peak_MiB"] = static_cast<double>(memory_use_total().peak_bytes) / 1048576;
}

void add(const std::string& axis, const Point& point) {
  for (const bool train : {false, true}) {
    benchmark::RegisterBenchmark(("scaling/" + std::string(train ? "train/" : "forward/") + axis).c_str(),
                                 [point, train](benchmark::State& state) { measure(state, point, train); })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

const bool registered = [] {
  for (int64_t s = 128; s <= 4096; s *= 2) add("S:" + std::to_string(s), {.rows = 1, .length = s});
  for (int64_t e = 8; e <= 64; e *= 2) add("E:" + std::to_string(e), {.experts = e});
  for (int64_t b = 1; b <= 16; b *= 2) add("B:" + std::to_string(b), {.rows = b});
  return true;
}();

}  // namespace
}  // namespace lightmoe
