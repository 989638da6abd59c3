#pragma once
// One benchmark per op, type and shape: op/NAME/TYPE/SHAPE. Counters: GB/s of the tensors the contract says are moved, GFLOP/s where
// the op counts them, best_* of the fastest iteration, for machines that are not idle, the median and the 10th and 90th percentile of the
// iterations' times, and on a GPU of_copy, the share of the bandwidth of a large copy in the same process, and its clocks. On the device that LIGHTMOE_BENCH_DEVICE names.

#include <benchmark/benchmark.h>
#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "bench/ceilings.h"
#include "bench/gpu_clocks.h"
#include "runtime/device.h"
#include "runtime/device_timer.h"
#include "runtime/philox.h"
#include "runtime/tensor.h"

namespace lightmoe::bench {

struct Work {
  double bytes = 0, flops = 0;
  std::function<void()> run;  // owns its tensors
};

inline void wait_for_device() { lightmoe::wait_for_device(default_device()); }

// Writes more than any cache holds, so that what is timed next finds its operands in memory.
inline void flush_caches() {
  static const Tensor memory = Tensor::empty({int64_t{256} << 20}, DType::kU8);
  memory.fill_zero();
}

// Nearest rank: percentile 50 of three values is the second.
inline double percentile(std::vector<double> values, double percent) {
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<int64_t>(std::ceil(percent / 100 * static_cast<double>(values.size())));
  return values.at(static_cast<size_t>(std::max<int64_t>(rank, 1) - 1));
}

inline void report_spread(benchmark::State& state, const std::vector<double>& seconds) {
  state.counters["median_us"] = percentile(seconds, 50) * 1e6;
  state.counters["p10_us"] = percentile(seconds, 10) * 1e6;
  state.counters["p90_us"] = percentile(seconds, 90) * 1e6;
}

// One call at a time, timed on the device. On a GPU with its L2 flushed before, unless hot.
inline void measure(benchmark::State& state, const Work& work, bool hot) {
  work.run();
  DeviceTimer timer(default_device());
  std::vector<double> times;
  const GpuClocks clocks(state);
  for (auto _ : state) {
    if (default_device() == DeviceKind::kCuda && !hot) flush_caches();
    timer.start();
    work.run();
    const double seconds = timer.stop_us() * 1e-6;
    state.SetIterationTime(seconds);
    times.push_back(seconds);
  }
  report_spread(state, times);
  const double best = percentile(times, 0);
  const auto rate = [&](const char* counter, double amount) {
    if (amount == 0) return;
    state.counters[counter] = benchmark::Counter(amount * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
    state.counters[std::string("best_") + counter] = benchmark::Counter(amount * 1e-9 / best);
  };
  rate("GB/s", work.bytes);
  rate("GFLOP/s", work.flops);
  if (default_device() == DeviceKind::kCuda && work.bytes > 0) {
    state.counters["of_copy"] = benchmark::Counter(work.bytes / best / measured_ceilings().copy_bytes);
  }
}

// Set before any benchmark registers.
inline bool is_for_gpu() {
  const char* device = std::getenv("LIGHTMOE_BENCH_DEVICE");
  return device != nullptr && std::string_view(device) == "cuda";
}

// `make` is called when the benchmark runs, so that only the shapes in use take memory. On a GPU each stands twice: cold, and hot.
inline void add(const std::string& name, const std::function<Work()>& make) {
  const auto add_one = [&](const std::string& full_name, bool hot) {
    const auto body = [make, hot](benchmark::State& state) { measure(state, make(), hot); };
    benchmark::RegisterBenchmark(full_name.c_str(), body)->UseManualTime()->Unit(benchmark::kMicrosecond);
  };
  add_one(name, false);
  if (is_for_gpu()) add_one(name + "/hot", true);
}

// Cheap values in [-0.5, 0.5).
inline Tensor random(const Shape& shape, DType dtype) {
  const Tensor values = Tensor::empty(shape, DType::kF32, DeviceKind::kCpu);
  Philox source(static_cast<uint64_t>(shape.numel()));
  for (int64_t i = 0; i < values.numel(); ++i)
    values.data<float>()[i] = static_cast<float>(source.next_u32()) * 0x1p-32f - 0.5f;
  return values.to(dtype).on(default_device());
}

inline Tensor random_ids(const Shape& shape, int64_t limit) {
  const Tensor ids = Tensor::empty(shape, DType::kI32, DeviceKind::kCpu);
  Philox source(static_cast<uint64_t>(shape.numel()) + 1);
  for (int64_t i = 0; i < ids.numel(); ++i) {
    ids.data<int32_t>()[i] = static_cast<int32_t>(source.below(static_cast<uint64_t>(limit)));
  }
  return ids.on(default_device());
}

inline double bytes_of(std::initializer_list<Tensor> tensors) {
  double sum = 0;
  for (const Tensor& t : tensors) sum += static_cast<double>(t.bytes());
  return sum;
}

// Registers from a static initialiser: const bool registered = bench::registered([] { ... });
inline bool registered(const std::function<void()>& all) {
  all();
  return true;
}

inline constexpr DType kStorageTypes[] = {DType::kF32, DType::kBF16};

}  // namespace lightmoe::bench
