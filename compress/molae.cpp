// MoLAE (arXiv 2503.23100): gate and up of a group's experts share a projection to a latent space.
//   groups of k = 8 experts by index;  S = [W^1; ..; W^k] stacked, SVD S = U Sig V^T;  B = V_M^T (shared, [M,D]),  A^i = W^i B^T ([F,M])
//   is the minimiser of sum_i ||W^i - A^i B||_F^2 (Eckart and Young), exact when the experts' rows span at most M directions.
// Published: rank reduction and factorisation of gate and up, down left alone (full text not read; from abstracts and from the papers that
// compare with it: k = 8 for 64 experts). Our reading: the formulas, which are standard; M is the largest that the budget allows.
// Changed: V comes from the eigenvectors of S^T S [D,D], not from the tall SVD.  molae-whitened minimises the error of the outputs on
// sampled inputs instead: with H = mean x x^T + ridge = L L^T, eigenvectors V of L^T S^T S L, B = V_M L^{-1}, A^i = W^i L V_M^T. Ours.
// cost: an eigen-decomposition of D x D per group and matrix, minutes each at D = 2048.

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "compress/budget.h"
#include "compress/expert_sample.h"
#include "compress/linear_algebra.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

constexpr int64_t kGroup = 8;
constexpr double kRidge = 1e-2;

// Latent size: what the budget leaves after everything that is not factored.
int64_t latent_size(const MethodInput& input, int64_t groups) {
  const ModelSize size = model_size(input.config);
  const int64_t d = size.hidden, f = size.width;
  const ReplacementCost cost{.size = size, .bases = 1, .rank = 0};
  const int64_t allowed = allowed_parameters(input.options.budget, cost, input.bytes_per_parameter);
  const int64_t fixed = size.rest + size.layers * size.slots * d * f;  // down matrices too
  const int64_t unit = size.layers * (groups * 2 * d + size.slots * 2 * f);
  check(
      allowed >= fixed + unit, ErrorKind::kUsage,
      "{} is impossible for molae: down matrices stay whole, so at least {:.1f} M parameters remain ({:.1f} % removed, "
      "{:.3f} GiB), but at most {:.1f} M are allowed; ask for less",
      describe(input.options.budget), static_cast<double>(fixed + unit) * 1e-6,
      100 * (1 - static_cast<double>(fixed + unit) / static_cast<double>(size.total())),
      static_cast<double>(fixed + unit) * input.bytes_per_parameter * 0x1p-30, static_cast<double>(allowed) * 1e-6);
  return allowed >= size.total() ? 0 : std::min((allowed - fixed) / unit, d);
}

// The factorisation of one layer; a group's basis is made when first asked for and kept until the layer's last latent is written.
class Factors {
 public:
  Factors(const MethodInput& input, int64_t layer, int64_t size, bool whitened)
      : input_(input), layer_(layer), size_(size), whitened_(whitened) {}

  Tensor projection(int64_t group, ExpertMatrix matrix) { return basis(group, matrix).b; }
  Tensor factor(int64_t expert, ExpertMatrix matrix) {
    return product(weights(expert, matrix), false, basis(expert / kGroup, matrix).to_latent, true);
  }
  Tensor down(int64_t expert) {
    if (expert + 1 == input_.config.num_experts) bases_.clear(), whitener_.reset();  // written last
    return weights(expert, ExpertMatrix::kDown);
  }

 private:
  struct Basis {
    Tensor b, to_latent;  // [M,D]: B, and what A = W to_latent^T is made with
  };

  Tensor weights(int64_t expert, ExpertMatrix matrix) const {
    return input_.experts->place(layer_, expert, matrix).read(DType::kF64);
  }
  const Tensor& whitener() {  // L
    if (!whitener_) {
      const Tensor x = layer_sample(input_, layer_).x.to(DType::kF64);
      whitener_ = cholesky(with_ridge(product(x, true, x, false), kRidge));
    }
    return *whitener_;
  }
  const Basis& basis(int64_t group, ExpertMatrix matrix) {
    std::optional<Basis>& made = bases_[{group, matrix}];
    if (made) return *made;
    const int64_t d = input_.config.hidden_size;
    Tensor gram = Tensor::zeros({d, d}, DType::kF64);
    for (int64_t e = group * kGroup; e < std::min((group + 1) * kGroup, input_.config.num_experts); ++e) {
      Tensor w = weights(e, matrix);
      if (whitened_) w = product(w, false, whitener(), false);
      const Tensor sum = product(w, true, w, false);
      for (int64_t i = 0; i < gram.numel(); ++i) gram.data<double>()[i] += sum.data<double>()[i];
    }
    const Tensor top = symmetric_eigen(gram).vectors.slice(0, size_).clone();
    made =
        whitened_ ? Basis{solve_right(whitener(), top, true), product(top, false, whitener(), true)} : Basis{top, top};
    return *made;
  }

  MethodInput input_;
  int64_t layer_, size_;
  bool whitened_;
  std::map<std::pair<int64_t, ExpertMatrix>, std::optional<Basis>> bases_;
  std::optional<Tensor> whitener_;
};

Plan plan_molae(const MethodInput& input, bool whitened) {
  const int64_t slots = input.config.num_experts, groups = (slots + kGroup - 1) / kGroup;
  const int64_t m = latent_size(input, groups);
  if (m == 0) return plain_plan(model_size(input.config));
  Plan plan;
  for (int64_t l = 0; l < input.config.num_layers; ++l) {
    LayerPlan layer;
    layer.shape.latent_size = m, layer.shape.projections = groups;
    const auto factors = std::make_shared<Factors>(input, l, m, whitened);
    for (const ExpertMatrix matrix : {ExpertMatrix::kGate, ExpertMatrix::kUp}) {
      for (int64_t g = 0; g < groups; ++g) {
        plan.computed[projection_tensor_name(l, g, matrix)] = [=] { return factors->projection(g, matrix); };
      }
    }
    for (int64_t s = 0; s < slots; ++s) {
      layer.shape.slots.push_back({.kind = SlotKind::kLatent, .latent = static_cast<int32_t>(s)});
      layer.shape.latent_projection.push_back(static_cast<int32_t>(s / kGroup));
      layer.replaced.push_back(static_cast<int32_t>(s));
      for (const ExpertMatrix matrix : {ExpertMatrix::kGate, ExpertMatrix::kUp}) {
        plan.computed[latent_tensor_name(l, s, matrix)] = [=] { return factors->factor(s, matrix); };
      }
      plan.computed[latent_tensor_name(l, s, ExpertMatrix::kDown)] = [=] { return factors->down(s); };
    }
    plan.layers.push_back(std::move(layer));
  }
  return plan;
}
Plan plan_plain(const MethodInput& input) { return plan_molae(input, false); }
Plan plan_whitened(const MethodInput& input) { return plan_molae(input, true); }

const RegisterMethod plain{{.name = "molae",
                            .summary = "gate and up as private factors of a projection shared by eight experts",
                            .paper = "2503.23100",
                            .slots = "latent",
                            .plan = &plan_plain,
                            .trainable = Trainable::kAdapters,
                            .needs = Needs::kNothing,
                            .train_free = true,
                            .compresses = true}};
const RegisterMethod whitened{{.name = "molae-whitened",
                               .summary = "MoLAE, factorised for the inputs that occur (ours)",
                               .paper = "2503.23100",
                               .slots = "latent",
                               .plan = &plan_whitened,
                               .trainable = Trainable::kAdapters,
                               .needs = Needs::kInputs,
                               .train_free = true,
                               .compresses = true}};

}  // namespace
}  // namespace lightmoe
