#include "compress/adapter.h"

#include <cmath>

#include "compress/svd.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

uint64_t stream_of(const AdapterSite& site, bool b) {
  const auto layer = static_cast<uint64_t>(site.layer), slot = static_cast<uint64_t>(site.slot);
  return 0xada0000000000000u + (layer << 24) + (slot << 4) + static_cast<uint64_t>(site.matrix) * 2 + (b ? 1 : 0);
}

}  // namespace

AdapterFactors gaussian_factors(const AdapterSite& site, double stddev, uint64_t seed) {
  const DeviceScope host(DeviceKind::kCpu);
  AdapterFactors f{.a = Tensor::empty({site.rank, site.in}, DType::kF32),
                   .b = Tensor::zeros({site.out, site.rank}, DType::kF32)};
  const double sigma = stddev > 0 ? stddev : 1 / std::sqrt(3.0 * static_cast<double>(site.in));
  fill_normal(f.a.data<float>(), f.a.numel(), static_cast<float>(sigma), seed, stream_of(site, false));
  if (site.zero_base && site.matrix != ExpertMatrix::kDown) {
    const auto spread = static_cast<float>(1 / std::sqrt(static_cast<double>(site.rank)));
    fill_normal(f.b.data<float>(), f.b.numel(), spread, seed, stream_of(site, true));
  }
  return f;
}

AdapterFactors svd_factors(const AdapterSite& site, const Tensor& residual, uint64_t seed) {
  const LowRank best = best_low_rank(residual, site.rank, philox(seed, stream_of(site, false), 0)[0]);
  return {.a = best.a.to(DType::kF32), .b = best.b.to(DType::kF32)};
}

}  // namespace lightmoe
