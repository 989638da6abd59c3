// The smallest GEMM plug-in for a GPU: one thread for each element of C. `make CUDA=1` builds naive.so; then
//   lightmoe gemm-check ./naive.so --device cuda
// Offsets of groups are read on the device, so enqueue never waits; addresses of groups travel in the launch, kGroups at a time.

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "lightmoe_gemm.h"

namespace {

constexpr int kGroups = 128;
constexpr int kThreads = 256;
const char* error_text = "";

struct Launch {
  lightmoe_gemm_problem p;
  int first, count;  // groups of this launch
  void* matrices[kGroups];
};

__device__ float load(const void* data, int64_t at, int32_t type, int32_t round) {
  if (type == LIGHTMOE_GEMM_BF16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[at]);
  const float value = static_cast<const float*>(data)[at];
  return round ? __bfloat162float(__float2bfloat16_rn(value)) : value;
}

__device__ void write(const lightmoe_gemm_problem& p, void* c, int64_t at, float sum) {
  float value = static_cast<float>(p.alpha) * sum;
  if (p.beta != 0) value += static_cast<float>(p.beta) * load(c, at, p.c_type, 0);
  if (p.c_type == LIGHTMOE_GEMM_BF16) {
    static_cast<__nv_bfloat16*>(c)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<float*>(c)[at] = value;
  }
}

// dense and grouped_m: row i of C is blockIdx.y.
__global__ void rows_kernel(const __grid_constant__ Launch launch) {
  const lightmoe_gemm_problem& p = launch.p;
  const void* b = p.b;
  for (int64_t i = blockIdx.y; i < p.m; i += gridDim.y) {
    if (p.kind == LIGHTMOE_GEMM_GROUPED_M) {
      b = nullptr;
      for (int g = 0; g < launch.count; ++g) {
        if (i >= p.offsets[launch.first + g] && i < p.offsets[launch.first + g + 1]) b = launch.matrices[g];
      }
      if (b == nullptr) continue;
    }
    const int64_t row = p.a_rows != nullptr ? p.a_rows[i] : i;
    for (int64_t j = blockIdx.x * kThreads + threadIdx.x; j < p.n; j += static_cast<int64_t>(gridDim.x) * kThreads) {
      float sum = 0;
      for (int64_t k = 0; k < p.k; ++k) {
        sum += load(p.a, p.trans_a ? k * p.lda + i : row * p.lda + k, p.a_type, p.round_bf16) *
               load(b, p.trans_b ? j * p.ldb + k : k * p.ldb + j, p.b_type, p.round_bf16);
      }
      write(p, p.c, i * p.ldc + j, sum);
    }
  }
}

// grouped_k: output blockIdx.z, row i is blockIdx.y.
__global__ void weights_kernel(const __grid_constant__ Launch launch) {
  const lightmoe_gemm_problem& p = launch.p;
  void* c = launch.matrices[blockIdx.z];
  if (c == nullptr) return;
  const int group = launch.first + static_cast<int>(blockIdx.z);
  for (int64_t i = blockIdx.y; i < p.m; i += gridDim.y) {
    for (int64_t j = blockIdx.x * kThreads + threadIdx.x; j < p.n; j += static_cast<int64_t>(gridDim.x) * kThreads) {
      float sum = 0;
      for (int r = p.offsets[group]; r < p.offsets[group + 1]; ++r) {
        const int64_t ra = p.a_rows != nullptr ? p.a_rows[r] : r, rb = p.b_rows != nullptr ? p.b_rows[r] : r;
        sum += load(p.a, ra * p.lda + i, p.a_type, p.round_bf16) * load(p.b, rb * p.ldb + j, p.b_type, p.round_bf16);
      }
      write(p, c, i * p.ldc + j, sum);
    }
  }
}

int32_t create(const lightmoe_gemm_host* host, void** context) {
  *context = nullptr;
  error_text = "this example works on a GPU only";
  return host->device == LIGHTMOE_GEMM_CUDA ? 0 : 1;
}
void destroy(void*) {}
const char* last_error(void*) { return error_text; }
int32_t score(void*, const lightmoe_gemm_problem* p) { return p->device == LIGHTMOE_GEMM_CUDA ? 1 : 0; }
int32_t workspace(void*, const lightmoe_gemm_problem*, uint64_t* bytes) {
  *bytes = 0;
  return 0;
}

int32_t enqueue(void*, const lightmoe_gemm_problem* p, void*, uint64_t, void* stream) {
  const dim3 blocks(static_cast<unsigned>((p->n + kThreads - 1) / kThreads),
                    static_cast<unsigned>(p->m < 65535 ? p->m : 65535), 1);
  const int groups = p->matrices == nullptr ? 1 : static_cast<int>(p->groups);
  for (int first = 0; first < groups; first += kGroups) {
    Launch launch{*p, first, groups - first < kGroups ? groups - first : kGroups, {}};
    for (int g = 0; p->matrices != nullptr && g < launch.count; ++g) launch.matrices[g] = p->matrices[first + g];
    const auto on = static_cast<cudaStream_t>(stream);
    if (p->kind == LIGHTMOE_GEMM_GROUPED_K) {
      weights_kernel<<<dim3(blocks.x, blocks.y, static_cast<unsigned>(launch.count)), kThreads, 0, on>>>(launch);
    } else {
      rows_kernel<<<blocks, kThreads, 0, on>>>(launch);
    }
  }
  const cudaError_t status = cudaGetLastError();
  error_text = cudaGetErrorString(status);
  return static_cast<int32_t>(status);
}

}  // namespace

extern "C" const lightmoe_gemm_plugin* lightmoe_gemm_plugin_entry(uint32_t host_abi_major, uint32_t) {
  // clang-format off
  static const lightmoe_gemm_plugin plugin = {
      LIGHTMOE_GEMM_MAGIC, LIGHTMOE_GEMM_ABI_MAJOR, LIGHTMOE_GEMM_ABI_MINOR, sizeof(lightmoe_gemm_plugin),
      "naive", "1.0", "as lightmoe", create, destroy, score, workspace, enqueue, last_error};
  // clang-format on
  return host_abi_major == LIGHTMOE_GEMM_ABI_MAJOR ? &plugin : nullptr;
}
