// Compressed Experts (arXiv 2503.00634; OLMoE modelling file of neilwen987/Compressed-Experts-ts): of a token's K choices the last `auxiliary`
// are not run; each of them is three vectors, ces [E,3,D], that change how the others, the main ones, run:
//   w = gates of the auxiliaries over their sum;  (e1, e2, e3) = sum_a w_a ces[a]
//   y = sum over the main ones of g_i W_d ((silu(W_g (x * e1)) * (W_u (x * e3))) * e2),  e2's first F entries
// Published: 4 of 8, the whole model fine-tuned with the vectors. They start at ones: plain top K - auxiliary, untrained. Ours: a token whose
// auxiliaries have no gates left (skipped at run time) takes ones.

#include "autograd/extension_ops.h"
#include "kernels/contraction.h"
#include "kernels/indexing.h"
#include "model/moe_extension.h"
#include "model/moe_modulated.h"

namespace lightmoe {
namespace {

class CompressedExperts : public MoeExtension {
 public:
  CompressedExperts(const MoeDims& d, int64_t auxiliary)
      : auxiliary_(auxiliary), width_(d.width), table_(declared_parameter({d.slots, 3, d.hidden})) {}

  std::vector<ExtensionTensor> tensors() const override { return {{"ces", table_, ExtensionStart::kOne}}; }

  MoeResult run(Tape& tape, const MoeCall& call) const override {
    const int64_t main = call.slots.dim(1) - auxiliary_, d = call.x.value.dim(1);
    check(main >= 1, ErrorKind::kUsage, "compressed-experts: {} choices a token, of which {} are auxiliary",
          call.slots.dim(1), auxiliary_);
    const Var weights = normalised_rows(tape, columns(tape, call.gates, main, auxiliary_));
    const Var table =
        reshaped(tape, parameter_value(tape, table_, call.x.value.dtype()), {table_->value.dim(0), 3 * d});
    const Var e = mix_rows(tape, table, part(call.slots, main, auxiliary_), weights);
    fill_empty_rows(e.value, weights.value);
    const ModulatedExperts in{.x_gate = multiply(tape, call.x, columns(tape, e, 0, d)),
                              .x_up = multiply(tape, call.x, columns(tape, e, 2 * d, d)),
                              .slots = part(call.slots, 0, main),
                              .gates = columns(tape, call.gates, 0, main),
                              .scale = columns(tape, e, d, width_)};
    return {.y = modulated_experts(tape, in, call.layer, call.compute), .open = {}};
  }

 private:
  static Tensor part(const Tensor& slots, int64_t begin, int64_t count) {
    const int64_t tokens = slots.dim(0), top_k = slots.dim(1);
    std::vector<int32_t> places;
    for (int64_t i = 0; i < tokens * count; ++i)
      places.push_back(static_cast<int32_t>(i / count * top_k + begin + i % count));
    const Tensor out = Tensor::empty({tokens, count}, DType::kI32);
    lightmoe::run(
        Lookup{.table = slots.reshape({tokens * top_k}), .index = Tensor::from(places, {tokens, count}), .y = out});
    return out;
  }
  // Rows of tokens without weights are 0 and become 1; the table has no part in them.
  static void fill_empty_rows(const Tensor& e, const Tensor& weights) {
    const int64_t tokens = e.dim(0), n = e.dim(1), k = weights.dim(1);
    const Tensor sums = Tensor::empty({tokens}, weights.dtype());
    lightmoe::run(Contraction{.shape = {tokens, 1, 1}, .terms = k, .a = {weights, {k}, 1}, .b = {}, .y = {sums, {1}}});
    lightmoe::run(Activate{.kind = Activation::kIsZero, .x = sums, .y = sums});
    lightmoe::run(Contraction{
        .shape = {tokens, 1, n}, .a = {sums.to(e.dtype()), {1}}, .b = {}, .y = {e, {n, 0, 1}}, .accumulate = true});
  }

  int64_t auxiliary_, width_;
  ParameterPtr table_;
};

const RegisterExtension kind{
    {.name = "compressed-experts",
     .summary = "the last choices of a token are vectors that change how its first ones run",
     .paper = "2503.00634",
     .settings = {{"auxiliary", 2}},
     .declare = [](const MoeDims& d, const ExtensionSettings& s) -> std::shared_ptr<MoeExtension> {
       return std::make_shared<CompressedExperts>(d, s.at("auxiliary"));
     },
     .problem = [](const OlmoeConfig& c, const ExtensionSettings& s) -> std::string {
       if (c.intermediate_size > c.hidden_size) return "takes experts that are no wider than hidden_size";
       return s.at("auxiliary") < c.num_experts_per_token ? "" : "auxiliary leaves no main choice of a token";
     },
     .own_experts = true}};

}  // namespace
}  // namespace lightmoe
