#include "compress/svd.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/gemm.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

constexpr int64_t kJacobiWidth = 160;
constexpr int64_t kOversample = 16;
constexpr int kRounds = 8;
constexpr int kMaxSweeps = 60;

Tensor transposed(const Tensor& x) {
  const int64_t m = x.dim(0), n = x.dim(1);
  Tensor y = Tensor::empty({n, m}, DType::kF64);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) y.data<double>()[j * m + i] = x.data<double>()[i * n + j];
  }
  return y;
}

Tensor product(const Tensor& a, bool trans_a, const Tensor& b, bool trans_b) {
  Tensor c = Tensor::empty({a.dim(trans_a ? 1 : 0), b.dim(trans_b ? 0 : 1)}, DType::kF64);
  run(Gemm{.a = a, .b = b, .c = c, .trans_a = trans_a, .trans_b = trans_b});
  return c;
}

double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

void rotate(double* x, double* y, int64_t n, double c, double s) {
  for (int64_t i = 0; i < n; ++i) {
    const double u = x[i], v = y[i];
    x[i] = c * u - s * v;
    y[i] = s * u + c * v;
  }
}

// Rows of `rows` [k,n] become orthogonal by rotations, which `vectors` [k,k] (starting as the identity) collects:
// rows_before = vectors^T rows_after.
void orthogonalise_by_jacobi(const Tensor& rows, const Tensor& vectors) {
  const int64_t k = rows.dim(0), n = rows.dim(1);
  double *r = rows.data<double>(), *v = vectors.data<double>();
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool rotated = false;
    for (int64_t p = 0; p < k; ++p) {
      for (int64_t q = p + 1; q < k; ++q) {
        double *x = r + p * n, *y = r + q * n;
        const double xx = dot(x, x, n), yy = dot(y, y, n), xy = dot(x, y, n);
        if (std::abs(xy) <= 1e-15 * std::sqrt(xx) * std::sqrt(yy) || xy == 0) continue;
        const double zeta = (yy - xx) / (2 * xy);
        const double t = std::copysign(1.0, zeta) / (std::abs(zeta) + std::hypot(1.0, zeta));
        const double c = 1 / std::hypot(1.0, t);
        rotate(x, y, n, c, c * t);
        rotate(v + p * k, v + q * k, k, c, c * t);
        rotated = true;
      }
    }
    if (!rotated) return;
  }
}

// x [k,n] = U S V^T by Jacobi on its rows. B = U sqrt(S) [k,R] and A = sqrt(S) V^T [R,n].
LowRank jacobi(const Tensor& x, int64_t rank) {
  const int64_t k = x.dim(0), n = x.dim(1);
  const Tensor rows = x.clone(), vectors = Tensor::zeros({k, k}, DType::kF64);
  for (int64_t i = 0; i < k; ++i) vectors.data<double>()[i * k + i] = 1;
  orthogonalise_by_jacobi(rows, vectors);
  std::vector<double> norms;
  for (int64_t i = 0; i < k; ++i)
    norms.push_back(std::sqrt(dot(rows.row(i).data<double>(), rows.row(i).data<double>(), n)));
  std::vector<int64_t> order(static_cast<size_t>(k));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return norms[static_cast<size_t>(a)] > norms[static_cast<size_t>(b)]; });
  LowRank out{.b = Tensor::zeros({k, rank}, DType::kF64), .a = Tensor::zeros({rank, n}, DType::kF64)};
  for (int64_t j = 0; j < std::min(rank, k); ++j) {
    const int64_t i = order[static_cast<size_t>(j)];
    const double sigma = norms[static_cast<size_t>(i)];
    out.singular_values.push_back(sigma);
    if (sigma == 0) continue;
    const double root = std::sqrt(sigma);
    for (int64_t c = 0; c < n; ++c) out.a.row(j).data<double>()[c] = rows.row(i).data<double>()[c] / root;
    for (int64_t c = 0; c < k; ++c) out.b.data<double>()[c * rank + j] = vectors.data<double>()[i * k + c] * root;
  }
  out.singular_values.resize(static_cast<size_t>(rank), 0.0);
  return out;
}

// Orthonormal rows, Gram-Schmidt done twice (once is not enough: Kahan and Parlett's "twice is enough").
void orthonormalise_rows(const Tensor& q) {
  const int64_t k = q.dim(0), n = q.dim(1);
  double* rows = q.data<double>();
  for (int64_t i = 0; i < k; ++i) {
    double* x = rows + i * n;
    for (int pass = 0; pass < 2; ++pass) {
      for (int64_t j = 0; j < i; ++j) {
        const double overlap = dot(rows + j * n, x, n);
        for (int64_t c = 0; c < n; ++c) x[c] -= overlap * rows[j * n + c];
      }
    }
    const double norm = std::sqrt(dot(x, x, n));
    for (int64_t c = 0; c < n; ++c) x[c] = norm > 0 ? x[c] / norm : 0;
  }
}

LowRank subspace_iteration(const Tensor& w, int64_t rank, uint64_t seed) {
  const int64_t m = w.dim(0), n = w.dim(1), k = std::min(rank + kOversample, std::min(m, n));
  Philox random(seed, 0x51bd);
  Tensor q = Tensor::empty({k, n}, DType::kF64);  // rows span the right singular space
  for (int64_t i = 0; i < k * n; ++i) q.data<double>()[i] = random.normal();
  Tensor left;
  for (int round = 0; round < kRounds; ++round) {
    orthonormalise_rows(q);
    left = product(q, false, w, true);  // [k,m] = Q W^T
    orthonormalise_rows(left);
    q = product(left, false, w, false);  // [k,n]
  }
  LowRank small = jacobi(q, rank);  // left W = small.b small.a, so W ~ left^T small.b small.a
  small.b = product(left, true, small.b, false);
  return small;
}

}  // namespace

LowRank best_low_rank(const Tensor& w, int64_t rank, uint64_t seed) {
  require(w.rank() == 2 && rank >= 0, "best_low_rank: {} to rank {}", w.shape(), rank);
  const Tensor x = w.to(DType::kF64);
  const int64_t m = x.dim(0), n = x.dim(1);
  if (std::min(m, n) > kJacobiWidth && rank + kOversample < std::min(m, n)) return subspace_iteration(x, rank, seed);
  if (m <= n) return jacobi(x, rank);
  const LowRank flipped = jacobi(transposed(x), rank);
  return {.b = transposed(flipped.a), .a = transposed(flipped.b), .singular_values = flipped.singular_values};
}

}  // namespace lightmoe
