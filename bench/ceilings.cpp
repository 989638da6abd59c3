#include "bench/ceilings.h"

#include <algorithm>
#include <functional>
#include <set>

#include "kernels/gemm.h"
#include "kernels/simd.h"
#include "runtime/device.h"
#include "runtime/device_timer.h"
#include "runtime/parallel.h"
#include "runtime/philox.h"

namespace lightmoe::bench {
namespace {

double best_seconds(double budget, const std::function<void()>& f) {
  DeviceTimer timer(default_device());
  f();
  double best = 1e30, total = 0;
  while (total < budget) {
    timer.start();
    f();
    const double seconds = timer.stop_us() * 1e-6;
    best = std::min(best, seconds), total += seconds;
  }
  return best;
}

Tensor normal(int64_t n, uint64_t stream) {
  const Tensor host = Tensor::empty({n, n}, DType::kF32, DeviceKind::kCpu);
  fill_normal(host.data<float>(), host.numel(), 1, 1, stream);
  return host.on(default_device());
}

// Of the backends that take it; on a GPU factors are stored in bf16 for products in bf16.
double product_rate(GemmCompute compute) {
  const DeviceKind device = default_device();
  const int64_t n = device == DeviceKind::kCuda ? 8192 : device == DeviceKind::kSim ? 64 : 2048;
  const DType stored = device == DeviceKind::kCpu || compute == GemmCompute::kF32 ? DType::kF32 : DType::kBF16;
  const Gemm op{.a = normal(n, 1).to(stored),
                .b = normal(n, 2).to(stored),
                .c = Tensor::zeros({n, n}, stored),
                .trans_b = true,
                .compute = compute};
  double best = 1e30;
  std::set<std::string_view> tried = {"reference", "simple"};  // never the fastest
  for (const GemmBackend& backend : gemm_backends()) {
    if (!backend.supports(describe(op)) || !tried.insert(backend.name).second) continue;
    const GemmBackendScope scope(backend.name);
    best = std::min(best, best_seconds(0.8, [&] { run(op); }));
  }
  return 2.0 * static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n) / best;
}

double copy_rate() {
  const int64_t count = default_device() == DeviceKind::kSim ? 4096 : int64_t{1} << 27;  // 512 MiB each
  const Tensor from = Tensor::zeros({count}, DType::kF32), to = Tensor::zeros({count}, DType::kF32);
  const bool on_cpu = default_device() == DeviceKind::kCpu;
  const double seconds = best_seconds(1, [&] {
    if (!on_cpu) return to.copy_from(from);
    parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) {
      std::copy(from.data<float>() + begin, from.data<float>() + end, to.data<float>() + begin);
    });
  });
  return 2 * static_cast<double>(from.bytes()) / seconds;
}

double read_rate() {
  constexpr int64_t kBlock = 4096, kBlocks = (int64_t{512} << 20) / 4 / kBlock;
  const Tensor memory = Tensor::zeros({kBlocks * kBlock}, DType::kF32);
  const float* data = memory.data<float>();
  volatile double sink = 0;
  const double seconds = best_seconds(2, [&] {
    double total = 0;
#pragma omp parallel for reduction(+ : total)
    for (int64_t block = 0; block < kBlocks; ++block) {
      Vec<float> sum[4] = {};
      for (int64_t i = 0; i < kBlock; i += 4 * kLanes<float>) {
        for (int64_t v = 0; v < 4; ++v) sum[v] += load_vec(data + block * kBlock + i + v * kLanes<float>);
      }
      total += sum_lanes<float>(sum[0] + sum[1] + sum[2] + sum[3]);
    }
    sink = total;
  });
  return static_cast<double>(memory.bytes()) / seconds;
}

}  // namespace

const Ceilings& measured_ceilings() {
  static const Ceilings ceilings = [] {
    Ceilings c{.f32_flop = product_rate(GemmCompute::kF32),
               .bf16_flop = product_rate(GemmCompute::kBF16),
               .copy_bytes = copy_rate()};
    c.read_bytes = default_device() == DeviceKind::kCpu ? read_rate() : c.copy_bytes;
    return c;
  }();
  return ceilings;
}

}  // namespace lightmoe::bench
