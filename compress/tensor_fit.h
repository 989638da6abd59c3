#pragma once
// muMoE's forms (arXiv 2402.12550) fitted to the experts of a layer: W [E,P,Q] is one kind of matrix of all experts, stacked.
//   CP           W[e,p,q] = sum_r F[e,r] O[p,r] X[q,r].  With coefficients a [E]: y = O ((F^T a) * (X^T x)) is the soft mixture
//                sum_e a_e W_e x, exactly, at the cost of R (E + P + Q)
//   tensor ring  W[e,p,q] = trace(F_e O_p X_q), cores [E,R,R], [P,R,R], [Q,R,R]
// Published: the forms replace the MLP and are trained from scratch, with entmax gates and every expert always active. Here they are
// fitted to pretrained experts by alternating least squares (each factor in turn, normal equations with a ridge of 1e-10 of the mean
// diagonal): a measurement of how far pretrained experts are from such a form, not a way to run OLMoE. No quality is promised.
// cost: an ALS sweep of CP 6 E P Q R FLOPs, of the ring 6 E P Q R^2.

#include <cstdint>
#include <vector>

#include "runtime/tensor.h"

namespace lightmoe {

struct CpFit {
  Tensor f, o, x;             // [E,R] [P,R] [Q,R] f64
  double relative_error = 0;  // ||W - fit|| / ||W||
};
// w [E,P,Q] f64. Deterministic: factors start normal from the seed.
CpFit fit_cp(const Tensor& w, int64_t rank, int64_t sweeps, uint64_t seed);
// sum_e a_e W_e x in factorised form: a [E], x [Q] -> [P].
std::vector<double> cp_forward(const CpFit& fit, const std::vector<double>& a, const std::vector<double>& x);
Tensor cp_tensor(const CpFit& fit);  // [E,P,Q]

struct RingFit {
  Tensor f, o, x;  // [E,R*R] [P,R*R] [Q,R*R] f64: row-major cores
  double relative_error = 0;
};
RingFit fit_ring(const Tensor& w, int64_t rank, int64_t sweeps, uint64_t seed);
std::vector<double> ring_forward(const RingFit& fit, const std::vector<double>& a, const std::vector<double>& x);
Tensor ring_tensor(const RingFit& fit);

}  // namespace lightmoe
