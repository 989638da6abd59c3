#pragma once
// y[t,:] = table[ids[t],:];  backward: dtable[ids[t],:] += dy[t,:], duplicates summed in order of t.
// shapes: ids i32 [T], table [V,D], y, dy [T,D], dtable [V,D].   Hugging Face nn.Embedding.
// dtypes: table f32/bf16/f64, y the same or f32 from a bf16 table; dtable of dy's type or f32.  ids in [0,V): checked, Error(kInput); on a
//   GPU, whose ids the host does not read, a wrong one stops the kernel: check them where they come in.
// writes: y with '=', dtable with '+=' (on a GPU an id's rows are added up in f32 first and rounded once).  Deterministic.

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

struct Embedding {
  Tensor ids, table;
  Tensor y;
};
struct EmbeddingBackward {
  Tensor ids, dy;
  Tensor dtable;
};
void run(const Embedding& op);
void run(const EmbeddingBackward& op);

}  // namespace lightmoe
