#include "model/unit_blocks.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "runtime/parallel.h"

namespace lightmoe {
namespace {

// |W_d[:,j]| of every unit of every expert, [experts][F].
std::vector<std::vector<double>> unit_lengths(const MoeLayer& layer) {
  std::vector<std::vector<double>> lengths(layer.experts.size());
  parallel_items(std::ssize(lengths), [&](int64_t e) {
    const Tensor w = layer.experts[static_cast<size_t>(e)].down->value.to(DType::kF64);
    std::vector<double>& of = lengths[static_cast<size_t>(e)];
    of.assign(static_cast<size_t>(w.dim(1)), 0.0);
    for (int64_t i = 0; i < w.dim(0); ++i) {
      for (size_t j = 0; j < of.size(); ++j) of[j] += std::pow(w.row(i).data<double>()[j], 2);
    }
    for (double& v : of) v = std::sqrt(v);
  });
  return lengths;
}

template <class T>
void contributions(const MoeLayer& layer, const Tensor& a, const Tensor& slots, const Tensor& out) {
  const std::vector<std::vector<double>> lengths = unit_lengths(layer);
  const int64_t f = a.dim(1), n = out.dim(1), units = f / n;
  for (int64_t c = 0; c < a.dim(0); ++c) {
    const int32_t slot = slots.data<int32_t>()[c];
    if (slot >= layer.num_slots()) continue;
    const std::vector<double>& length = lengths[static_cast<size_t>(layer.slots[static_cast<size_t>(slot)].expert)];
    for (int64_t b = 0; b < n; ++b) {
      double sum = 0;
      for (int64_t j = b * units; j < (b + 1) * units; ++j)
        sum += std::abs(static_cast<double>(a.data<T>()[c * f + j])) * length[static_cast<size_t>(j)];
      out.data<T>()[c * n + b] = static_cast<T>(sum);
    }
  }
}

template <class T>
void largest_to_one(const Tensor& scores, int64_t keep, const Tensor& out) {
  const int64_t n = scores.dim(1);
  std::vector<int32_t> order(static_cast<size_t>(n));
  for (int64_t c = 0; c < scores.dim(0); ++c) {
    const T* row = scores.data<T>() + c * n;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [row](int32_t x, int32_t y) { return row[x] > row[y]; });
    for (int64_t i = 0; i < keep; ++i) out.data<T>()[c * n + order[static_cast<size_t>(i)]] = 1;
  }
}

}  // namespace

Tensor block_contributions(const MoeLayer& layer, const Tensor& a, const Tensor& slots, int64_t blocks) {
  require(a.dim(0) == slots.numel() && a.dim(1) % blocks == 0, "block_contributions: a {}, {} choices, {} blocks",
          a.shape(), slots.numel(), blocks);
  const Tensor out = Tensor::zeros({a.dim(0), blocks}, a.dtype());
  a.dtype() == DType::kF64 ? contributions<double>(layer, a, slots, out) : contributions<float>(layer, a, slots, out);
  return out;
}

Tensor keep_largest(const Tensor& scores, int64_t keep) {
  require(keep >= 0 && keep <= scores.dim(1), "keep_largest: {} of {}", keep, scores.dim(1));
  const Tensor out = Tensor::zeros(scores.shape(), scores.dtype());
  scores.dtype() == DType::kF64 ? largest_to_one<double>(scores, keep, out) : largest_to_one<float>(scores, keep, out);
  return out;
}

}  // namespace lightmoe
