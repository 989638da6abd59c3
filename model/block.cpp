#include "model/block.h"

#include "kernels/indexing.h"
#include "model/moe_extension.h"
#include "model/moe_op.h"
#include "runtime/trace.h"

namespace lightmoe {
namespace {

Var projection(Tape& tape, const Var& x, const ParameterPtr& weight, const ParameterPtr& norm,
               const BlockContext& context) {
  Var y = linear(tape, x, weight, context.compute);
  if (norm != nullptr) y = rms_norm(tape, y, norm, context.config.rms_norm_eps);
  if (context.config.clip_qkv) y = clamp(tape, y, *context.config.clip_qkv);
  return y;
}

}  // namespace

Var attention_half(Tape& tape, const Var& x, const Block& block, const BlockContext& context) {
  const TraceRange trace(TraceLevel::kLayer, "attention", x.value.dim(0), context.layer);
  const OlmoeConfig& config = context.config;
  const AttentionWeights& w = block.attention;
  const int64_t head_dim = config.head_dim();
  Var n = rms_norm(tape, x, block.input_norm, config.rms_norm_eps);
  Var q = projection(tape, n, w.q, w.q_norm, context);
  Var k = projection(tape, n, w.k, w.k_norm, context);
  Var v = projection(tape, n, w.v, nullptr, context);
  n = {};
  q = rope_in_place(tape, q, context.positions, head_dim, config.rope_theta);
  k = rope_in_place(tape, k, context.positions, head_dim, config.rope_theta);
  if (context.cache != nullptr) {
    const auto layer = static_cast<size_t>(context.layer);
    run(ScatterRows{.x = k.value, .index = context.cache_rows, .y = context.cache->k[layer]});
    run(ScatterRows{.x = v.value, .index = context.cache_rows, .y = context.cache->v[layer]});
    k = Tape::constant(context.cache->k[layer]), v = Tape::constant(context.cache->v[layer]);
  }
  Var out = attention(tape, q, k, v, context.sequences, head_dim);
  q = k = v = {};
  return add_in_place(tape, x, linear(tape, out, w.o, context.compute));
}

namespace {

// gates[t,k] * weights[slots[t,k]]
Var weighted_by_slot(Tape& tape, const Var& gates, const Tensor& slots, const ParameterPtr& weights) {
  check(is_host_memory(slots.device()), ErrorKind::kDevice, "slot weights are learned on the CPU only, not on {}",
        name_of(slots.device()));
  const int64_t count = gates.value.numel();
  const auto weighted = [slots, count, weights](const Tensor& values) {
    const Tensor y = Tensor::empty(values.shape(), DType::kF32);
    for (int64_t i = 0; i < count; ++i) {
      y.data<float>()[i] = values.data<float>()[i] * weights->value.data<float>()[slots.data<int32_t>()[i]];
    }
    return y;
  };
  const Var y = Tape::output(weighted(gates.value), gates.needs_grad() || weights->trainable);
  if (!tape.wants(y)) return y;
  tape.record(y, [=, g = gates.value, dgates = gates.grad](const Tensor& dy) {
    if (dgates) dgates->add(weighted(dy));
    if (!weights->trainable) return;
    float* dw = weights->ensure_grad().data<float>();
    for (int64_t i = 0; i < count; ++i) dw[slots.data<int32_t>()[i]] += dy.data<float>()[i] * g.data<float>()[i];
  });
  return y;
}

}  // namespace

MoeHalf moe_half(Tape& tape, const Var& x, const Block& block, const BlockContext& context, Recompute recompute) {
  const TraceRange trace(TraceLevel::kLayer, "moe", x.value.dim(0), context.layer);
  const OlmoeConfig& config = context.config;
  const MoeLayer& layer = block.moe;
  Var n = rms_norm(tape, x, block.post_attention_norm, config.rms_norm_eps);
  MoeHalf half{
      .out = {},
      .routing = router(tape, n, layer.router, removed_mask(layer),
                        experts_per_token(context.routing, config.num_experts_per_token), config.norm_topk_prob)};
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
    r.gates = weighted_by_slot(tape, r.gates, r.slots, (*context.slot_weights)[static_cast<size_t>(context.layer)]);
  }
  const auto experts = [&layer, slots = r.slots, compute = context.compute, routing = context.routing](
                           Tape& t, const std::vector<Var>& in) {
    const MoeResult result = run_moe(
        t, {.x = in[0], .layer = layer, .slots = slots, .gates = in[1], .compute = compute, .routing = routing});
    return result.open.value.defined() ? std::vector<Var>{result.y, result.open} : std::vector<Var>{result.y};
  };
  std::vector<Var> y =
      recompute == Recompute::kMoe ? tape.checkpoint({n, r.gates}, experts) : experts(tape, {n, r.gates});
  n = {};
  half.out = add_in_place(tape, x, y[0]);
  if (y.size() > 1) half.open = y[1];
  return half;
}

}  // namespace lightmoe
