#include "compress/tensor_fit.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "compress/linear_algebra.h"
#include "runtime/error.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

constexpr double kRidge = 1e-10;

// w [E,P,Q] with axis m first: [n_m, product of the other two in order m+1, m+2 (cyclic)].
Tensor unfold(const Tensor& w, int m) {
  const std::array<int64_t, 3> n{w.dim(0), w.dim(1), w.dim(2)}, stride{n[1] * n[2], n[2], 1};
  const auto a = static_cast<size_t>(m), b = (a + 1) % 3, c = (a + 2) % 3;
  const Tensor out = Tensor::empty({n[a], n[b] * n[c]}, DType::kF64);
  double* to = out.data<double>();
  for (int64_t i = 0; i < n[a]; ++i) {
    for (int64_t j = 0; j < n[b]; ++j) {
      for (int64_t k = 0; k < n[c]; ++k) *to++ = w.data<double>()[i * stride[a] + j * stride[b] + k * stride[c]];
    }
  }
  return out;
}

Tensor normal_factor(int64_t rows, int64_t columns, uint64_t seed, uint64_t stream) {
  const Tensor f = Tensor::empty({rows, columns}, DType::kF64);
  Philox random(seed, stream);
  for (int64_t i = 0; i < f.numel(); ++i) f.data<double>()[i] = random.normal();
  return f;
}

// The rows that one entry (j,k) of the other two factors gives to the regression: [n_b * n_c, width].
//   CP: B[j,r] C[k,r].   Ring: trace(A_i B_j C_k) = sum_uv A_i[u,v] (B_j C_k)[v,u].
Tensor cp_design(const Tensor& b, const Tensor& c) {
  const int64_t r = b.dim(1);
  const Tensor out = Tensor::empty({b.dim(0) * c.dim(0), r}, DType::kF64);
  double* to = out.data<double>();
  for (int64_t j = 0; j < b.dim(0); ++j) {
    for (int64_t k = 0; k < c.dim(0); ++k) {
      for (int64_t i = 0; i < r; ++i) *to++ = b.data<double>()[j * r + i] * c.data<double>()[k * r + i];
    }
  }
  return out;
}

int64_t ring_rank(const Tensor& core) { return std::llround(std::sqrt(static_cast<double>(core.dim(1)))); }

void small_product(const double* a, const double* b, int64_t r, double* out) {
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < r; ++k) sum += a[i * r + k] * b[k * r + j];
      out[i * r + j] = sum;
    }
  }
}

Tensor ring_design(const Tensor& b, const Tensor& c) {
  const int64_t r = ring_rank(b), width = r * r;
  const Tensor out = Tensor::empty({b.dim(0) * c.dim(0), width}, DType::kF64);
  std::vector<double> product(static_cast<size_t>(width));
  double* to = out.data<double>();
  for (int64_t j = 0; j < b.dim(0); ++j) {
    for (int64_t k = 0; k < c.dim(0); ++k) {
      small_product(b.data<double>() + j * width, c.data<double>() + k * width, r, product.data());
      for (int64_t u = 0; u < r; ++u) {
        for (int64_t v = 0; v < r; ++v) *to++ = product[static_cast<size_t>(v * r + u)];
      }
    }
  }
  return out;
}

using Design = Tensor (*)(const Tensor&, const Tensor&);

double relative_error(const Tensor& unfolded, const Tensor& factor, const Tensor& design) {
  const Tensor fitted = product(factor, false, design, true);
  double miss = 0, all = 0;
  for (int64_t i = 0; i < fitted.numel(); ++i) {
    const double w = unfolded.data<double>()[i], d = w - fitted.data<double>()[i];
    miss += d * d, all += w * w;
  }
  return all > 0 ? std::sqrt(miss / all) : std::sqrt(miss);
}

struct Factors {
  std::array<Tensor, 3> f;
  double error = 0;
};

