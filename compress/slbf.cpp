// SLBF, shared low-rank bases: MoBE (compress/mobe.cpp) with a basis for every expert, each of low rank, for all three matrices.
//   W^i = A^i silu(sum_j w_ij U_j V_j),  A^i [F,M], U_j [M,K], V_j [K,D], n = E bases, M = F;  down matrices transposed
//   fitted to the weights alone by AdamW (weight decay 0.02), rate 0.1 for A and z, 0.3 times that for U and V, cosine to 1e-4
//   start  W^i = L S R^T: A^i = L S (first M columns), V_i = the first K rows of R^T, U = [I; 0], z = identity
// Published (a paper without an arXiv id in our sources, read second-hand): the above but for two things the notes leave open, 8 to 20
// thousand steps, the factor of U's and V's rate between 0.2 and 0.36; after the fit the gauge is fixed so that K rows of every U are the
// identity, which stores M - K rows. Parameters per kind of matrix E F M + n K (M + D - K) + E n; re-derived for OLMoE (M = F = 1024, n =
// 64, D = 2048, all three matrices alike): K = 64 leaves 0.592 of the experts, K = 256 0.844, as published.
// Our reading: the singular values belong to A, so that A P starts at the best rank-K approximation times the slope of silu at 0; w =
// softmax(z) as in MoBE; K is the largest that the budget allows. The smallest published K is M / 16: where the budget leaves less
// than that at M = F (below 0.55 of the experts), M shrinks and K = M / 16.
// Options: M (--latent-size), n (--latent-bases), steps (--fit-steps).
// Changed: U's first K rows are the identity from the start: U_j V_j = (U_j G)(G^{-1} V_j) for any G, so the family is the same and no K
// x K block has to be inverted; U = [I; 0] is where the published start is as well. With fewer bases than experts basis j starts from
// expert j E / n, and z_ij = 1 where that is the expert's own.
// cost: compress/latent_fit.h.

#include <algorithm>

#include "compress/latent_fitted.h"
#include "compress/linear_algebra.h"

namespace lightmoe {
namespace {

constexpr double kRate = 0.1, kLastRate = 1e-4, kBasisRate = 0.3, kDecay = 0.02;
constexpr int64_t kSmallestShare = 16;  // K is at least M / 16

void start(const LatentFit& fit, const Tensor& w, const LatentForm& form, int64_t experts) {
  const int64_t f = w.dim(0) / experts, n = form.projections, rows = form.rank > 0 ? form.rank : form.size;
  for (int64_t e = 0; e < experts; ++e) {
    const Tensor own = w.slice(e * f, (e + 1) * f).to(DType::kF64);
    const Tensor right = symmetric_eigen(product(own, true, own, false)).vectors.slice(0, form.size);
    fit.a().slice(e * f, (e + 1) * f).copy_from(product(own, false, right, true));
    const int64_t basis = e * n / experts;
    fit.logits().row(e).data<float>()[basis] = 1;
    if (basis * experts / n == e) fit.basis(basis).copy_from(right.slice(0, rows));
  }
}

LatentForm form_of(const MethodInput& input) {
  const LatentOptions& options = input.options.latent;
  const int64_t experts = input.config.num_experts, bases = options.bases > 0 ? options.bases : experts;
  const int64_t most = std::min(input.config.intermediate_size, input.config.hidden_size);
  check(
      options.size <= most && bases <= experts, ErrorKind::kUsage,
      "slbf: --latent-size {} --latent-bases {}: expected at most {} (the experts' width) and {} (as many as experts)",
      options.size, options.bases, most, experts);
  const auto form = [&](int64_t size, int64_t rank) {
    return LatentForm{.size = size, .projections = bases, .rank = rank < size ? rank : 0, .down = true};
  };
  const auto smallest = [&](int64_t size) { return form(size, std::max<int64_t>(1, size / kSmallestShare)); };
  const int64_t least = std::max<int64_t>(1, options.size);
  check_fits(input, options.size > 0 ? form(least, 1) : smallest(least), "slbf",
             fmt::format("{} bases of rank 1 with a latent space of {} or more", bases, least));
  int64_t size = options.size;
  if (size == 0) size = largest_fitting(input, 1, most, smallest);
  return form(size, largest_fitting(input, 1, size, [&](int64_t rank) { return form(size, rank); }));
}

Plan plan(const MethodInput& input) {
  if (nothing_to_remove(input)) return plain_plan(model_size(input.config));
  const LatentForm form = form_of(input);
  const int64_t steps = input.options.latent.fit_steps;
  const LatentFitOptions fit{.steps = steps > 0 ? steps : kFitSteps,
                             .lr = kRate,
                             .last_lr = kLastRate,
                             .basis_lr_scale = kBasisRate,
                             .weight_decay = kDecay};
  Plan plan = plan_latents(input, form, [&](int64_t layer) -> std::shared_ptr<LatentSource> {
    return std::make_shared<FittedLatents>(
        input, layer, form, fit, [form, experts = input.config.num_experts](const LatentFit& to, const Tensor& w) {
          start(to, w, form, experts);
        });
  });
  plan.working_bytes = fit_bytes(input, form);
  return plan;
}

const RegisterMethod method{
    {.name = "slbf",
     .summary = "all matrices as private factors of a mix of low-rank bases, fitted to the weights",
     .slots = "latent",
     .plan = &plan,
     .trainable = Trainable::kAdapters,
     .needs = Needs::kNothing,
     .train_free = true,
     .compresses = true}};

}  // namespace
}  // namespace lightmoe
