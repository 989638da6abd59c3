// What this machine can do at best, measured in the same run as everything else: the f32 and bf16 product of two large square
// matrices, and the bandwidth of reading and of copying memory larger than the caches. Model figures are read against these.

#include <benchmark/benchmark.h>

#include "bench/gpu_clocks.h"
#include "kernels/gemm.h"
#include "runtime/parallel.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

constexpr int64_t kSquare = 2048;
constexpr int64_t kMemoryBytes = int64_t{1} << 30;

void gemm_ceiling(benchmark::State& state, const char* backend, GemmCompute compute) {
  const Tensor a = Tensor::empty({kSquare, kSquare}, DType::kF32), b = Tensor::empty({kSquare, kSquare}, DType::kF32);
  const Tensor c = Tensor::zeros({kSquare, kSquare}, DType::kF32);
  fill_normal(a.data<float>(), a.numel(), 1, 1, 1);
  fill_normal(b.data<float>(), b.numel(), 1, 1, 2);
  force_gemm_backend(backend);
  const bench::GpuClocks clocks(state);
  for (auto _ : state) run(Gemm{.a = a, .b = b, .c = c, .trans_b = true, .compute = compute});
  force_gemm_backend("auto");
  state.counters["FLOP/s"] =
      benchmark::Counter(2.0 * kSquare * kSquare * kSquare, benchmark::Counter::kIsIterationInvariantRate);
}

void read_bandwidth(benchmark::State& state) {
  const Tensor memory = Tensor::zeros({kMemoryBytes / 4}, DType::kF32);
  const float* data = memory.data<float>();
  const bench::GpuClocks clocks(state);
  for (auto _ : state) {
    double total = 0;
#pragma omp parallel for reduction(+ : total)
    for (int64_t block = 0; block < memory.numel() / 4096; ++block) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < 4096; ++i) sum += data[block * 4096 + i];
      total += sum;
    }
    benchmark::DoNotOptimize(total);
  }
  state.SetBytesProcessed(state.iterations() * kMemoryBytes);
}

void copy_bandwidth(benchmark::State& state) {
  const Tensor from = Tensor::zeros({kMemoryBytes / 8}, DType::kF32),
               to = Tensor::zeros({kMemoryBytes / 8}, DType::kF32);
  const bench::GpuClocks clocks(state);
  for (auto _ : state) {
    parallel_for(0, from.numel(), 1 << 16, [&](int64_t begin, int64_t end) {
      std::copy(from.data<float>() + begin, from.data<float>() + end, to.data<float>() + begin);
    });
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * kMemoryBytes);  // read and written
}

BENCHMARK_CAPTURE(gemm_ceiling, blas_f32, "blas", GemmCompute::kF32)
    ->Name("ceiling/gemm/blas/f32")
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(gemm_ceiling, native_f32, "native", GemmCompute::kF32)
    ->Name("ceiling/gemm/native/f32")
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(gemm_ceiling, native_bf16, "native", GemmCompute::kBF16)
    ->Name("ceiling/gemm/native/bf16")
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK(read_bandwidth)->Name("ceiling/memory/read")->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(copy_bandwidth)->Name("ceiling/memory/copy")->UseRealTime()->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace lightmoe