Factors alternate(const Tensor& w, int64_t width, int64_t sweeps, uint64_t seed, Design design) {
  require(w.rank() == 3 && w.dtype() == DType::kF64, "tensor fit: {}, expected [E,P,Q] f64", w.shape());
  check(width >= 1 && sweeps >= 1, ErrorKind::kUsage, "rank and sweeps: expected at least 1");
  Factors all;
  for (int m = 0; m < 3; ++m) {
    all.f[static_cast<size_t>(m)] = normal_factor(w.dim(m), width, seed, 0xc9 + static_cast<uint64_t>(m));
  }
  const std::array<Tensor, 3> unfolded{unfold(w, 0), unfold(w, 1), unfold(w, 2)};
  for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
    for (size_t m = 0; m < 3; ++m) {
      const Tensor z = design(all.f[(m + 1) % 3], all.f[(m + 2) % 3]);
      const Tensor gram = with_ridge(product(z, true, z, false), kRidge);
      all.f[m] = transpose(cholesky_solve(cholesky(gram), transpose(product(unfolded[m], false, z, false))));
      if (m == 2) all.error = relative_error(unfolded[m], all.f[m], z);
    }
  }
  return all;
}

Tensor folded(const Tensor& f, const Tensor& design, const Tensor& o, const Tensor& x) {
  return product(f, false, design, true).reshape({f.dim(0), o.dim(0), x.dim(0)});
}

// sum_i c_i row_i.
std::vector<double> mix_rows(const Tensor& rows, const std::vector<double>& c) {
  require(static_cast<int64_t>(c.size()) == rows.dim(0), "tensor fit: {} coefficients for {}", c.size(), rows.shape());
  std::vector<double> sum(static_cast<size_t>(rows.dim(1)), 0.0);
  for (size_t i = 0; i < c.size(); ++i) {
    for (size_t j = 0; j < sum.size(); ++j) sum[j] += c[i] * rows.data<double>()[i * sum.size() + j];
  }
  return sum;
}

}  // namespace

CpFit fit_cp(const Tensor& w, int64_t rank, int64_t sweeps, uint64_t seed) {
  Factors all = alternate(w, rank, sweeps, seed, &cp_design);
  return {.f = all.f[0], .o = all.f[1], .x = all.f[2], .relative_error = all.error};
}

std::vector<double> cp_forward(const CpFit& fit, const std::vector<double>& a, const std::vector<double>& x) {
  const std::vector<double> gates = mix_rows(fit.f, a), inputs = mix_rows(fit.x, x);
  std::vector<double> y(static_cast<size_t>(fit.o.dim(0)), 0.0);
  for (size_t p = 0; p < y.size(); ++p) {
    for (size_t r = 0; r < gates.size(); ++r) y[p] += fit.o.data<double>()[p * gates.size() + r] * gates[r] * inputs[r];
  }
  return y;
}

Tensor cp_tensor(const CpFit& fit) { return folded(fit.f, cp_design(fit.o, fit.x), fit.o, fit.x); }

RingFit fit_ring(const Tensor& w, int64_t rank, int64_t sweeps, uint64_t seed) {
  Factors all = alternate(w, rank * rank, sweeps, seed, &ring_design);
  return {.f = all.f[0], .o = all.f[1], .x = all.f[2], .relative_error = all.error};
}

std::vector<double> ring_forward(const RingFit& fit, const std::vector<double>& a, const std::vector<double>& x) {
  const int64_t r = ring_rank(fit.f), width = r * r;
  const std::vector<double> gate = mix_rows(fit.f, a), input = mix_rows(fit.x, x);
  std::vector<double> both(static_cast<size_t>(width));
  small_product(input.data(), gate.data(), r, both.data());  // trace(F O X) = trace(O (X F))
  std::vector<double> y(static_cast<size_t>(fit.o.dim(0)), 0.0);
  for (size_t p = 0; p < y.size(); ++p) {
    const double* core = fit.o.data<double>() + static_cast<int64_t>(p) * width;
    for (int64_t u = 0; u < r; ++u) {
      for (int64_t v = 0; v < r; ++v) y[p] += core[u * r + v] * both[static_cast<size_t>(v * r + u)];
    }
  }
  return y;
}

Tensor ring_tensor(const RingFit& fit) { return folded(fit.f, ring_design(fit.o, fit.x), fit.o, fit.x); }

}  // namespace lightmoe
