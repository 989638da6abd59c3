// MoEfication (arXiv 2110.01786; code thunlp/MoEfication): units of a trained network in blocks (experts inside an expert), of which a small
// selector picks a few for each input.
//   selector of slot s:  W2_s tanh(W1_s x) [N], W1_s [N,D], W2_s [N,N];  the `unit_blocks` largest run (RoutingOptions), all by default
// Published: a dense ReLU FFN, blocks by balanced k-means of its rows or from the graph of co-activation, selectors trained to predict the
// blocks' activation, Adam 0.01, 30 epochs. Ours: inside each of OLMoE's experts, for the choices the router makes; blocks and selectors are
// made by compress/unit_split.h; `unit_oracle` picks by what the blocks really contribute (model/unit_blocks.h). With SwiGLU few units
// are near zero, so less can be left out than with ReLU. Units that are left out are computed and multiplied by 0: nothing is faster.

#include "autograd/extension_ops.h"
#include "model/moe_extension.h"
#include "model/moe_modulated.h"
#include "model/moe_op.h"
#include "model/routing.h"
#include "model/slot_linear.h"
#include "model/unit_blocks.h"

namespace lightmoe {
namespace {

class Moefication : public MoeExtension {
 public:
  Moefication(const MoeDims& d, int64_t blocks)
      : blocks_(blocks),
        in_(declared_parameter({d.slots * blocks, d.hidden})),
        out_(declared_parameter({d.slots * blocks, blocks})) {}

  std::vector<ExtensionTensor> tensors() const override { return {{"select_in", in_}, {"select_out", out_}}; }

  MoeResult run(Tape& tape, const MoeCall& call) const override {
    const int64_t keep = call.routing != nullptr ? call.routing->unit_blocks : 0;
    if (keep == 0)
      return {.y = moe_experts(tape, call.x, call.layer, call.slots, call.gates, call.compute), .open = {}};
    check(keep >= 1 && keep <= blocks_, ErrorKind::kUsage, "--unit-blocks {}: expected 1 to {} blocks of an expert",
          keep, blocks_);
    const Tensor scores = call.routing->unit_oracle ? contributions(call) : selected(call);
    count_blocks(*call.routing, call.slots, call.layer.num_slots(), keep, blocks_);
    const ModulatedExperts in{.x_gate = call.x,
                              .x_up = call.x,
                              .slots = call.slots,
                              .gates = call.gates,
                              .scale = Tape::constant(keep_largest(scores, keep))};
    return {.y = modulated_experts(tape, in, call.layer, call.compute), .open = {}};
  }

 private:
  Tensor contributions(const MoeCall& call) const {
    const Tensor a = unit_activations(call.layer, call.x.value, call.slots, call.compute);
    return block_contributions(call.layer, a, call.slots, blocks_);
  }
  Tensor selected(const MoeCall& call) const {
    Tape tape(false);
    const int64_t slots = call.layer.num_slots();
    const Var hidden = activate(tape, slot_linear(tape, Tape::constant(call.x.value), call.slots, in_, nullptr, slots),
                                Activation::kTanh);
    // Every choice is a row of its own from here on.
    const Tensor own = call.slots.reshape({call.slots.numel(), 1});
    return slot_linear(tape, hidden, own, out_, nullptr, slots).value;
  }

  int64_t blocks_;
  ParameterPtr in_, out_;
};

const RegisterExtension kind{
    {.name = "moefication",
     .summary = "units inside experts in blocks, a selector picks those that run (split-units makes it)",
     .paper = "2110.01786",
     .settings = {{"blocks", 8}},
     .declare = [](const MoeDims& d, const ExtensionSettings& s) -> std::shared_ptr<MoeExtension> {
       return std::make_shared<Moefication>(d, s.at("blocks"));
     },
     .problem = [](const OlmoeConfig& c, const ExtensionSettings& s) -> std::string {
       return c.intermediate_size % s.at("blocks") == 0 ? "" : "blocks do not divide intermediate_size";
     },
     .own_experts = true,
     .runs_blocks = true,
     .may_be_left = true}};

}  // namespace
}  // namespace lightmoe
