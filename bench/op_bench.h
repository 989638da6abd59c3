#pragma once
// One benchmark per op, type and shape: op/NAME/TYPE/SHAPE. Counters: GB/s of the tensors the contract says are moved, GFLOP/s where
// the op counts them, and best_* of the fastest iteration, for machines that are not idle. On the device that LIGHTMOE_BENCH_DEVICE
// names; times on a GPU are of 20 calls in a row.

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <chrono>
#include <functional>
#include <limits>
#include <string>

#include "runtime/device.h"
#include "runtime/philox.h"
#include "runtime/tensor.h"

namespace lightmoe::bench {

struct Work {
  double bytes = 0, flops = 0;
  std::function<void()> run;  // owns its tensors
};

// Launches on a GPU return at once: this many are timed together, and the last is waited for.
inline int calls_per_iteration() { return default_device() == DeviceKind::kCuda ? 20 : 1; }
inline void wait_for_device() {
  lightmoe::wait_for_device(default_device());
}

// `make` is called when the benchmark runs, so that only the shapes in use take memory.
inline void add(const std::string& name, std::function<Work()> make) {
  const auto measure = [make = std::move(make)](benchmark::State& state) {
    const Work work = make();
    work.run();
    wait_for_device();
    const int calls = calls_per_iteration();
    double best = std::numeric_limits<double>::infinity();
    for (auto _ : state) {
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < calls; ++i) work.run();
      wait_for_device();
      best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls);
    }
    const auto rate = [&](const char* counter, double amount) {
      if (amount == 0) return;
      state.counters[counter] =
          benchmark::Counter(amount * calls * 1e-9, benchmark::Counter::kIsIterationInvariantRate);
      state.counters[std::string("best_") + counter] = benchmark::Counter(amount * 1e-9 / best);
    };
    rate("GB/s", work.bytes);
    rate("GFLOP/s", work.flops);
  };
  benchmark::RegisterBenchmark(name.c_str(), measure)->UseRealTime()->Unit(benchmark::kMicrosecond);
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
