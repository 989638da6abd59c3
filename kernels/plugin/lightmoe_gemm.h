/* The C interface of a GEMM plug-in: a shared object that lightmoe loads with --gemm=./my_gemm.so and that multiplies matrices in
 * place of the built-in backends. Needs nothing but this header. Exports one symbol, lightmoe_gemm_plugin_entry (at the end).
 *
 *   dense      C = alpha op(A) op(B) + beta C                                    op(A) [m,k]  op(B) [k,n]  C [m,n]
 *   grouped_m  for each group g, rows i in [offsets[g], offsets[g+1]):
 *              C[i,:] = alpha A[a_rows[i],:] op(B_g) + beta C[i,:]               B_g = matrices[g]
 *   grouped_k  C_g = alpha sum_{i in group g} A[a_rows[i],:]^T B[b_rows[i],:] + beta C_g   [m,n]   C_g = matrices[g]
 *
 * Row-major; lda, ldb, ldc are distances between stored rows, in elements, and may exceed the width: only the window named is read or
 * written. trans_a / trans_b: the stored matrix is the transpose (y = x W^T with W [out,in] is trans_b = 1). beta = 0 never reads C.
 * matrices[g] = NULL: group g is skipped, nothing of it is written. a_rows / b_rows = NULL: the identity. Empty groups are legal (in
 * grouped_k they still apply beta). No two matrices[g] of one call are the same C_g. Sums are kept in f32 or better; round_bf16 = 1:
 * f32 factors are rounded to bf16 (nearest, ties to even) first.
 *
 * Rules: no exception crosses this border. enqueue allocates nothing, synchronises nothing, touches no other stream, keeps no pointer
 * after the work is done, and gives the same bits for the same input. On LIGHTMOE_GEMM_CPU the work is done when enqueue returns.
 * Every status: 0 = ok; anything else is a failure, explained by last_error.
 * Versions: a host refuses another ABI major. New fields are added at the end of structs and raise the minor number: read no field
 * beyond struct_size. */
#ifndef LIGHTMOE_GEMM_H
#define LIGHTMOE_GEMM_H

#include <stdint.h>

#if defined(__GNUC__)
#define LIGHTMOE_GEMM_EXPORT __attribute__((visibility("default")))
#else
#define LIGHTMOE_GEMM_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define LIGHTMOE_GEMM_MAGIC 0x4d474d4cu /* "LMGM" */
#define LIGHTMOE_GEMM_ABI_MAJOR 1u
#define LIGHTMOE_GEMM_ABI_MINOR 0u

/* kind */
#define LIGHTMOE_GEMM_DENSE 0
#define LIGHTMOE_GEMM_GROUPED_M 1
#define LIGHTMOE_GEMM_GROUPED_K 2
/* device: whose memory the pointers of a problem point to */
#define LIGHTMOE_GEMM_CPU 0
#define LIGHTMOE_GEMM_CUDA 1
/* a_type, b_type, c_type */
#define LIGHTMOE_GEMM_F32 0
#define LIGHTMOE_GEMM_BF16 1

typedef struct lightmoe_gemm_problem {
  uint32_t struct_size; /* sizeof of the host's struct */
  int32_t kind, device;
  int32_t a_type, b_type, c_type;
  int32_t trans_a, trans_b; /* grouped_m: trans_a = 0; grouped_k: trans_a = 1, trans_b = 0 */
  int32_t round_bf16;
  int32_t gather;    /* 1: a_rows or b_rows is given */
  int32_t alignment; /* every row of A and B (and of each B_g) begins at a multiple of so many bytes: 2, 4, 8 or 16 */
  int32_t reserved;  /* 0 */
  int64_t m, n, k;   /* grouped_m: m, grouped_k: k = rows of all groups; on a GPU an upper bound of them */
  int64_t groups;    /* 1 for dense */
  double alpha, beta;
  /* What follows is 0 in score and workspace, which decide by what stands above. */
  const void* a;
  const int32_t* a_rows;
  int64_t lda;
  const void* b; /* grouped_m: NULL */
  const int32_t* b_rows;
  int64_t ldb;                 /* grouped_m: of every B_g */
  void* c;                     /* grouped_k: NULL */
  int64_t ldc;                 /* grouped_k: of every C_g */
  const int32_t* offsets;      /* [groups+1] in the device's memory; NULL for dense */
  const int32_t* host_offsets; /* the same in host memory, or NULL (GPU: the host does not know them) */
  void* const* matrices; /* [groups] in host memory: addresses of B_g (grouped_m) or C_g (grouped_k); NULL for dense */
} lightmoe_gemm_problem;

typedef struct lightmoe_gemm_host {
  uint32_t struct_size;
  int32_t device;                      /* LIGHTMOE_GEMM_CPU or _CUDA */
  int32_t ordinal, compute_capability; /* of the GPU (90 = sm_90); 0 on a CPU */
  int32_t threads;                     /* a CPU plug-in may use so many */
  int32_t reserved;
  uint64_t workspace_limit_bytes;   /* a problem that needs more is not given to the plug-in */
  void (*log)(const char* message); /* one line, to the user */
} lightmoe_gemm_host;

typedef struct lightmoe_gemm_plugin {
  uint32_t magic, abi_major, abi_minor, struct_size;
  const char *name, *version, *licence; /* name: [a-z0-9_-]+, not that of a built-in backend */
  int32_t (*create)(const lightmoe_gemm_host* host, void** context);
  void (*destroy)(void* context);
  /* 0: not supported. Larger: preferred (a number of the plug-in's own, shown to the user). */
  int32_t (*score)(void* context, const lightmoe_gemm_problem* problem);
  int32_t (*workspace)(void* context, const lightmoe_gemm_problem* problem, uint64_t* bytes);
  /* workspace: that many bytes in the device's memory, aligned to 256. stream: a cudaStream_t; NULL on a CPU. */
  int32_t (*enqueue)(void* context, const lightmoe_gemm_problem* problem, void* workspace, uint64_t workspace_bytes,
                     void* stream);
  const char* (*last_error)(void* context); /* never NULL; context may be NULL after a failed create */
} lightmoe_gemm_plugin;

/* The one exported symbol. Returns NULL if the plug-in cannot work with that host. */
LIGHTMOE_GEMM_EXPORT const lightmoe_gemm_plugin* lightmoe_gemm_plugin_entry(uint32_t host_abi_major,
                                                                            uint32_t host_abi_minor);
typedef const lightmoe_gemm_plugin* (*lightmoe_gemm_plugin_entry_fn)(uint32_t, uint32_t);

#ifdef __cplusplus
}
#endif
#endif
