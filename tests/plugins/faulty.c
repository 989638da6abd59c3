/* The example plug-in with one thing wrong, named by LIGHTMOE_TEST_FAULT; without it, right. For tests/gemm_plugin_test.cpp. */
#define lightmoe_gemm_plugin_entry right_entry
#include "../../kernels/plugin/example/blocked.c"
#undef lightmoe_gemm_plugin_entry

#include <signal.h>

static int fault(const char* name) {
  const char* set = getenv("LIGHTMOE_TEST_FAULT");
  return set != NULL && strcmp(set, name) == 0;
}

static int32_t broken_create(const lightmoe_gemm_host* host, void** context) {
  *context = NULL;
  return host->device == LIGHTMOE_GEMM_CPU && fault("create") ? 3 : 0;
}
static int32_t broken_score(void* context, const Problem* p) {
  if (fault("nothing")) return 0;
  if (fault("dense-only")) return p->kind == LIGHTMOE_GEMM_DENSE && p->c_type == LIGHTMOE_GEMM_F32;
  return score(context, p);
}

/* What tf32 does to a factor: 10 bits of mantissa are left. */
static float cut(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits &= ~0x1fffu;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static int32_t broken_enqueue(void* context, const Problem* given, void* space, uint64_t bytes, void* stream) {
  Problem p = *given;
  if (fault("crash")) raise(SIGSEGV);
  if (fault("status")) return 7;
  if (fault("gather") && p.a_rows != NULL) { /* every row takes its neighbour's */
    const int64_t rows = p.kind == LIGHTMOE_GEMM_GROUPED_K || p.trans_a ? p.k : p.m;
    int32_t* turned = malloc((size_t)rows * sizeof(int32_t) + 1);
    for (int64_t i = 0; i < rows; ++i) turned[i] = given->a_rows[(i + 1) % rows];
    p.a_rows = turned;
    const int32_t status = enqueue(context, &p, space, bytes, stream);
    free(turned);
    return status;
  }
  if (fault("rounding")) p.round_bf16 = 0;
  if (fault("skipped") && p.kind == LIGHTMOE_GEMM_GROUPED_M) {
    void* some = NULL;
    for (int64_t g = 0; g < p.groups; ++g) some = p.matrices[g] != NULL ? p.matrices[g] : some;
    void** all = malloc((size_t)p.groups * sizeof(void*));
    for (int64_t g = 0; g < p.groups; ++g) all[g] = p.matrices[g] != NULL ? p.matrices[g] : some;
    p.matrices = all;
    const int32_t status = enqueue(context, &p, space, bytes, stream);
    free(all);
    return status;
  }
  const int f32 = p.c_type == LIGHTMOE_GEMM_F32 && p.kind == LIGHTMOE_GEMM_DENSE;
  float* c = (float*)p.c;
  if (fault("reads-c") && f32 && p.beta == 0) p.beta = 1e-30;
  if (fault("outside") && f32) c[(p.m - 1) * p.ldc + p.n] = 1; /* one past the last column */
  if (fault("tf32") && p.kind == LIGHTMOE_GEMM_DENSE && p.a_type == LIGHTMOE_GEMM_F32 && !p.round_bf16) {
    const int64_t rows = p.trans_a ? p.k : p.m, columns = p.trans_a ? p.m : p.k;
    float* copy = malloc((size_t)(rows * columns) * sizeof(float) + 1);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) copy[i * columns + j] = cut(((const float*)p.a)[i * p.lda + j]);
    }
    p.a = copy, p.lda = columns;
    const int32_t status = enqueue(context, &p, space, bytes, stream);
    free(copy);
    return status;
  }
  return enqueue(context, &p, space, bytes, stream);
}

LIGHTMOE_GEMM_EXPORT const lightmoe_gemm_plugin* lightmoe_gemm_plugin_entry(uint32_t major, uint32_t minor) {
  static lightmoe_gemm_plugin plugin;
  if (fault("refuses")) return NULL;
  plugin = *right_entry(major, minor);
  plugin.create = broken_create, plugin.score = broken_score, plugin.enqueue = broken_enqueue;
  if (fault("magic")) plugin.magic = 0;
  if (fault("major")) plugin.abi_major = 2;
  if (fault("size")) plugin.struct_size = 8;
  if (fault("missing")) plugin.workspace = NULL;
  if (fault("name")) plugin.name = "native";
  if (fault("letters")) plugin.name = "My GEMM";
  return &plugin;
}
