#pragma once
// The MoE layer as a slot table. The router picks among E slots; what a slot computes is data:
//   expert    a stored expert of the layer's bank, plus an optional low-rank adapter of its own
//   constant  a stored vector [D] times the gate
//   latent    matrices are private factors times a projection that a group shares, or that is mixed from what the layer shares
//             (struct Latent); the down matrix may be stored whole
//   removed   masked before the router's softmax
// Two rules of execution, exact in real arithmetic:
//   1. A stored expert runs once per token. For the chosen slots s of a token that point to expert e, with adapters (A, B):
//        h0 = W_gu x (once);  h_s = h0 + [B_g A_g x | B_u A_u x];  a_s = SwiGLU(h_s);  z = sum_s g_s a_s
//        y += W_d z (once) + sum_s B_d (A_d g_s a_s)
//      slots without adapter share a_s, so their gates add up.
//   2. Memory is what is stored: bytes are counted from the bank, never from the slot count.
//   A latent slot's shared projection is computed once per token and group; a mixed one is made again in every pass, never stored.
//   An expert may also be in the banks of several layers
//   (the same parameters): it is stored once.
// Backward (performance of both halves alike): dz = W_d^T dy once;  da_s = g_s (dz + A_d^T B_d^T dy);
//   dg_s = <dz, a_s> + <B_d^T dy, A_d a_s>;  dh0 = sum_s dh_s, so dX and dW_gu of a shared expert once;  dW_d = dy z^T once.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "autograd/parameter.h"

namespace lightmoe {

enum class SlotKind : uint8_t { kExpert, kConstant, kLatent, kRemoved };

struct Slot {
  SlotKind kind = SlotKind::kExpert;
  int32_t expert = -1;    // index into MoeLayer::experts
  int32_t adapter = -1;   // index into MoeLayer::adapters, -1 = none
  int32_t constant = -1;  // row of MoeLayer::constants
  int32_t latent = -1;    // index into MoeLayer::latents
};

// SwiGLU expert: f(x) = W_d (silu(W_g x) * (W_u x)).  gate_up [2F,D] (gate rows first), down [D,F].
// F may differ from expert to expert (units removed inside them, model/moe_widths.h); an adapter has the F of its slots' expert, or more:
// then the expert counts as zero in the units beyond its own, which the adapter's low-rank terms alone make.
// On disk gate and up are separate Hugging Face tensors (names and slot table on disk: model/slot_table.h).
// An entry whose matrices are null is W = 0: not stored, not computed, its slots give their adapter alone (h0 = 0, W_d z = 0).
struct Expert {
  ParameterPtr gate_up, down;
};

// Low-rank terms of one slot: W_m + B_m A_m for m in gate, up, down. a_gate_up [2R,D] holds A_gate then A_up.
struct Adapter {
  ParameterPtr a_gate_up, b_gate, b_up, a_down, b_down;  // [2R,D] [F,R] [F,R] [R,F] [D,R]
  int64_t rank() const { return b_gate->value.dim(1); }
};

// What the latents of a layer share, M rows per matrix, gate over up. Of rank K (all of a layer alike): B = [I; left] rows [M,D], which
// stores the K rows that the identity picks, rows [K,D], and left [M-K,K].
struct Projection {
  ParameterPtr gate_up, down;  // [2M,D] [M,D], of rank K [2K,D] [K,D]; down null where latents store theirs whole
  ParameterPtr left_gate_up, left_down;  // [2(M-K),K] [M-K,K], null where B is stored as it is
};

// W_gate = A_gate P_gate, W_up = A_up P_up, W_down = (A_down P_down)^T, P [M,D] of what the layer shares:
//   plain   P = B_j of one projection (MoLAE, arXiv 2503.23100)
//   mixed   P = silu(sum_j mix_j B_j) over all projections, coefficients of each matrix its own (MoBE, arXiv 2508.05257)
struct Latent {
  ParameterPtr a_gate, a_up;  // [F,M]
  ParameterPtr down, a_down;  // [D,F] or [F,M], the other null
  ParameterPtr mix;           // [2,n] gate, up or [3,n] gate, up, down; null: plain
  int32_t projection = -1;    // plain: index into MoeLayer::projections
};

// Annealing of one slot (arXiv 2603.12645 eq. 8): while beta > 0 it runs as beta W_original + (1-beta) W_base + B A.
struct AnnealedSlot {
  int32_t slot = -1;
  Expert original;  // frozen
};

class MoeExtension;

struct MoeLayer {
  ParameterPtr router;          // [E,D] mlp.gate.weight
  std::vector<Slot> slots;      // E
  std::vector<Expert> experts;  // the bank: kept experts and bases
  std::vector<Adapter> adapters;
  ParameterPtr constants;               // [C,D] mlp.constants, null without constant slots
  std::vector<Projection> projections;  // n, one M for the layer
  std::vector<Latent> latents;          // all of one form
  std::vector<AnnealedSlot> annealed;   // empty when beta is 0 or nothing anneals
  double beta = 0;
  std::shared_ptr<MoeExtension> extension;  // model/moe_extension.h, null in most models

  int64_t num_slots() const { return static_cast<int64_t>(slots.size()); }
  bool is_plain() const;  // slot i owns expert i, no adapters, no extension: stock OLMoE
  std::vector<ParameterPtr> parameters()
      const;  // router, experts, constants, latents, adapters, extension (annealed originals are not parameters)
  int64_t stored_bytes() const;  // experts that other layers have as well count here too
};

// Whether every slot is removed or points to a stored expert that no other slot of the layer points to, without an adapter.
bool owns_its_experts(const MoeLayer& layer);

}  // namespace lightmoe
