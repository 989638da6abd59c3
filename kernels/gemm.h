#pragma once
// Matrix products behind one description, so that an implementation can be swapped by name.
//
//   Gemm          C = beta C + alpha op(A) op(B)                               A [M,K]  B [K,N]  C [M,N]
//   GroupedGemmM  for each group g and its rows i in [offsets[g], offsets[g+1]):
//                 C[i,:] = beta C[i,:] + alpha A[a_rows[i],:] op(B_g)          A [*,K]  C [R,N]   (experts forward, dX)
//   GroupedGemmK  C_g = beta C_g + alpha sum_{i in g} A[a_rows[i],:]^T B[b_rows[i],:]   C_g [M,N] (expert weight gradients)
// Hugging Face nn.Linear is y = x W^T with W [out,in]: trans_b = true.
// dtypes: A, B, C each f32 or bf16, or all f64. Accumulation f32 (f64 for f64). compute says in what
//   type the factors are multiplied: kF32, or kBF16 (both factors rounded to bf16, RNE, products
//   exact in f32); ignored for f64. beta = 0 writes C with '=' and never reads it (C may hold NaN).
// layout: row-major. A column window of a wider matrix is given by *_column: A has at least
//   a_column + K columns, C at least c_column + N; only the window is read or written.
// rows: a_rows / b_rows are i32 [R] gather indices, undefined = identity. Empty groups are legal: in
//   GroupedGemmK an empty group still applies beta (beta 0 writes zeros). Undefined B_g (or C_g in
//   GroupedGemmK) is allowed for groups to skip; a skipped group writes nothing.
//   In GroupedGemmK the same C_g may appear under several groups: contributions add in group order,
//   beta applies once, before the first of them.
// epilogue: what elements go through before they are stored, so that nothing as wide as the product is stored to be read again. With
//   p = alpha sum as above and the row's factor g_i = scales[scale_rows[i]] (scale_rows undefined: scales[i]; scales undefined: 1):
//     kNone            C = beta C + p
//     kScale           C = beta C + g_i p
//     kSwiGlu          p is h [R,2F], gate columns first (Hugging Face OlmoeMLP: act_fn(gate_proj) * up_proj; kernels/swiglu.h):
//                      activated[i,f] = g_i a, a = silu(h[i,f]) h[i,F+f];   C = h, unless undefined
//     kSwiGluBackward  p [R,F] is the gradient of a before its factor, h [R,2F] is given:
//                      C [R,2F] = dh of g_i p;   activated = g_i a and dots[scale_rows[i]] = <p[i,:], a[i,:]>, unless undefined
//   The last two have alpha 1, beta 0 and no window of C; kSwiGlu's B has its rows along K (trans_b). h, C and activated have one type and
//   a is computed from h as rounded to it; scales and dots f32 (f64). Rows of skipped groups are left alone. C may be h.
// aliasing: C overlaps neither A nor B. Deterministic: the same inputs give the same bits, and with
//   the `native` backend row i of C does not depend on M, on the other rows or on the thread count.
// cost: 2 M N K FLOPs.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/tensor.h"

namespace lightmoe {

enum class GemmCompute : uint8_t { kF32, kBF16 };

enum class GemmEpilogueKind : uint8_t { kNone, kScale, kSwiGlu, kSwiGluBackward };
struct GemmEpilogue {
  GemmEpilogueKind kind = GemmEpilogueKind::kNone;
  Tensor scales, scale_rows;  // [any], i32 [R]
  Tensor h, activated, dots;  // [R,2F] [R,F] as scales
};

struct Gemm {
  Tensor a, b, c;
  bool trans_a = false, trans_b = false;
  double alpha = 1, beta = 0;
  GemmCompute compute = GemmCompute::kF32;
  int64_t a_column = 0, c_column = 0;  // a_column with trans_a: window of A's columns, which are M
  GemmEpilogue epilogue = {};
};

struct GroupedGemmM {
  Tensor a, a_rows, offsets;  // offsets i32 [G+1]
  std::vector<Tensor> b;      // G matrices, all of one shape
  Tensor c;
  bool trans_b = false;
  double alpha = 1, beta = 0;
  GemmCompute compute = GemmCompute::kF32;
  int64_t a_column = 0, c_column = 0;
  GemmEpilogue epilogue = {};
};

struct GroupedGemmK {
  Tensor a, a_rows, b, b_rows, offsets;
  std::vector<Tensor> c;  // G matrices [M,N] of one shape
  double alpha = 1, beta = 0;
  GemmCompute compute = GemmCompute::kF32;
  int64_t a_column = 0, b_column = 0;  // windows of M columns of A and N columns of B
};

void run(const Gemm& op);
void run(const GroupedGemmM& op);
void run(const GroupedGemmK& op);

// --- choice of the implementation: plain data ------------------------------------------------------

enum class GemmKind : uint8_t { kDense, kGroupedM, kGroupedK };

struct GemmDesc {
  GemmKind kind;
  DeviceKind device;
  DType a, b, c;
  GemmCompute compute;
  bool trans_a, trans_b, gather;
  int64_t m, n, k;  // grouped: total rows in m (kGroupedM) or k (kGroupedK); on GPUs an upper bound of them
  int64_t groups;   // 1 for dense
  // Largest power of two, at most 16, that divides where rows of A and of B (windows counted) begin, in bytes.
  int alignment;
  GemmEpilogueKind epilogue = GemmEpilogueKind::kNone;
};
// Of a product whose operands are sound; grouped: with a matrix that is defined.
GemmDesc describe(const Gemm& op);
GemmDesc describe(const GroupedGemmM& op);
GemmDesc describe(const GroupedGemmK& op);

struct GemmBackend {
  std::string_view
      name;  // "reference", "blas", "native"; "simple", "gemv", "mma", "wgmma": an entry for sim, one for cuda; "cublas"
  bool (*supports)(const GemmDesc&);  // the only truth; no silent fallback inside a backend
  double (*cost)(const GemmDesc&);    // estimated microseconds, for the choice only
  void (*dense)(const Gemm&);         // null where a kind is not implemented (then supports says no)
  void (*grouped_m)(const GroupedGemmM&);
  void (*grouped_k)(const GroupedGemmK&);
};

// Backends register themselves beside their code: static const RegisterGemmBackend x{{...}};
struct RegisterGemmBackend {
  explicit RegisterGemmBackend(const GemmBackend& backend);
};
const std::vector<GemmBackend>& gemm_backends();

// --gemm=NAME: every product this backend supports goes to it; unknown name throws Error(kUsage)
// listing the names. "auto" restores the choice by cost. Products it does not support (on their
// device) fall to the cheapest other backend and are named once in gemm_picks().
void force_gemm_backend(std::string_view name);
std::string_view forced_gemm_backend();  // "auto" or the name
// Forces a backend while it lives (evaluation runs on `native`, whose rows do not depend on their neighbours).
class GemmBackendScope {
 public:
  explicit GemmBackendScope(std::string_view name) : previous_(forced_gemm_backend()) { force_gemm_backend(name); }
  ~GemmBackendScope() { force_gemm_backend(previous_); }
  GemmBackendScope(const GemmBackendScope&) = delete;
  GemmBackendScope& operator=(const GemmBackendScope&) = delete;

 private:
  std::string previous_;
};

const GemmBackend& pick_gemm(const GemmDesc& desc);
// One line per distinct shape picked so far: "grouped_m nt f32xbf16->f32 m=4096 n=2048 k=1024 g=64: native".
std::vector<std::string> gemm_picks();

}  // namespace lightmoe
