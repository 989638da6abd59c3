// PESC (Camelidae, github wuhy68/Parameter-Efficient-MoE): parallel adapters beside a block, of which a gate of their own picks k a token.
//   side(x) = U (w * GELU(V x)),  V [n*r,D] and U [D,n*r] being n adapters in columns of r;  w = softmax over the k largest of G x
// Published: beside a dense FFN made into a mixture, trained with QLoRA on the rest, dropout 0.1 in training, outputs times a scale, an
// auxiliary balancing loss. Ours: beside OLMoE's own mixture, scale 1, no dropout, no balancing loss; every adapter is computed and those
// that were not picked are multiplied by 0. U starts at zero: the block is what it was.

#include "autograd/extension_ops.h"
#include "model/moe_extension.h"

namespace lightmoe {
namespace {

class Pesc : public MoeExtension {
 public:
  Pesc(const MoeDims& d, int64_t experts, int64_t top_k, int64_t rank)
      : top_k_(top_k),
        gate_(declared_parameter({experts, d.hidden})),
        down_(declared_parameter({experts * rank, d.hidden})),
        up_(declared_parameter({d.hidden, experts * rank})) {}

  std::vector<ExtensionTensor> tensors() const override {
    return {{"gate", gate_}, {"down", down_}, {"up", up_, ExtensionStart::kZero}};
  }
  MoeResult run(Tape& tape, const MoeCall& call) const override {
    const Var hidden = activate(tape, linear(tape, call.x, down_, call.compute), Activation::kGelu);
    const Var picked = softmax_top(tape, linear(tape, call.x, gate_, call.compute), top_k_);
    const Var side = linear(tape, scale_blocks(tape, hidden, picked), up_, call.compute);
    return {.y = beside_experts(tape, call, side), .open = {}};
  }

 private:
  int64_t top_k_;
  ParameterPtr gate_, down_, up_;
};

const RegisterExtension kind{
    {.name = "pesc",
     .summary = "parallel GELU adapters beside the experts, k of n picked by a gate",
     .paper = "2401.02731",
     .settings = {{"experts", 8}, {"top_k", 2}, {"rank", 4}},
     .declare = [](const MoeDims& d, const ExtensionSettings& s) -> std::shared_ptr<MoeExtension> {
       return std::make_shared<Pesc>(d, s.at("experts"), s.at("top_k"), s.at("rank"));
     },
     .problem = [](const OlmoeConfig&, const ExtensionSettings& s) -> std::string {
       return s.at("top_k") <= s.at("experts") ? "" : "top_k is more than experts";
     }}};

}  // namespace
}  // namespace lightmoe
