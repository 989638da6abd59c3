// MoDE (arXiv 2410.10181): a frozen backbone gets gated side blocks, one set for a domain, and only those train.
//   side(x) = alpha W_d (silu(W_g x) * (W_u x)),  alpha a number of the layer's
// Published (notes): whole transformer blocks of a domain beside the backbone's, gated. Ours: the feed-forward half alone, beside the
// experts, at the experts' input; the gate is one trained number. alpha starts at zero: the block is what it was, and stays so at gate 0.

#include "autograd/extension_ops.h"
#include "model/moe_extension.h"

namespace lightmoe {
namespace {

class Mode : public MoeExtension {
 public:
  Mode(const MoeDims& d, int64_t width)
      : gate_up_(declared_parameter({2 * width, d.hidden})),
        down_(declared_parameter({d.hidden, width})),
        alpha_(declared_parameter({1})) {}

  std::vector<ExtensionTensor> tensors() const override {
    return {{"gate_up", gate_up_}, {"down", down_}, {"alpha", alpha_, ExtensionStart::kZero}};
  }
  MoeResult run(Tape& tape, const MoeCall& call) const override {
    const Var hidden = swiglu(tape, linear(tape, call.x, gate_up_, call.compute));
    const Var block = linear(tape, hidden, down_, call.compute);
    const Var side = multiply_scalar(tape, block, parameter_value(tape, alpha_, block.value.dtype()));
    return {.y = beside_experts(tape, call, side), .open = {}};
  }

 private:
  ParameterPtr gate_up_, down_, alpha_;
};

const RegisterExtension kind{
    {.name = "mode",
     .summary = "a gated feed-forward block beside the experts; gate 0 is the original",
     .paper = "2410.10181",
     .settings = {{"width", 32}},
     .declare = [](const MoeDims& d, const ExtensionSettings& s) -> std::shared_ptr<MoeExtension> {
       return std::make_shared<Mode>(d, s.at("width"));
     }}};

}  // namespace
}  // namespace lightmoe
