// DSMoE (arXiv 2502.12455): a trained network's units in blocks, each with a gate that opens for the inputs that need it.
//   g = sigmoid(W_s x + b_s) [N] of a choice's slot s;  block b runs where g_b > 1/2
//   backward as if the gate were g itself (straight-through);  loss + lambda mean(g)  closes what is not needed  (--sparsity-coef)
// Published (notes): the blocks of a dense FFN, sigmoid gates, straight-through, a sparsity loss, language modelling. Ours: inside OLMoE's
// experts, for the choices the router makes; gates are 0 or 1, so that all open is the model itself, and they start open (b = 1, W = 0).
// Blocks are the units as they lie (compress/unit_split.h may put like ones together). Units of closed blocks are computed and multiplied
// by 0: nothing is faster.

#include "autograd/extension_ops.h"
#include "kernels/contraction.h"
#include "model/moe_extension.h"
#include "model/moe_modulated.h"
#include "model/routing.h"
#include "model/slot_linear.h"

namespace lightmoe {
namespace {

double sum_of(const Tensor& x) {
  const Tensor values = x.to(DType::kF32), sum = Tensor::empty({1}, DType::kF32);
  run(Contraction{.terms = x.numel(), .a = {values, {}, 1}, .b = {}, .y = {sum}});
  return static_cast<double>(sum.on(DeviceKind::kCpu).data<float>()[0]);
}

class Dsmoe : public MoeExtension {
 public:
  Dsmoe(const MoeDims& d, int64_t blocks)
      : weights_(declared_parameter({d.slots * blocks, d.hidden})), bias_(declared_parameter({d.slots * blocks})) {}

  std::vector<ExtensionTensor> tensors() const override {
    return {{"gate", weights_, ExtensionStart::kZero}, {"bias", bias_, ExtensionStart::kOne}};
  }

  MoeResult run(Tape& tape, const MoeCall& call) const override {
    const int64_t slots = call.layer.num_slots();
    const Var g = activate(tape, slot_linear(tape, call.x, call.slots, weights_, bias_, slots), Activation::kSigmoid);
    const Var hard = Tape::output(Tensor::empty(g.value.shape(), g.value.dtype()), g.needs_grad());
    lightmoe::run(Activate{.kind = Activation::kOpen, .x = g.value, .y = hard.value});
    tape.record(hard, [dg = g.grad](const Tensor& dy) { dg->share(dy); });
    if (call.routing != nullptr && call.routing->counts != nullptr) {  // a choice that was skipped has g = 1/2: closed
      call.routing->counts->blocks_run += static_cast<int64_t>(sum_of(hard.value));
      count_blocks(*call.routing, call.slots, slots, 0, g.value.dim(1));
    }
    const ModulatedExperts in{
        .x_gate = call.x, .x_up = call.x, .slots = call.slots, .gates = call.gates, .scale = hard};
    return {.y = modulated_experts(tape, in, call.layer, call.compute), .open = g};
  }

 private:
  ParameterPtr weights_, bias_;
};

const RegisterExtension kind{
    {.name = "dsmoe",
     .summary = "units inside experts in blocks, each with a trained gate that opens at a threshold",
     .paper = "2502.12455",
     .settings = {{"blocks", 8}},
     .declare = [](const MoeDims& d, const ExtensionSettings& s) -> std::shared_ptr<MoeExtension> {
       return std::make_shared<Dsmoe>(d, s.at("blocks"));
     },
     .problem = [](const OlmoeConfig& c, const ExtensionSettings& s) -> std::string {
       return c.intermediate_size % s.at("blocks") == 0 ? "" : "blocks do not divide intermediate_size";
     },
     .own_experts = true,
     .runs_blocks = true}};

}  // namespace
}  // namespace lightmoe
