// gemm.h on a BLAS (sgemm, dgemm): operands that are bf16, gathered or to be rounded are first copied to f32 scratch.
// NOTE: OpenBLAS's OpenMP build computes on one thread when called inside a parallel region; the grouped kinds count on it.
// Its sums depend on the tile shapes it chooses, so row i of C may change in the last bits with M and the thread count.

#include <cblas.h>

#include <algorithm>
#include <limits>

#include "kernels/access.h"
#include "kernels/gemm_problem.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kCopyGrain = 16;           // rows of an operand a thread copies at least
constexpr int64_t kSmallProblem = 64 << 20;  // FLOPs under which one thread computes a whole problem of many

struct Operand {
  const void* data;
  int64_t stride;
  Tensor scratch;  // keeps a copy alive
};

template <class T>
void copy_rows(const GemmMatrix& x, const Tensor& to, bool round) {
  const int64_t columns = to.dim(1);
  float* out = to.data<float>();
  parallel_for(0, to.dim(0), kCopyGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* row = static_cast<const T*>(x.data) + x.row_offset(r);
      for (int64_t j = 0; j < columns; ++j) {
        const float value = load(row, j);
        out[r * columns + j] = round ? static_cast<float>(bf16(value)) : value;
      }
    }
  });
}

// X as BLAS can take it; op(X) is [rows, columns].
Operand ready(const GemmMatrix& x, int64_t rows, int64_t columns, GemmCompute compute) {
  if (x.transposed) std::swap(rows, columns);
  const bool round = compute == GemmCompute::kBF16 && x.dtype == DType::kF32;
  if (x.rows == nullptr && !round && x.dtype != DType::kBF16) return {x.data, std::max<int64_t>(x.stride, 1), {}};
  const Tensor copy = Tensor::empty({rows, columns}, x.dtype == DType::kF64 ? DType::kF64 : DType::kF32);
  if (x.dtype == DType::kF32) copy_rows<float>(x, copy, round);
  if (x.dtype == DType::kBF16) copy_rows<bf16>(x, copy, false);
  if (x.dtype == DType::kF64) {
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(static_cast<const double*>(x.data) + x.row_offset(r), columns, copy.data<double>() + r * columns);
    }
  }
  return {copy.raw(), std::max<int64_t>(columns, 1), copy};
}

CBLAS_TRANSPOSE flag(bool transposed) { return transposed ? CblasTrans : CblasNoTrans; }

void multiply_f32(const GemmProblem& p, const GemmProblems& all, const Operand& a, const Operand& b, float beta,
                  float* c, int64_t c_stride) {
  cblas_sgemm(CblasRowMajor, flag(p.a.transposed), flag(p.b.transposed), static_cast<int>(p.m), static_cast<int>(p.n),
              static_cast<int>(p.k), static_cast<float>(all.alpha), static_cast<const float*>(a.data),
              static_cast<int>(a.stride), static_cast<const float*>(b.data), static_cast<int>(b.stride), beta, c,
              static_cast<int>(c_stride));
}

void store_bf16(const GemmProblem& p, float beta, const float* product) {
  parallel_for(0, p.m, kCopyGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      bf16* c = static_cast<bf16*>(p.c) + i * p.c_stride;
      for (int64_t j = 0; j < p.n; ++j) {
        const float value = product[i * p.n + j];
        store(c, j, beta == 0 ? value : value + beta * load(c, j));
      }
    }
  });
}

void multiply(const GemmProblem& p, const GemmProblems& all) {
  const MemoryScope scratch(MemoryCategory::kScratch);
  const Operand a = ready(p.a, p.m, p.k, all.compute), b = ready(p.b, p.k, p.n, all.compute);
  if (p.c_dtype == DType::kF64) {
    cblas_dgemm(CblasRowMajor, flag(p.a.transposed), flag(p.b.transposed), static_cast<int>(p.m), static_cast<int>(p.n),
                static_cast<int>(p.k), all.alpha, static_cast<const double*>(a.data), static_cast<int>(a.stride),
                static_cast<const double*>(b.data), static_cast<int>(b.stride), all.beta, static_cast<double*>(p.c),
                static_cast<int>(p.c_stride));
  } else if (p.c_dtype == DType::kF32) {
    multiply_f32(p, all, a, b, static_cast<float>(all.beta), static_cast<float*>(p.c), p.c_stride);
  } else {
    const Tensor product = Tensor::empty({p.m, p.n}, DType::kF32);
    multiply_f32(p, all, a, b, 0, product.data<float>(), p.n);
    store_bf16(p, static_cast<float>(all.beta), product.data<float>());
  }
}

void multiply_all(const GemmProblems& all) {
  bool small = static_cast<int64_t>(all.items.size()) >= num_threads();
  for (const GemmProblem& p : all.items) small &= 2 * p.m * p.n * p.k < kSmallProblem * num_threads();
  if (small && all.items.size() > 1) {
    parallel_items(static_cast<int64_t>(all.items.size()),
                   [&](int64_t i) { multiply(all.items[static_cast<size_t>(i)], all); });
  } else {
    for (const GemmProblem& p : all.items) multiply(p, all);
  }
}

bool supports(const GemmDesc& desc) {
  constexpr int64_t kMaxDim = std::numeric_limits<int>::max();
  return desc.device == DeviceKind::kCpu && desc.epilogue == GemmEpilogueKind::kNone && desc.m <= kMaxDim &&
         desc.n <= kMaxDim && desc.k <= kMaxDim;
}

double cost(const GemmDesc& desc) {
  const double m = static_cast<double>(desc.m), n = static_cast<double>(desc.n), k = static_cast<double>(desc.k);
  const double groups = static_cast<double>(desc.groups), threads = num_threads();
  const double flop_per_microsecond = desc.c == DType::kF64 ? 4e4 : 8e4;  // of one thread
  const double bytes_per_microsecond = 1e4;
  const double weights = desc.kind == GemmKind::kGroupedM ? groups : 1;
  const bool round = desc.compute == GemmCompute::kBF16;
  double copied = 0;
  if (desc.a == DType::kBF16 || round || desc.gather) copied += 6 * m * k;
  if (desc.b == DType::kBF16 || round) copied += 6 * n * k * weights;
  if (desc.c == DType::kBF16) copied += 6 * m * n * (desc.kind == GemmKind::kGroupedK ? groups : 1);
  return 2 * m * n * k / (flop_per_microsecond * threads) + copied / bytes_per_microsecond + groups;
}

const RegisterGemmBackend blas{{
    .name = "blas",
    .supports = &supports,
    .cost = &cost,
    .dense = [](const Gemm& op) { multiply_all(problems_of(op)); },
    .grouped_m = [](const GroupedGemmM& op) { multiply_all(problems_of(op)); },
    .grouped_k = [](const GroupedGemmK& op) { multiply_all(problems_of(op)); },
}};

}  // namespace
}  // namespace lightmoe
