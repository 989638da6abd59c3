/* An example of a GEMM plug-in for the CPU, in C, in one file: loops in the order i, k, j, so that the inner one runs along rows of B and C
 * and the compiler vectorises it. Slower than the built-in backends; it shows the interface, not how to multiply.
 *   make                                             builds blocked.so
 *   lightmoe gemm-check ./blocked.so                 is it right, how fast is it
 *   lightmoe eval ... --gemm=./blocked.so --gemm-picks    use it                                                              */
#include <stdlib.h>
#include <string.h>

#include "lightmoe_gemm.h"

typedef lightmoe_gemm_problem Problem;

static float bf16_to_float(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof value);
  return value;
}

/* Nearest, ties to even; NaN stays NaN. */
static uint16_t float_to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if (value != value) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float load(const void* data, int64_t at, int32_t type, int32_t round) {
  if (type == LIGHTMOE_GEMM_BF16) return bf16_to_float(((const uint16_t*)data)[at]);
  const float value = ((const float*)data)[at];
  return round ? bf16_to_float(float_to_bf16(value)) : value;
}

static int64_t row_of(const int32_t* rows, int64_t row) { return rows != NULL ? rows[row] : row; }

/* Rows [begin, end) of C, with op(B) in `b`. sum: n floats. */
static void multiply_rows(const Problem* p, const void* b, int64_t begin, int64_t end, float* sum) {
  for (int64_t i = begin; i < end; ++i) {
    memset(sum, 0, (size_t)p->n * sizeof(float));
    for (int64_t k = 0; k < p->k; ++k) {
      const int64_t at = p->trans_a ? k * p->lda + i : row_of(p->a_rows, i) * p->lda + k;
      const float factor = load(p->a, at, p->a_type, p->round_bf16);
      for (int64_t j = 0; j < p->n; ++j) {
        sum[j] += factor * load(b, p->trans_b ? j * p->ldb + k : k * p->ldb + j, p->b_type, p->round_bf16);
      }
    }
    for (int64_t j = 0; j < p->n; ++j) {
      const int64_t at = i * p->ldc + j;
      float value = (float)p->alpha * sum[j];
      if (p->beta != 0) value += (float)p->beta * load(p->c, at, p->c_type, 0);
      if (p->c_type == LIGHTMOE_GEMM_BF16) {
        ((uint16_t*)p->c)[at] = float_to_bf16(value);
      } else {
        ((float*)p->c)[at] = value;
      }
    }
  }
}

/* C_g += A^T B over the rows of one group: the same loops on a problem of its own, whose k are the group's rows. */
static void multiply_group_k(const Problem* p, int64_t g, float* sum) {
  for (int64_t i = 0; i < p->m; ++i) {
    memset(sum, 0, (size_t)p->n * sizeof(float));
    for (int64_t r = p->offsets[g]; r < p->offsets[g + 1]; ++r) {
      const float factor = load(p->a, row_of(p->a_rows, r) * p->lda + i, p->a_type, p->round_bf16);
      const int64_t row = row_of(p->b_rows, r) * p->ldb;
      for (int64_t j = 0; j < p->n; ++j) sum[j] += factor * load(p->b, row + j, p->b_type, p->round_bf16);
    }
    for (int64_t j = 0; j < p->n; ++j) {
      const int64_t at = i * p->ldc + j;
      float value = (float)p->alpha * sum[j];
      if (p->beta != 0) value += (float)p->beta * load(p->matrices[g], at, p->c_type, 0);
      if (p->c_type == LIGHTMOE_GEMM_BF16) {
        ((uint16_t*)p->matrices[g])[at] = float_to_bf16(value);
      } else {
        ((float*)p->matrices[g])[at] = value;
      }
    }
  }
}

static int32_t create(const lightmoe_gemm_host* host, void** context) {
  *context = NULL; /* nothing to keep */
  return host->device == LIGHTMOE_GEMM_CPU ? 0 : 1;
}
static void destroy(void* context) { (void)context; }
static const char* last_error(void* context) {
  (void)context;
  return "this example works on the CPU only";
}
static int32_t score(void* context, const Problem* p) {
  (void)context;
  return p->device == LIGHTMOE_GEMM_CPU ? 1 : 0;
}
static int32_t workspace(void* context, const Problem* p, uint64_t* bytes) {
  (void)context;
  *bytes = (uint64_t)p->n * sizeof(float); /* one row of sums */
  return 0;
}

static int32_t enqueue(void* context, const Problem* p, void* space, uint64_t bytes, void* stream) {
  (void)context, (void)bytes, (void)stream;
  if (p->kind == LIGHTMOE_GEMM_DENSE) {
    multiply_rows(p, p->b, 0, p->m, (float*)space);
    return 0;
  }
  for (int64_t g = 0; g < p->groups; ++g) {
    if (p->matrices[g] == NULL) continue;
    if (p->kind == LIGHTMOE_GEMM_GROUPED_M) multiply_rows(p, p->matrices[g], p->offsets[g], p->offsets[g + 1], (float*)space);
    if (p->kind == LIGHTMOE_GEMM_GROUPED_K) multiply_group_k(p, g, (float*)space);
  }
  return 0;
}

const lightmoe_gemm_plugin* lightmoe_gemm_plugin_entry(uint32_t host_abi_major, uint32_t host_abi_minor) {
  static const lightmoe_gemm_plugin plugin = {
      .magic = LIGHTMOE_GEMM_MAGIC, .abi_major = LIGHTMOE_GEMM_ABI_MAJOR, .abi_minor = LIGHTMOE_GEMM_ABI_MINOR,
      .struct_size = sizeof(lightmoe_gemm_plugin), .name = "blocked", .version = "1.0", .licence = "as lightmoe",
      .create = create, .destroy = destroy, .score = score, .workspace = workspace, .enqueue = enqueue,
      .last_error = last_error};
  (void)host_abi_minor;
  return host_abi_major == LIGHTMOE_GEMM_ABI_MAJOR ? &plugin : NULL;
}
