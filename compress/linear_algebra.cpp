#include "compress/linear_algebra.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/gemm.h"

namespace lightmoe {
namespace {

constexpr int kMaxIterations = 200;  // per eigenvalue; three is usual

double dot(const double* x, const double* y, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// z [n,n] symmetric becomes orthogonal Q with Q^T A Q tridiagonal: diagonal d, below it e (e[0] = 0).
void tridiagonalise(double* z, int64_t n, std::vector<double>& d, std::vector<double>& e) {
  const auto at = [z, n](int64_t i, int64_t j) -> double& { return z[i * n + j]; };
  for (int64_t i = n - 1; i > 0; --i) {
    double scale = 0;
    for (int64_t k = 0; k < i; ++k) scale += std::abs(at(i, k));
    if (i == 1 || scale == 0) {
      e[static_cast<size_t>(i)] = at(i, i - 1);
      d[static_cast<size_t>(i)] = 0;
      continue;
    }
    double h = 0;
    for (int64_t k = 0; k < i; ++k) at(i, k) /= scale, h += at(i, k) * at(i, k);
    const double f = at(i, i - 1), g = f >= 0 ? -std::sqrt(h) : std::sqrt(h);
    e[static_cast<size_t>(i)] = scale * g;
    h -= f * g;
    at(i, i - 1) = f - g;
    double sum = 0;
    for (int64_t j = 0; j < i; ++j) {
      at(j, i) = at(i, j) / h;
      double p = dot(&at(j, 0), &at(i, 0), j + 1);
      for (int64_t k = j + 1; k < i; ++k) p += at(k, j) * at(i, k);
      e[static_cast<size_t>(j)] = p / h;
      sum += e[static_cast<size_t>(j)] * at(i, j);
    }
    const double half = sum / (2 * h);
    for (int64_t j = 0; j < i; ++j) {
      const double u = at(i, j), q = e[static_cast<size_t>(j)] -= half * u;
      for (int64_t k = 0; k <= j; ++k) at(j, k) -= u * e[static_cast<size_t>(k)] + q * at(i, k);
    }
    d[static_cast<size_t>(i)] = h;
  }
  d[0] = e[0] = 0;
  std::vector<double> g(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {  // the reflections one after the other
    if (d[static_cast<size_t>(i)] != 0) {
      std::fill(g.begin(), g.begin() + i, 0.0);
      for (int64_t k = 0; k < i; ++k) {
        for (int64_t j = 0; j < i; ++j) g[static_cast<size_t>(j)] += at(i, k) * at(k, j);
      }
      for (int64_t k = 0; k < i; ++k) {
        const double v = at(k, i);
        for (int64_t j = 0; j < i; ++j) at(k, j) -= g[static_cast<size_t>(j)] * v;
      }
    }
    d[static_cast<size_t>(i)] = at(i, i);
    at(i, i) = 1;
    for (int64_t j = 0; j < i; ++j) at(j, i) = at(i, j) = 0;
  }
}

// Implicit QL on the tridiagonal (d, e); the rows of v [n,n] take part in every rotation.
void diagonalise(std::vector<double>& d, std::vector<double>& e, double* v, int64_t n) {
  for (int64_t i = 1; i < n; ++i) e[static_cast<size_t>(i - 1)] = e[static_cast<size_t>(i)];
  e[static_cast<size_t>(n - 1)] = 0;
  const auto is_small = [&](int64_t m) {
    const double near = std::abs(d[static_cast<size_t>(m)]) + std::abs(d[static_cast<size_t>(m + 1)]);
    return std::abs(e[static_cast<size_t>(m)]) <= 0x1p-53 * near;
  };
  for (int64_t l = 0; l < n; ++l) {
    for (int iteration = 0;; ++iteration) {
      int64_t m = l;
      while (m < n - 1 && !is_small(m)) ++m;
      if (m == l) break;
      check(iteration < kMaxIterations, ErrorKind::kNumeric, "eigenvalue {} of a {} x {} matrix does not settle", l, n,
            n);
      const auto at = [](std::vector<double>& x, int64_t i) -> double& { return x[static_cast<size_t>(i)]; };
      double g = (at(d, l + 1) - at(d, l)) / (2 * at(e, l));
      double r = std::hypot(g, 1.0);
      g = at(d, m) - at(d, l) + at(e, l) / (g + std::copysign(r, g));
      double s = 1, c = 1, p = 0;
      int64_t i = m - 1;
      for (; i >= l; --i) {
        const double f = s * at(e, i), b = c * at(e, i);
        at(e, i + 1) = r = std::hypot(f, g);
        if (r == 0) {
          at(d, i + 1) -= p;
          at(e, m) = 0;
          break;
        }
        s = f / r, c = g / r;
        g = at(d, i + 1) - p;
        r = (at(d, i) - g) * s + 2 * c * b;
        p = s * r;
        at(d, i + 1) = g + p;
        g = c * r - b;
        double *x = v + i * n, *y = v + (i + 1) * n;
        for (int64_t k = 0; k < n; ++k) {
          const double t = y[k];
          y[k] = s * x[k] + c * t;
          x[k] = c * x[k] - s * t;
        }
      }
      if (r == 0 && i >= l) continue;
      at(d, l) -= p;
      at(e, l) = g;
      at(e, m) = 0;
    }
  }
}

}  // namespace

Tensor product(const Tensor& a, bool trans_a, const Tensor& b, bool trans_b) {
  Tensor c = Tensor::empty({a.dim(trans_a ? 1 : 0), b.dim(trans_b ? 0 : 1)}, DType::kF64);
  run(Gemm{.a = a, .b = b, .c = c, .trans_a = trans_a, .trans_b = trans_b});
  return c;
}

Tensor transpose(const Tensor& a) {
  const int64_t m = a.dim(0), n = a.dim(1);
  const Tensor y = Tensor::empty({n, m}, DType::kF64);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) y.data<double>()[j * m + i] = a.data<double>()[i * n + j];
  }
  return y;
}

Tensor cholesky(const Tensor& a) {
  const int64_t n = a.dim(0);
  const Tensor l = Tensor::zeros({n, n}, DType::kF64);
  for (int64_t i = 0; i < n; ++i) {
    double* row = l.row(i).data<double>();
    for (int64_t j = 0; j <= i; ++j) {
      const double* other = l.row(j).data<double>();
      const double rest = a.row(i).data<double>()[j] - dot(row, other, j);
      if (j < i) {
        row[j] = rest / other[j];
        continue;
      }
      check(rest > 0, ErrorKind::kNumeric, "cholesky: pivot {} of {} is {:g}, the matrix is not positive definite", i,
            n, rest);
      row[i] = std::sqrt(rest);
    }
  }
  return l;
}

Tensor solve_right(const Tensor& l, const Tensor& b, bool trans) {
  const int64_t n = l.dim(0);
  const Tensor x = b.clone();
  const double* factor = l.data<double>();
  for (int64_t r = 0; r < x.dim(0); ++r) {
    double* row = x.row(r).data<double>();
    if (!trans) {  // L y = b^T, from the top
      for (int64_t i = 0; i < n; ++i) row[i] = (row[i] - dot(factor + i * n, row, i)) / factor[i * n + i];
    } else {  // L^T y = b^T, from the bottom
      for (int64_t i = n - 1; i >= 0; --i) {
        row[i] /= factor[i * n + i];
        for (int64_t k = 0; k < i; ++k) row[k] -= factor[i * n + k] * row[i];
      }
    }
  }
  return x;
}

Tensor cholesky_solve(const Tensor& l, const Tensor& b) {
  return transpose(solve_right(l, solve_right(l, transpose(b), false), true));
}

Tensor with_ridge(const Tensor& a, double ridge) {
  const Tensor y = a.clone();
  const int64_t n = a.dim(0);
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) trace += y.data<double>()[i * n + i];
  const double add = trace > 0 ? ridge * trace / static_cast<double>(n) : 1;
  for (int64_t i = 0; i < n; ++i) y.data<double>()[i * n + i] += add;
  return y;
}

Eigen symmetric_eigen(const Tensor& a) {
  const int64_t n = a.dim(0);
  require(a.rank() == 2 && a.dim(1) == n, "symmetric_eigen: {}", a.shape().str());
  if (n == 0) return {.values = {}, .vectors = a};
  const Tensor q = a.clone();
  std::vector<double> d(static_cast<size_t>(n)), e(static_cast<size_t>(n));
  tridiagonalise(q.data<double>(), n, d, e);
  const Tensor v = transpose(q);
  diagonalise(d, e, v.data<double>(), n);
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t x, int64_t y) { return d[static_cast<size_t>(x)] > d[static_cast<size_t>(y)]; });
  Eigen out{.values = {}, .vectors = Tensor::empty({n, n}, DType::kF64)};
  for (int64_t i = 0; i < n; ++i) {
    out.values.push_back(d[static_cast<size_t>(order[static_cast<size_t>(i)])]);
    out.vectors.row(i).copy_from(v.row(order[static_cast<size_t>(i)]));
  }
  return out;
}

}  // namespace lightmoe
