#include "model/block.h"

#include "kernels/indexing.h"
#include "model/moe_extension.h"
#include "model/moe_groups.h"
#include "model/moe_op.h"
#include "model/moe_widths.h"
#include "runtime/trace.h"

namespace lightmoe {
namespace {

Normed norm_of(Tape& tape, Residual in, const ParameterPtr& weight, const BlockContext& context) {
  return add_rms_norm(tape, in.x, in.branch, weight, context.config.rms_norm_eps);
}

}  // namespace

Residual attention_half(Tape& tape, Residual in, const Block& block, const BlockContext& context) {
  const TraceRange trace(TraceLevel::kLayer, "attention", in.x.value.dim(0), context.layer);
  const OlmoeConfig& config = context.config;
  const AttentionWeights& w = block.attention;
  const int64_t head_dim = config.head_dim();
  Normed n = norm_of(tape, std::move(in), block.input_norm, context);
  if (context.observer != nullptr && context.observer->on_hidden) {
    context.observer->on_hidden(context.layer, n.sum.value);
  }
  QueriesKeys qk{linear(tape, n.y, w.q, context.compute), linear(tape, n.y, w.k, context.compute)};
  Var v = linear(tape, n.y, w.v, context.compute);
  n.y = {};
  QkNorm norm{.q = w.q_norm, .k = w.k_norm, .eps = config.rms_norm_eps};
  if (config.clip_qkv) norm.limit = *config.clip_qkv, v = clamp(tape, v, norm.limit);
  qk = qk_norm_rope(tape, qk, norm, {.positions = context.positions, .head_dim = head_dim, .theta = config.rope_theta});
  if (context.cache != nullptr) {
    const auto layer = static_cast<size_t>(context.layer);
    run(ScatterRows{.x = qk.k.value, .index = context.cache_rows, .y = context.cache->k[layer]});
    run(ScatterRows{.x = v.value, .index = context.cache_rows, .y = context.cache->v[layer]});
    qk.k = Tape::constant(context.cache->k[layer]), v = Tape::constant(context.cache->v[layer]);
  }
  Var out = attention(tape, qk.q, qk.k, v, context.sequences, head_dim);
  qk = {}, v = {};
  return {n.sum, linear(tape, out, w.o, context.compute)};
}

namespace {

// Every token to every slot, with one weight per slot as its gate.
void route_to_every_slot(Tape& tape, Routing& r, int64_t tokens, const ParameterPtr& weights) {
  const int64_t slots = weights->value.numel();
  r.slots = Tensor::empty({tokens, slots}, DType::kI32, DeviceKind::kCpu);
  const Tensor gates = Tensor::empty({tokens, slots}, DType::kF32, DeviceKind::kCpu);
  for (int64_t i = 0; i < tokens * slots; ++i) {
    r.slots.data<int32_t>()[i] = static_cast<int32_t>(i % slots);
    gates.data<float>()[i] = weights->value.data<float>()[i % slots];
  }
  r.gates = Tape::output(gates, weights->trainable);
  r.plan = {};
  if (!tape.wants(r.gates)) return;
  tape.record(r.gates, [weights, slots](const Tensor& dy) {
    float* dw = weights->ensure_grad().data<float>();
    for (int64_t i = 0; i < dy.numel(); ++i) dw[i % slots] += dy.data<float>()[i];
  });
}

}  // namespace

MoeHalf moe_half(Tape& tape, Residual in, const Block& block, const BlockContext& context, Recompute recompute) {
  const TraceRange trace(TraceLevel::kLayer, "moe", in.x.value.dim(0), context.layer);
  const OlmoeConfig& config = context.config;
  const MoeLayer& layer = block.moe;
  Normed normed = norm_of(tape, std::move(in), block.post_attention_norm, context);
  Var n = std::move(normed.y);
  // The router makes the dispatch plan as well, unless the slots change before they are dispatched.
  const MoeGroups groups(layer, moe_execution().base_once);
  const DispatchGroups dispatched{groups.group_of_slot, std::ssize(groups.groups)};
  const bool plans =
      context.routing == nullptr && layer.extension == nullptr && groups.lane_of_slot.empty() && has_one_width(layer);
  MoeHalf half{.out = {},
               .routing = router(tape, n, layer.router, removed_mask(layer),
                                 experts_per_token(context.routing, config.num_experts_per_token),
                                 config.norm_topk_prob, plans ? &dispatched : nullptr)};
  Routing& r = half.routing;
  if (context.observer != nullptr && context.observer->on_router) {
    context.observer->on_router({.layer = context.layer,
                                 .x = n.value,
                                 .logits = r.logits,
                                 .probs = r.probs.value,
                                 .slots = r.slots,
                                 .gates = r.gates.value});
  }
  if (context.routing != nullptr) {
    const RoutedTokens left = apply_routing(*context.routing, context.layer, layer.num_slots(), config.norm_topk_prob,
                                            {r.slots, r.gates.value});
    r.slots = left.slots, r.gates.value = left.gates;
  }
  if (context.slot_weights != nullptr) {
    check(is_host_memory(n.value.device()), ErrorKind::kDevice, "slot weights are learned on the CPU only, not on {}",
          name_of(n.value.device()));
    route_to_every_slot(tape, r, n.value.dim(0), (*context.slot_weights)[static_cast<size_t>(context.layer)]);
  }
  const auto experts = [&layer, slots = r.slots, plan = std::exchange(r.plan, {}), compute = context.compute,
                        routing = context.routing](Tape& t, const std::vector<Var>& in) {
    const MoeResult result = run_moe(t, {.x = in[0],
                                         .layer = layer,
                                         .slots = slots,
                                         .gates = in[1],
                                         .compute = compute,
                                         .routing = routing,
                                         .plan = plan ? &*plan : nullptr});
    return result.open.value.defined() ? std::vector<Var>{result.y, result.open} : std::vector<Var>{result.y};
  };
  std::vector<Var> y =
      recompute == Recompute::kMoe ? tape.checkpoint({n, r.gates}, experts) : experts(tape, {n, r.gates});
  half.out = {std::move(normed.sum), y[0]};
  if (y.size() > 1) half.open = y[1];
  return half;
}

Var final_norm(Tape& tape, const Residual& in, const Olmoe& model) {
  return add_rms_norm(tape, in.x, in.branch, model.final_norm, model.config.rms_norm_eps).y;
}

}  // namespace lightmoe
