#pragma once
// a = silu(h_g) * h_u, h = [h_g | h_u], silu(z) = z / (1 + e^-z)           Hugging Face OlmoeMLP: act_fn(gate_proj) * up_proj
// backward: dh_g = da h_u silu'(h_g), dh_u = da silu(h_g); a (if defined) is recomputed into the given tensor, bit for bit.
// shapes: h, dh [P,2F] (gate first), a, da [P,F].  dtypes: f32/bf16/f64, one type; computed in f32 (f64).
// writes: a, dh with '='.  aliasing: dh may be h; a may be da.  Deterministic.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct SwiGlu {
  Tensor h;
  Tensor a;
};
struct SwiGluBackward {
  Tensor h, da;
  Tensor dh, a;
};
void run(const SwiGlu& op);
void run(const SwiGluBackward& op);

}  // namespace lightmoe
