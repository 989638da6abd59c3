// Intuition-MoR1E, later T-REX (arXiv 2404.08985): a bank of rank-1 adapters, mixed by a gate that also sees which cluster the input is of.
//   p = softmax(C x / sqrt(D)),  g = softmax(G x + I p),  side(x) = sum_e g_e b_e <a_e, x> = B (g * A x)
// Published (notes): the clusters are of sentence embeddings of training instances, made beforehand, and the coefficients are an
// instance's. Ours: clusters C [m,D] of what the block's router sees (started at random, or at the means of k-means clusters of a
// calibration's inputs, compress/extension_clusters.h), the coefficients are a token's, so that a token never looks ahead; the gate's form
// is our reading. B starts at zero: the block is what it was.

#include <cmath>

#include "autograd/extension_ops.h"
#include "model/moe_extension.h"

namespace lightmoe {
namespace {

class Mor1e : public MoeExtension {
 public:
  Mor1e(const MoeDims& d, int64_t experts, int64_t clusters)
      : a_(declared_parameter({experts, d.hidden})),
        b_(declared_parameter({d.hidden, experts})),
        gate_(declared_parameter({experts, d.hidden})),
        clusters_(declared_parameter({clusters, d.hidden})),
        intuition_(declared_parameter({experts, clusters})) {}

  std::vector<ExtensionTensor> tensors() const override {
    return {{"a", a_},
            {"b", b_, ExtensionStart::kZero},
            {"gate", gate_},
            {"clusters", clusters_},
            {"intuition", intuition_}};
  }
  MoeResult run(Tape& tape, const MoeCall& call) const override {
    const auto of = [&](const Var& x, const ParameterPtr& w) { return linear(tape, x, w, call.compute); };
    const double scale = 1 / std::sqrt(static_cast<double>(call.x.value.dim(1)));
    const Var cluster = softmax_top(tape, of(call.x, clusters_), clusters_->value.dim(0), scale);
    const Var logits = add_in_place(tape, of(call.x, gate_), of(cluster, intuition_));
    const Var g = softmax_top(tape, logits, logits.value.dim(1));
    const Var side = of(scale_blocks(tape, of(call.x, a_), g), b_);
    return {.y = beside_experts(tape, call, side), .open = {}};
  }

 private:
  ParameterPtr a_, b_, gate_, clusters_, intuition_;
};

const RegisterExtension kind{
    {.name = "mor1e",
     .summary = "a bank of rank-1 adapters mixed by a gate that sees the input's cluster",
     .paper = "2404.08985",
     .settings = {{"experts", 16}, {"clusters", 8}},
     .declare = [](const MoeDims& d, const ExtensionSettings& s) -> std::shared_ptr<MoeExtension> {
       return std::make_shared<Mor1e>(d, s.at("experts"), s.at("clusters"));
     }}};

}  // namespace
}  // namespace lightmoe
