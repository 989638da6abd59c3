// MoLAE (arXiv 2503.23100): gate and up of a group's experts share a projection to a latent space.
//   groups of k = 8 experts by index;  S = [W^1; ..; W^k] stacked, SVD S = U Sig V^T;  B = V_M^T (shared, [M,D]),  A^i = W^i B^T ([F,M])
//   is the minimiser of sum_i ||W^i - A^i B||_F^2 (Eckart and Young), exact when the experts' rows span at most M directions.
// Published: rank reduction and factorisation of gate and up, down left alone (full text not read; from abstracts and from the papers that
// compare with it: k = 8 for 64 experts); a second-hand note of v2 has the down matrices factorised too, on their output side. Our reading:
// the formulas, which are standard; M is the largest that the budget allows, the same for all matrices.
// Options: k (--latent-group), M (--latent-size), down as well (--latent-down): W_down^T = A B with the B of the group.
// Changed: V comes from the eigenvectors of S^T S [D,D], not from the tall SVD.  molae-whitened minimises the error of the outputs on
// sampled inputs instead: with H = mean x x^T + ridge = L L^T, eigenvectors V of L^T S^T S L, B = V_M L^{-1}, A^i = W^i L V_M^T. Of down
// the inputs are each expert's own hidden activations and B is on the other side: its rows are the principal directions of the
// experts' outputs on their own tokens (with 1 % of the weights', for experts without any). Ours.
// cost: an eigen-decomposition of D x D per group and matrix, minutes each at D = 2048.

#include <algorithm>
#include <map>
#include <memory>
#include <optional>

#include "compress/expert_sample.h"
#include "compress/latent_plan.h"
#include "compress/linear_algebra.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

constexpr double kRidge = 1e-2;

double trace(const Tensor& a) {
  double sum = 0;
  for (int64_t i = 0; i < a.dim(0); ++i) sum += a.data<double>()[i * a.dim(1) + i];
  return sum;
}

void add_scaled(const Tensor& sum, const Tensor& x, double scale) {
  for (int64_t i = 0; i < sum.numel(); ++i) sum.data<double>()[i] += scale * x.data<double>()[i];
}

// The factorisation of one layer; a group's basis is made when first asked for and kept until the layer's last latent is written.
class Factors : public LatentSource {
 public:
  Factors(const MethodInput& input, int64_t layer, const LatentForm& form, bool whitened)
      : input_(input), layer_(layer), form_(form), whitened_(whitened) {}

  Tensor projection(int64_t group, ExpertMatrix matrix) override { return basis(group, matrix).b; }
  Tensor factor(int64_t expert, ExpertMatrix matrix) override {
    const Tensor made = product(weights(expert, matrix), false, basis(expert / form_.group, matrix).to_latent, true);
    if (matrix == ExpertMatrix::kDown) forget_after(expert);
    return made;
  }
  Tensor down(int64_t expert) override {
    forget_after(expert);
    return input_.experts->place(layer_, expert, ExpertMatrix::kDown).read(DType::kF64);
  }

 private:
  struct Basis {
    Tensor b, to_latent;  // [M,D]: B, and what A = W to_latent^T is made with
  };

  void forget_after(int64_t expert) {  // down is written last
    if (expert + 1 == input_.config.num_experts) bases_.clear(), whitener_.reset();
  }
  // [F,D]
  Tensor weights(int64_t expert, ExpertMatrix matrix) const {
    const Tensor w = input_.experts->place(layer_, expert, matrix).read(DType::kF64);
    return matrix == ExpertMatrix::kDown ? transpose(w) : w;
  }
  const Tensor& whitener() {  // L
    if (!whitener_) {
      const Tensor x = layer_sample(input_, layer_).x.to(DType::kF64);
      whitener_ = cholesky(with_ridge(product(x, true, x, false), kRidge));
    }
    return *whitener_;
  }
  // Sum over a group's experts of S^T S, whitened where asked for.
  Tensor gram_of(int64_t group, ExpertMatrix matrix) {
    const int64_t d = input_.config.hidden_size;
    const bool down = matrix == ExpertMatrix::kDown;
    const Tensor gram = Tensor::zeros({d, d}, DType::kF64), outputs = Tensor::zeros({d, d}, DType::kF64);
    for (int64_t e = group * form_.group; e < std::min((group + 1) * form_.group, input_.config.num_experts); ++e) {
      Tensor w = weights(e, matrix);
      if (whitened_ && !down) w = product(w, false, whitener(), false);
      add_scaled(gram, product(w, true, w, false), 1);
      if (!whitened_ || !down) continue;
      const ExpertMatrices expert = read_expert(*input_.experts, layer_, e, DType::kF64);
      const Tensor x = routed_rows(layer_sample(input_, layer_), {static_cast<int32_t>(e)}).to(DType::kF64);
      if (x.dim(0) == 0) continue;
      const Tensor y = expert_output(expert, expert_hidden(expert, x));
      add_scaled(outputs, product(y, true, y, false), 1);
    }
    if (const double all = trace(outputs), whole = trace(gram); all > 0 && whole > 0) {
      add_scaled(outputs, gram, kRidge * all / whole);
      return outputs;
    }
    return gram;
  }
  const Basis& basis(int64_t group, ExpertMatrix matrix) {
    std::optional<Basis>& made = bases_[{group, matrix}];
    if (made) return *made;
    const Tensor top = symmetric_eigen(gram_of(group, matrix)).vectors.slice(0, form_.size).clone();
    made = whitened_ && matrix != ExpertMatrix::kDown
               ? Basis{solve_right(whitener(), top, true), product(top, false, whitener(), true)}
               : Basis{top, top};
    return *made;
  }

  MethodInput input_;
  int64_t layer_;
  LatentForm form_;
  bool whitened_;
  std::map<std::pair<int64_t, ExpertMatrix>, std::optional<Basis>> bases_;
  std::optional<Tensor> whitener_;
};

LatentForm form_of(const MethodInput& input) {
  const LatentOptions& options = input.options.latent;
  const int64_t slots = input.config.num_experts, group = std::min(options.group, slots);
  const bool fits = options.group <= slots || options.group == LatentOptions().group;  // the default fits any layer
  check(fits, ErrorKind::kUsage, "--latent-group {}: a layer has {} experts", options.group, slots);
  const auto form = [&](int64_t size) {
    return LatentForm{.size = size, .projections = (slots + group - 1) / group, .group = group, .down = options.down};
  };
  check(options.size <= input.config.hidden_size, ErrorKind::kUsage, "--latent-size {}: the model's hidden size is {}",
        options.size, input.config.hidden_size);
  const char* stays = options.down ? "" : ", down matrices stay whole";
  check_fits(input, form(std::max<int64_t>(1, options.size)), "molae",
             fmt::format("groups of {} share a latent space of {} or more{}", group, std::max<int64_t>(1, options.size),
                         stays));
  if (options.size > 0) return form(options.size);
  return form(largest_fitting(input, 1, input.config.hidden_size, form));
}

Plan plan_molae(const MethodInput& input, bool whitened) {
  if (nothing_to_remove(input)) return plain_plan(model_size(input.config));
  const LatentForm form = form_of(input);
  return plan_latents(input, form, [&](int64_t layer) -> std::shared_ptr<LatentSource> {
    return std::make_shared<Factors>(input, layer, form, whitened);
  });
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
