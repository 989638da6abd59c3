// gemm.h on NVIDIA's library, for comparison: dense products by cublasLt, grouped ones by cublasGemmGroupedBatchedEx. Only nvcc compiles it.
// NOTE: the grouped call wants its sizes in host memory, so it waits for the offsets: no step of training should use it. Hence its cost.
// cuBLAS counts columns first: a row-major X is its X^T, so C^T = op(B)^T op(A)^T is computed, B in front.

#ifdef __CUDACC__

#include <cublasLt.h>
#include <cublas_v2.h>

#include <memory>

#include "kernels/device/simt.h"
#include "kernels/gemm_launch.h"

namespace lightmoe::cuda {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what NVIDIA's documentation advises for Hopper

void check_cublas(cublasStatus_t status, const char* what) {
  check(status == CUBLAS_STATUS_SUCCESS, ErrorKind::kDevice, "cuda: {}: {}", what, cublasGetStatusString(status));
}

cudaStream_t stream() { return static_cast<cudaStream_t>(compute_stream(kDevice)); }

struct Library {
  cublasHandle_t cublas = nullptr;
  cublasLtHandle_t light = nullptr;
  std::shared_ptr<Buffer> workspace;
  Library() : workspace(Buffer::allocate(kWorkspaceBytes, DeviceKind::kCuda, MemoryCategory::kScratch)) {
    check_cublas(cublasCreate(&cublas), "cublasCreate");
    check_cublas(cublasLtCreate(&light), "cublasLtCreate");
    check_cublas(cublasSetStream(cublas, stream()), "cublasSetStream");
  }
};
Library& library() {
  static Library* opened =
      new Library;  // open to the end of the program: the runtime may be gone before static objects are
  return *opened;
}

cudaDataType_t type_of(DType dtype) { return dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F; }
cublasOperation_t operation(bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

// Row-major [rows, columns] as cublasLt sees it.
struct Layout {
  cublasLtMatrixLayout_t it = nullptr;
  Layout(DType dtype, int64_t rows, int64_t columns, int64_t stride) {
    check_cublas(cublasLtMatrixLayoutCreate(&it, type_of(dtype), static_cast<uint64_t>(columns),
                                            static_cast<uint64_t>(rows), stride),
                 "cublasLtMatrixLayoutCreate");
  }
  ~Layout() { cublasLtMatrixLayoutDestroy(it); }
  Layout(const Layout&) = delete;
  Layout& operator=(const Layout&) = delete;
};

struct Operation {
  cublasLtMatmulDesc_t it = nullptr;
  Operation(bool trans_first, bool trans_second) {
    check_cublas(cublasLtMatmulDescCreate(&it, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    set(CUBLASLT_MATMUL_DESC_TRANSA, operation(trans_first));
    set(CUBLASLT_MATMUL_DESC_TRANSB, operation(trans_second));
  }
  void set(cublasLtMatmulDescAttributes_t attribute, cublasOperation_t value) {
    check_cublas(cublasLtMatmulDescSetAttribute(it, attribute, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
  }
  ~Operation() { cublasLtMatmulDescDestroy(it); }
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;
};

void multiply_dense(const Gemm& op) {
  for (const GemmLaunch& p : launches_of(op)) {
    const Operation operation(p.trans_b, p.trans_a);
    const Layout a(p.a_type, p.trans_a ? p.k : p.m, p.trans_a ? p.m : p.k, p.a.stride);
    const Layout b(p.b_type, p.trans_b ? p.n : p.k, p.trans_b ? p.k : p.n, p.b.stride);
    const Layout c(p.c_type, p.m, p.n, p.c_stride);
    const float alpha = static_cast<float>(p.alpha), beta = static_cast<float>(p.beta);
    // No algorithm named: the library asks its heuristics and remembers the answer.
    check_cublas(cublasLtMatmul(library().light, operation.it, &alpha, p.b.data, b.it, p.a.data, a.it, &beta, p.c, c.it,
                                p.c, c.it, nullptr, library().workspace->data(), kWorkspaceBytes, stream()),
                 "cublasLtMatmul");
  }
}

// One call: problem i is m[i] x n x k[i] with `second[i]` = A's, `first[i]` = B's first element.
struct Batch {
  std::vector<int> m, k;
  std::vector<int64_t> first, second, out;  // addresses
  void add(int rows, int depth, const void* b, const void* a, void* c) {
    m.push_back(rows), k.push_back(depth);
    first.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(b)));
    second.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(a)));
    out.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(c)));
  }
};

Tensor on_device(const std::vector<int64_t>& addresses) {
  const Tensor list = Tensor::empty({static_cast<int64_t>(addresses.size())}, DType::kI64, DeviceKind::kCuda);
  copy_memory(list.raw(), DeviceKind::kCuda, addresses.data(), DeviceKind::kCpu, addresses.size() * sizeof(int64_t));
  return list;
}

