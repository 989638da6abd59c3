#pragma once
// MoE layers of every kind of slot, with random weights, and what they compute, in double, slot by slot and token by token.

#include <map>
#include <ostream>
#include <vector>

#include "model/moe.h"
#include "tests/support/testing.h"

namespace lightmoe::testing {

struct LayerSpec {
  const char* name = "";
  int64_t hidden = 12, width = 10;      // D, F
  std::vector<int32_t> expert_of_slot;  // -1 = removed, or one of the other kinds below
  std::vector<int64_t> rank_of_slot;    // 0 = no adapter; empty = none at all
  std::vector<int32_t> zero_experts;    // W = 0
  std::vector<int32_t> annealed_slots;
  double beta = 0;
  std::vector<int32_t> frozen_experts;
  std::vector<int32_t> constant_of_slot;    // row of the constants, -1 = not a constant; empty = none at all
  std::vector<int32_t> projection_of_slot;  // of a latent of the slot's own, -1 = not a latent; empty = none at all
  int64_t latent_size = 3;
  bool latent_down = false;  // down matrices are factors too
  int64_t mix_of = 0;  // latents mix this many projections (projection_of_slot then only says which slots are latents)
  int64_t projection_rank = 0;
  std::vector<int64_t> width_of_expert;  // of bank entries; empty = all F
  bool wide_adapters = false;            // adapters have F units whatever the expert has
};

inline void PrintTo(const LayerSpec& spec, std::ostream* out) { *out << spec.name; }

// dtype of all weights; trained_dtype of adapters and of experts that are not frozen.
MoeLayer make_layer(const LayerSpec& spec, DType dtype, DType trained_dtype, uint64_t seed);

// y = sum_k g_k f_slot(x) with every slot's matrices written out, and the gradients for a given dy.
struct DenseMoe {
  std::vector<double> y, dx, dgates;
  std::map<const Parameter*, std::vector<double>> gradients;  // trainable parameters only
  DenseMoe(const MoeLayer& layer, const Tensor& x, const Tensor& slots, const Tensor& gates, const Tensor& dy);
};

// [T,K] distinct slots a token, drawn from `allowed`.
Tensor random_slots(int64_t tokens, int64_t top_k, const std::vector<int32_t>& allowed, uint64_t seed);

}  // namespace lightmoe::testing
