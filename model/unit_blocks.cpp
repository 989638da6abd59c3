#include "model/unit_blocks.h"

#include "kernels/activation.h"
#include "kernels/combine.h"
#include "kernels/contraction.h"
#include "kernels/softmax_top.h"

namespace lightmoe {
namespace {

void apply(Activation kind, const Tensor& x) { run(Activate{.kind = kind, .x = x, .y = x}); }

// |W_d[:,j]| of every unit of the expert that each slot points to, [E+1,F]; number E has zeros.
Tensor unit_lengths(const MoeLayer& layer, int64_t width, DType dtype) {
  const Tensor lengths = Tensor::zeros({layer.num_slots() + 1, width}, dtype);
  for (int64_t s = 0; s < layer.num_slots(); ++s) {
    const Slot& slot = layer.slots[static_cast<size_t>(s)];
    if (slot.kind == SlotKind::kRemoved) continue;
    const Tensor w = layer.experts[static_cast<size_t>(slot.expert)].down->value.to(dtype);
    const StridedView columns{w, {0, 0, 1}, width};
    run(Contraction{
        .shape = {1, 1, width}, .terms = w.dim(0), .a = columns, .b = columns, .y = flat(lengths.slice(s, s + 1))});
  }
  apply(Activation::kSqrt, lengths);
  return lengths;
}

}  // namespace

Tensor block_contributions(const MoeLayer& layer, const Tensor& a, const Tensor& slots, int64_t blocks) {
  require(a.dim(0) == slots.numel() && a.dim(1) % blocks == 0, "block_contributions: a {}, {} choices, {} blocks",
          a.shape(), slots.numel(), blocks);
  const int64_t choices = a.dim(0), width = a.dim(1), units = width / blocks;
  const DType dtype = a.dtype() == DType::kF64 ? DType::kF64 : DType::kF32;
  const Tensor sizes = a.to(dtype), lengths = Tensor::empty(a.shape(), dtype),
               out = Tensor::empty({choices, blocks}, dtype);
  apply(Activation::kAbs, sizes);
  run(ExpandPairs{.x = unit_lengths(layer, width, dtype), .pair_visit = slots.reshape({choices}), .y = lengths});
  run(Contraction{.shape = {choices, blocks, 1},
                  .terms = units,
                  .a = {sizes, {width, units, 0}, 1},
                  .b = {lengths, {width, units, 0}, 1},
                  .y = {out, {blocks, 1, 0}}});
  return out.to(a.dtype());
}

Tensor keep_largest(const Tensor& scores, int64_t keep) {
  const Tensor out = Tensor::empty(scores.shape(), scores.dtype());
  run(KeepLargest{.x = scores, .k = keep, .y = out});
  return out;
}

}  // namespace lightmoe