void multiply_batch(const GemmLaunch& p, const Batch& batch, double beta_value) {
  const size_t count = batch.m.size();
  if (count == 0) return;
  const auto all = [&](int value) { return std::vector<int>(count, value); };
  const std::vector<cublasOperation_t> trans_first(count, operation(p.trans_b)),
      trans_second(count, operation(p.trans_a));
  const std::vector<float> alpha(count, static_cast<float>(p.alpha)), beta(count, static_cast<float>(beta_value));
  const std::vector<int> n = all(p.n), ones = all(1), first_stride = all(static_cast<int>(p.b.stride)),
                         second_stride = all(static_cast<int>(p.a.stride)),
                         out_stride = all(static_cast<int>(p.c_stride));
  const MemoryScope scratch(MemoryCategory::kScratch);
  const Tensor first = on_device(batch.first), second = on_device(batch.second), out = on_device(batch.out);
  check_cublas(cublasGemmGroupedBatchedEx(
                   library().cublas, trans_first.data(), trans_second.data(), n.data(), batch.m.data(), batch.k.data(),
                   alpha.data(), static_cast<const void* const*>(first.raw()), type_of(p.b_type), first_stride.data(),
                   static_cast<const void* const*>(second.raw()), type_of(p.a_type), second_stride.data(), beta.data(),
                   static_cast<void* const*>(out.raw()), type_of(p.c_type), out_stride.data(), static_cast<int>(count),
                   ones.data(), CUBLAS_COMPUTE_32F),
               "cublasGemmGroupedBatchedEx");
  check_cuda(cudaStreamSynchronize(stream()), "cublasGemmGroupedBatchedEx");  // the lists of addresses end here
}

const void* row_of(const GemmOperand& x, DType dtype, int row) {
  return static_cast<const char*>(x.data) + row * x.stride * static_cast<int64_t>(size_of(dtype));
}

void multiply_m(const GroupedGemmM& op) {
  for (const GemmLaunch& p : launches_of(op)) {
    std::vector<int32_t> offsets(static_cast<size_t>(p.num_groups) + 1);
    copy_memory(offsets.data(), DeviceKind::kCpu, p.offsets, DeviceKind::kCuda, offsets.size() * sizeof(int32_t));
    Batch batch;
    for (size_t g = 0; g + 1 < offsets.size(); ++g) {
      const int begin = offsets[g], rows = offsets[g + 1] - begin;
      if (p.group_data[g] == nullptr || rows == 0) continue;
      char* c = static_cast<char*>(p.c) + begin * p.c_stride * static_cast<int64_t>(size_of(p.c_type));
      batch.add(rows, p.k, p.group_data[g], row_of(p.a, p.a_type, begin), c);
    }
    multiply_batch(p, batch, p.beta);
  }
}

// Groups that share an output follow each other: the i-th group of every output in call i.
void multiply_k(const GroupedGemmK& op) {
  const std::vector<int32_t> offsets = [&] {
    std::vector<int32_t> host(static_cast<size_t>(op.offsets.numel()));
    copy_memory(host.data(), DeviceKind::kCpu, op.offsets.raw(), DeviceKind::kCuda, host.size() * sizeof(int32_t));
    return host;
  }();
  for (const GemmLaunch& p : launches_of(op)) {
    bool more = true;
    for (int i = 0; more; ++i) {
      Batch batch;
      more = false;
      for (int output = 0; output < p.num_groups; ++output) {
        const int at = p.first[output] + i;
        if (at >= p.first[output + 1]) continue;
        more = true;
        const auto g = static_cast<size_t>(p.member[at]);
        const int begin = offsets[g], rows = offsets[g + 1] - begin;
        batch.add(p.m, rows, row_of(p.b, p.b_type, begin), row_of(p.a, p.a_type, begin), p.group_data[output]);
      }
      multiply_batch(p, batch, i == 0 ? p.beta : 1);
    }
  }
}

// The library's own table: one type for both factors; grouped calls also for C. No gathered rows; f32 factors are not rounded to bf16.
bool supports(const GemmDesc& desc) {
  const bool types =
      desc.a == desc.b &&
      (desc.a == DType::kBF16 || (desc.a == DType::kF32 && desc.c == DType::kF32 && desc.compute == GemmCompute::kF32));
  const bool grouped = desc.kind != GemmKind::kDense;
  return desc.device == DeviceKind::kCuda && desc.epilogue == GemmEpilogueKind::kNone && types &&
         desc.c != DType::kF64 && !desc.gather && desc.k > 0 && (!grouped || desc.a == desc.c);
}
double cost(const GemmDesc& desc) {
  constexpr double kLaunch = 8, kWait = 60, kBytesPerMicrosecond = 3e6;
  const double flops_per_microsecond = desc.a == DType::kBF16 ? 6e8 : 4e7;
  const double wait = desc.kind == GemmKind::kDense ? kLaunch : kWait + static_cast<double>(desc.groups);
  return wait + std::max(tiled_flops(desc, 1, 1) / flops_per_microsecond, bytes_moved(desc) / kBytesPerMicrosecond);
}

const RegisterGemmBackend cublas{{
    .name = "cublas",
    .supports = &supports,
    .cost = &cost,
    .dense = &multiply_dense,
    .grouped_m = &multiply_m,
    .grouped_k = &multiply_k,
}};

}  // namespace
}  // namespace lightmoe::cuda

#endif
