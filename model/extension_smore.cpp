// S'MoRE (arXiv 2504.06426; code ZimpleX/SMoRE-LLM): low-rank residuals in a tree of two levels, whose branches are picked a token.
//   x' = P x [g];  a token picks f of s parents:  w = softmax over the f largest of K1 x'
//   parent i picks f of s children:               v_i = softmax over the f largest of Kx x' + Kp K1_i
//   h1_i = sum_j v_ij tanh(B0_j A0_j x)  [d1 = s r];   h2 = sum_i w_i tanh(B1_i A1_i x + W h1_i)  [d2 = 2 s r];   side(x) = W_final h2
// Published: any number of levels, in place of LoRA in attention and FFN; this is its "linear" gate (the parent's key joins the projected
// x), without biases, noise and balancing loss. Ours: two levels of one size, beside the experts; every branch is computed and those that
// were not picked are multiplied by 0. W_final starts at zero: the block is what it was.

#include "autograd/extension_ops.h"
#include "model/moe_extension.h"

namespace lightmoe {
namespace {

class Smore : public MoeExtension {
 public:
  Smore(const MoeDims& d, int64_t residuals, int64_t fanout, int64_t rank, int64_t gate)
      : s_(residuals),
        fanout_(fanout),
        project_(declared_parameter({gate, d.hidden})),
        parent_keys_(declared_parameter({s_, gate})),
        child_keys_x_(declared_parameter({s_, gate})),
        child_keys_parent_(declared_parameter({s_, gate})),
        a0_(declared_parameter({s_ * rank, d.hidden})),
        b0_(declared_parameter({s_ * s_ * rank, rank})),
        a1_(declared_parameter({s_ * rank, d.hidden})),
        b1_(declared_parameter({s_ * 2 * s_ * rank, rank})),
        lift_(declared_parameter({2 * s_ * rank, s_ * rank})),
        final_(declared_parameter({d.hidden, 2 * s_ * rank})) {}

  std::vector<ExtensionTensor> tensors() const override {
    return {{"project", project_},
            {"parent_keys", parent_keys_},
            {"child_keys_x", child_keys_x_},
            {"child_keys_parent", child_keys_parent_},
            {"a0", a0_},
            {"b0", b0_},
            {"a1", a1_},
            {"b1", b1_},
            {"lift", lift_},
            {"final", final_, ExtensionStart::kZero}};
  }

  MoeResult run(Tape& tape, const MoeCall& call) const override {
    const int64_t tokens = call.x.value.dim(0), d1 = lift_->value.dim(1), d2 = lift_->value.dim(0);
    const auto of = [&](const Var& x, const ParameterPtr& w) { return linear(tape, x, w, call.compute); };
    const auto residuals = [&](const ParameterPtr& a, const ParameterPtr& b) {
      return block_linear(tape, of(call.x, a), b, s_, call.compute);
    };
    const Var x = of(call.x, project_);
    const Var parents = softmax_top(tape, of(x, parent_keys_), fanout_);
    const Var of_parent = of(parameter_value(tape, parent_keys_, x.value.dtype()), child_keys_parent_);
    const Var logits = reshaped(tape, add_tiled(tape, of(x, child_keys_x_), of_parent), {tokens * s_, s_});
    const Var children = reshaped(tape, softmax_top(tape, logits, fanout_), {tokens, s_ * s_});
    const Var leaves = activate(tape, residuals(a0_, b0_), Activation::kTanh);
    const Var h1 = reshaped(tape, mix_blocks(tape, leaves, children, s_), {tokens * s_, d1});
    const Var lifted = reshaped(tape, of(h1, lift_), {tokens, s_ * d2});
    const Var branches = activate(tape, add_in_place(tape, lifted, residuals(a1_, b1_)), Activation::kTanh);
    const Var side = of(mix_blocks(tape, branches, parents, s_), final_);
    return {.y = beside_experts(tape, call, side), .open = {}};
  }

 private:
  int64_t s_, fanout_;
  ParameterPtr project_, parent_keys_, child_keys_x_, child_keys_parent_, a0_, b0_, a1_, b1_, lift_, final_;
};

const RegisterExtension kind{
    {.name = "smore",
     .summary = "low-rank residuals in a tree of two levels beside the experts, branches picked by gates",
     .paper = "2504.06426",
     .settings = {{"residuals", 4}, {"fanout", 2}, {"rank", 2}, {"gate", 16}},
     .declare = [](const MoeDims& d, const ExtensionSettings& s) -> std::shared_ptr<MoeExtension> {
       return std::make_shared<Smore>(d, s.at("residuals"), s.at("fanout"), s.at("rank"), s.at("gate"));
     },
     .problem = [](const OlmoeConfig&, const ExtensionSettings& s) -> std::string {
       return s.at("fanout") <= s.at("residuals") ? "" : "fanout is more than residuals";
     }}};

}  // namespace
}  // namespace lightmoe
