#include "kernels/combine.h"

#include "kernels/access.h"
#include "kernels/device/reduce.h"
#include "kernels/device/rows.h"
#include "kernels/device/stable_order.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

// y[v,:] = sum of gates[index[p]] (1 without gates) times x[p,:] over the pairs p = order[begins[v]] .. of visit v. Pairs of no visit
// or without gate (-1: rows behind a plan's real ones) do not count, here and below.
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads)
    sum_over_pairs_kernel(const T* x, const float* gates, const int* index, const int* order, const int* begins, T* y,
                          int n, bool aligned) {
  constexpr int kV = kVector<T>;
  const auto row = [&](int64_t at) { return gates != nullptr && index[order[at]] < 0 ? -1 : order[at]; };
  const auto weight = [&](int64_t at) { return gates != nullptr ? gates[index[order[at]]] : 1.0f; };
  const int begin = begins[blockIdx.x], end = begins[blockIdx.x + 1];
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    Floats<kV> sum{};
    add_rows(sum, x, begin, end, row, weight, i, n, aligned);
    store_floats(y + static_cast<int64_t>(blockIdx.x) * n, i, n, aligned, sum);
  }
}

struct GatedSumGradient {
  const float* gates;
  const int *index, *visit;
  float* dgates;  // or null
  bool accumulate_da, accumulate_dgates;
};

// One pair. da may be null.
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads)
    gated_sum_backward_kernel(const T* a, const T* ds, T* da, GatedSumGradient op, int n, bool aligned) {
  constexpr int kV = kVector<T>;
  auto& scratch = shared_memory<BlockScratch<>>();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * n;
  const int at = op.index[blockIdx.x], visit = op.visit[blockIdx.x];
  if (at < 0 || visit < 0) return;
  const T* gradient = ds + static_cast<int64_t>(visit) * n;
  const float gate = op.gates[at];
  float dot = 0;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    const auto g = load_floats<kV>(gradient, i, n, aligned);
    if (op.dgates != nullptr) {
      const auto v = load_floats<kV>(a + row, i, n, aligned);
#pragma unroll
      for (int k = 0; k < kV; ++k) dot += v[k] * g[k];
    }
    if (da == nullptr) continue;
    Floats<kV> out{};
    if (op.accumulate_da) out = load_floats<kV>(da + row, i, n, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) out[k] += gate * g[k];
    store_floats(da + row, i, n, aligned, out);
  }
  if (op.dgates == nullptr) return;
  dot = block_sum(dot, scratch);
  if (threadIdx.x == 0) op.dgates[at] = op.accumulate_dgates ? op.dgates[at] + dot : dot;
}

// y[p,:] = x[visit[p],:] in units of 16 bytes or of one element.
template <class Unit>
__global__ void __launch_bounds__(kMaxRowThreads) expand_kernel(const Unit* x, const int* visit, Unit* y, int n) {
  if (visit[blockIdx.x] < 0) return;
  const Unit* from = x + static_cast<int64_t>(visit[blockIdx.x]) * n;
  Unit* to = y + static_cast<int64_t>(blockIdx.x) * n;
  for (int i = first_column<1>(); i < n; i += column_step<1>()) to[i] = from[i];
}

// One token. scales may be null.
template <class T>
__global__ void __launch_bounds__(kMaxRowThreads)
    combine_kernel(const T* x, const int* index, const float* scales, T* y, int terms, int n, bool accumulate,
                   bool aligned) {
  constexpr int kV = kVector<T>;
  const auto row = [&](int64_t j) { return index[j]; };
  const auto weight = [&](int64_t j) { return scales != nullptr ? scales[j] : 1.0f; };
  const int64_t first = static_cast<int64_t>(blockIdx.x) * terms;
  T* out = y + static_cast<int64_t>(blockIdx.x) * n;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    Floats<kV> sum{};
    if (accumulate) sum = load_floats<kV>(out, i, n, aligned);
    add_rows(sum, x, first, first + terms, row, weight, i, n, aligned);
    store_floats(out, i, n, aligned, sum);
  }
}

