// MoBE, mixture of basis experts (arXiv 2508.05257; code inclusionAI/MoBE): gate and up of every expert from bases that the layer shares.
//   W^i = A^i silu(sum_j w_ij B_j),  A^i [F,M] of the expert, B_j [M,D] shared by all, w_i = softmax(z_i): fitted to the weights alone,
//   divided by their standard deviation, by Adam at 0.07 over all experts at once (compress/latent_fit.h); down matrices stay whole
//   start  the experts in n groups by index: B_j = the M largest right singular vectors of group j's stacked matrices, A^i = W^i B_j^T,
//          z_ij = 1 for the group's own basis, else 0
// Published: the above (read in the code), M = F, n = 32 for 128 experts, 64 for 256, 128 for 384; 10 to 30 thousand steps at a constant
// rate, the best of every 200th kept; tanh in place of silu as an option. Parameters per kind of matrix E F M + n M D + E n; M = F and n
// = E/4 leave M/D + n M / (E F) = 3/4 of gate and up where D = 2 F, and the paper does not go further. Our reading: n = E/4 and M the
// largest that the budget allows; where M reaches F, n grows. So a budget that the published shape cannot meet is met with M < F (the
// comparisons of other papers at half the model must do something of the kind).
// Options: M (--latent-size), n (--latent-bases), steps (--fit-steps), down matrices too (--latent-down), their transposes fitted alike.
// Changed: the rate falls along a cosine to 0, which reaches in 2000 steps what a constant one does not; singular vectors from the
// eigenvectors of the Gram matrix [D,D]. Executed with the mixes made in every pass, never stored (model/latent_projections.h).
// cost: compress/latent_fit.h; at OLMoE's size 0.5 TFLOP a step and matrix: a matter for hours of a large CPU.

#include <algorithm>

#include "compress/latent_fitted.h"
#include "compress/linear_algebra.h"

namespace lightmoe {
namespace {

void start(const LatentFit& fit, const Tensor& w, const LatentForm& form, int64_t experts) {
  const int64_t f = w.dim(0) / experts;
  for (int64_t j = 0; j < form.projections; ++j) {
    const int64_t first = j * experts / form.projections, end = (j + 1) * experts / form.projections;
    const Tensor rows = w.slice(first * f, end * f).to(DType::kF64);
    const Tensor top = symmetric_eigen(product(rows, true, rows, false)).vectors.slice(0, form.size);
    fit.basis(j).copy_from(top);
    fit.a().slice(first * f, end * f).copy_from(product(rows, false, top, true));
    for (int64_t e = first; e < end; ++e) fit.logits().row(e).data<float>()[j] = 1;
  }
}

LatentForm form_of(const MethodInput& input) {
  const LatentOptions& options = input.options.latent;
  const int64_t experts = input.config.num_experts;
  const int64_t most = std::min(input.config.intermediate_size, input.config.hidden_size);
  check(
      options.size <= most && options.bases <= experts, ErrorKind::kUsage,
      "mobe: --latent-size {} --latent-bases {}: expected at most {} (the experts' width) and {} (as many as experts)",
      options.size, options.bases, most, experts);
  const int64_t bases = options.bases > 0 ? options.bases : std::max<int64_t>(1, experts / 4);
  const auto form = [&](int64_t size, int64_t n) {
    return LatentForm{.size = size, .projections = n, .down = options.down};
  };
  const int64_t least_size = std::max<int64_t>(1, options.size), least_bases = options.bases > 0 ? bases : 1;
  check_fits(input, form(least_size, least_bases), "mobe",
             fmt::format("{} bases with a latent space of {} or more{}", least_bases, least_size,
                         options.down ? "" : ", down matrices stay whole"));
  LatentForm made = form(options.size, bases);
  if (options.size == 0) {
    made.size = largest_fitting(input, 1, most, [&](int64_t size) { return form(size, bases); });
    if (made.size == 0) made = form(1, 1);  // not even M = 1 with that many
  }
  if (options.bases == 0 && (options.size > 0 || made.size == most || made.projections == 1)) {
    made.projections = largest_fitting(input, 1, experts, [&](int64_t n) { return form(made.size, n); });
  }
  return made;
}

Plan plan(const MethodInput& input) {
  if (nothing_to_remove(input)) return plain_plan(model_size(input.config));
  const LatentForm form = form_of(input);
  const int64_t steps = input.options.latent.fit_steps;
  const LatentFitOptions fit{.steps = steps > 0 ? steps : kFitSteps, .lr = 0.07};
  Plan plan = plan_latents(input, form, [&](int64_t layer) -> std::shared_ptr<LatentSource> {
    return std::make_shared<FittedLatents>(
        input, layer, form, fit, [form, experts = input.config.num_experts](const LatentFit& to, const Tensor& w) {
          start(to, w, form, experts);
        });
  });
  plan.working_bytes = fit_bytes(input, form);
  return plan;
}

const RegisterMethod method{{.name = "mobe",
                             .summary = "gate and up as private factors of a mix of bases, fitted to the weights",
                             .paper = "2508.05257",
                             .slots = "latent",
                             .plan = &plan,
                             .trainable = Trainable::kAdapters,
                             .needs = Needs::kNothing,
                             .train_free = true,
                             .compresses = true}};

}  // namespace
}  // namespace lightmoe