template <class T>
void sum_over_pairs(const Tensor& rows, const float* gates, const int* index, const Tensor& visit, const Tensor& sums) {
  const int n = static_cast<int>(sums.dim(1));
  const Tensor order = stable_order(visit, sums.dim(0)), begins = group_begins(visit, order, sums.dim(0));
  const T* x = rows.data<T>();
  T* y = sums.data<T>();
  launch<sum_over_pairs_kernel<T>>({.blocks = {uint32_t(sums.dim(0))}, .threads = {row_threads(n, kVector<T>)}}, x,
                                   gates, index, order.data<int32_t>(), begins.data<int32_t>(), y, n,
                                   aligned_rows(n, x, y));
}

void gated_sum_device(const GatedSum& op) {
  visit_device_floating("gated_sum", op.a.dtype(), [&]<class T>() {
    sum_over_pairs<T>(op.a, op.gates.data<float>(), op.pair_index.data<int32_t>(), op.pair_visit, op.s);
  });
}
void sum_pairs_device(const SumPairs& op) {
  visit_device_floating("sum_pairs", op.x.dtype(),
                        [&]<class T>() { sum_over_pairs<T>(op.x, nullptr, nullptr, op.pair_visit, op.y); });
}

void gated_sum_backward_device(const GatedSumBackward& op) {
  visit_device_floating("gated_sum_backward", op.a.dtype(), [&]<class T>() {
    const int n = static_cast<int>(op.a.dim(1));
    const T *a = op.a.data<T>(), *ds = op.ds.data<T>();
    T* da = op.da.defined() ? op.da.data<T>() : nullptr;
    const GatedSumGradient rest{.gates = op.gates.data<float>(),
                                .index = op.pair_index.data<int32_t>(),
                                .visit = op.pair_visit.data<int32_t>(),
                                .dgates = op.dgates.defined() ? op.dgates.data<float>() : nullptr,
                                .accumulate_da = op.accumulate_da,
                                .accumulate_dgates = op.accumulate_dgates};
    launch<gated_sum_backward_kernel<T>>({.blocks = {uint32_t(op.a.dim(0))},
                                          .threads = {row_threads(n, kVector<T>)},
                                          .shared_bytes = sizeof(BlockScratch<>)},
                                         a, ds, da, rest, n, aligned_rows(n, a, ds, da));
  });
}

template <class Unit>
void expand(const ExpandPairs& op, int64_t units) {
  launch<expand_kernel<Unit>>({.blocks = {uint32_t(op.y.dim(0))}, .threads = {row_threads(units, 1)}},
                              static_cast<const Unit*>(op.x.raw()), op.pair_visit.data<int32_t>(),
                              static_cast<Unit*>(op.y.raw()), static_cast<int>(units));
}
void expand_pairs_device(const ExpandPairs& op) {
  const int64_t row_bytes = op.x.dim(1) * static_cast<int64_t>(size_of(op.x.dtype()));
  const auto *x = static_cast<const uint8_t*>(op.x.raw()), *y = static_cast<const uint8_t*>(op.y.raw());
  if (aligned_rows(row_bytes, x, y)) return expand<Bytes16>(op, row_bytes / 16);
  if (row_bytes % 4 == 0) return expand<uint32_t>(op, row_bytes / 4);
  expand<uint16_t>(op, row_bytes / 2);
}

void combine_device(const Combine& op) {
  visit_device_floating("combine", op.y.dtype(), [&]<class T>() {
    const int n = static_cast<int>(op.y.dim(1));
    const T* x = op.x.data<T>();
    T* y = op.y.data<T>();
    launch<combine_kernel<T>>({.blocks = {uint32_t(op.y.dim(0))}, .threads = {row_threads(n, kVector<T>)}}, x,
                              op.index.data<int32_t>(), op.scales.defined() ? op.scales.data<float>() : nullptr, y,
                              static_cast<int>(op.index.dim(1)), n, op.accumulate, aligned_rows(n, x, y));
  });
}

const RegisterKernel<GatedSum> register_gated_sum{kDevice, &gated_sum_device};
const RegisterKernel<GatedSumBackward> register_gated_sum_backward{kDevice, &gated_sum_backward_device};
const RegisterKernel<SumPairs> register_sum_pairs{kDevice, &sum_pairs_device};
const RegisterKernel<ExpandPairs> register_expand_pairs{kDevice, &expand_pairs_device};
const RegisterKernel<Combine> register_combine{kDevice, &combine_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
