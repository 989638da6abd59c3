#include "model/olmoe.h"

#include <algorithm>
#include <unordered_set>

#include "autograd/extension_ops.h"
#include "model/block.h"
#include "model/training_pass.h"
#include "runtime/device_room.h"
#include "runtime/trace.h"

namespace lightmoe {
namespace {

// A block in training: out, what the balancing loss reads, and how open blocks of units are, where there are any. kBlock keeps the sum
// that comes in alone and runs the block again in backward.
struct BlockPass {
  Residual out;
  Var probs;
  Tensor slots;
  Var open;
};
BlockPass block_pass(Tape& tape, Residual in, const Block& block, const BlockContext& context, Recompute recompute) {
  if (recompute != Recompute::kBlock) {
    MoeHalf half = moe_half(tape, attention_half(tape, std::move(in), block, context), block, context, recompute);
    return {std::move(half.out), half.routing.probs, half.routing.slots, half.open};
  }
  const auto whole = [&block, context](Tape& t, const std::vector<Var>& x) -> std::vector<Var> {
    const MoeHalf half = moe_half(t, attention_half(t, {x[0], {}}, block, context), block, context, Recompute::kBlock);
    std::vector<Var> out{add_in_place(t, half.out.x, half.out.branch), half.routing.probs,
                         Tape::constant(half.routing.slots)};
    if (half.open.value.defined()) out.push_back(half.open);
    return out;
  };
  const std::vector<Var> out = tape.checkpoint({in.x}, whole);
  return {{out[0], {}}, out[1], out[2].value, out.size() > 3 ? out[3] : Var{}};
}

void drop_repeated(std::vector<ParameterPtr>& list) {
  std::unordered_set<const Parameter*> seen;
  std::erase_if(list, [&](const ParameterPtr& p) { return !seen.insert(p.get()).second; });
}

}  // namespace

Tensor run_blocks(const Olmoe& model, const Tensor& ids, BlockContext context) {
  Tape tape(false);
  Residual state{embedding(tape, ids, model.embedding), {}};
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    context.layer = static_cast<int>(l);
    state = attention_half(tape, std::move(state), model.blocks[l], context);
    state = moe_half(tape, std::move(state), model.blocks[l], context, Recompute::kNone).out;
  }
  const Tensor hidden = final_norm(tape, state, model).value;
  if (context.observer != nullptr && context.observer->on_hidden) {
    context.observer->on_hidden(static_cast<int>(model.blocks.size()), hidden);
  }
  return hidden;
}

KvCache::KvCache(const OlmoeConfig& config, int64_t sequences, int64_t max, DType dtype)
    : lengths(static_cast<size_t>(sequences), 0), max_length(max) {
  const MemoryScope scope(MemoryCategory::kKvCache);
  const Shape shape{sequences * max_length, config.num_kv_heads * config.head_dim()};
  require_device_room(2 * config.num_layers * shape.numel() * static_cast<int64_t>(size_of(dtype)),
                      fmt::format("the cache of keys and values of {} sequences of {} tokens", sequences, max_length),
                      "generate fewer sequences or tokens at a time");
  for (int64_t l = 0; l < config.num_layers; ++l) {
    k.push_back(Tensor::empty(shape, dtype));
    v.push_back(Tensor::empty(shape, dtype));
  }
}

std::vector<ParameterPtr> Olmoe::parameters() const {
  std::vector<ParameterPtr> all{embedding};
  for (const Block& block : blocks) {
    const AttentionWeights& a = block.attention;
    all.insert(all.end(), {block.input_norm, a.q, a.k, a.v, a.o, a.q_norm, a.k_norm, block.post_attention_norm});
    const std::vector<ParameterPtr> moe = block.moe.parameters();
    all.insert(all.end(), moe.begin(), moe.end());
  }
  drop_repeated(all);  // experts in the banks of several layers
  all.push_back(final_norm);
  if (lm_head != embedding) all.push_back(lm_head);
  return all;
}

void Olmoe::set_trainable(const std::function<bool(const std::string& name)>& rule) {
  for (const ParameterPtr& p : parameters()) {
    p->trainable = rule(p->name);
    if (!p->trainable) p->grad.reset();
  }
}

int64_t Olmoe::num_parameters() const {
  int64_t count = 0;
  for (const ParameterPtr& p : parameters()) count += p->value.numel();
  return count;
}

int64_t Olmoe::stored_bytes() const {
  int64_t bytes = 0;
  for (const ParameterPtr& p : parameters()) bytes += p->value.bytes();
  return bytes;
}

Tensor Olmoe::forward(const Batch& batch, const ForwardOptions& options) const {
  const TraceRange trace(TraceLevel::kPhase, "forward", batch.tokens());
  return run_blocks(*this, batch.ids,
                    {.config = config,
                     .positions = batch.positions,
                     .sequences = batch.sequences,
                     .compute = options.compute,
                     .observer = options.observer,
                     .routing = options.routing});
}

Tensor Olmoe::forward_cached(const std::vector<int32_t>& ids, const std::vector<int32_t>& counts, KvCache& cache,
                             const ForwardOptions& options) const {
  const TraceRange trace(TraceLevel::kPhase, "forward_cached", static_cast<int64_t>(ids.size()));
  require(counts.size() == cache.lengths.size(), "forward_cached: {} counts for a cache of {} sequences", counts.size(),
          cache.lengths.size());
  std::vector<int32_t> positions, cache_rows, q_begin{0}, k_begin, k_count;
  for (size_t n = 0; n < counts.size(); ++n) {
    const int32_t used = cache.lengths[n];
    require(counts[n] >= 0 && used + counts[n] <= cache.max_length,
            "forward_cached: sequence {} has {} tokens and {} new ones, the cache holds {}", n, used, counts[n],
            cache.max_length);
    k_begin.push_back(static_cast<int32_t>(static_cast<int64_t>(n) * cache.max_length));
    for (int32_t j = 0; j < counts[n]; ++j) {
      positions.push_back(used + j);
      cache_rows.push_back(k_begin.back() + used + j);
    }
    q_begin.push_back(q_begin.back() + counts[n]);
    k_count.push_back(used + counts[n]);
  }
  require(positions.size() == ids.size(), "forward_cached: {} ids, the counts say {}", ids.size(), positions.size());
  const auto tensor = [](const std::vector<int32_t>& values) {
    return Tensor::from(values, {static_cast<int64_t>(values.size())});
  };
  const AttentionSequences sequences{.q_begin = tensor(q_begin),
                                     .k_begin = tensor(k_begin),
                                     .k_count = tensor(k_count),
                                     .q_pos = tensor(cache.lengths)};
  const Tensor hidden = run_blocks(*this, tensor(ids),
                                   {.config = config,
                                    .positions = tensor(positions),
                                    .sequences = sequences,
                                    .compute = options.compute,
                                    .cache = &cache,
                                    .cache_rows = tensor(cache_rows),
                                    .observer = options.observer,
                                    .routing = options.routing});
  for (size_t n = 0; n < counts.size(); ++n) cache.lengths[n] += counts[n];
  return hidden;
}

Tensor Olmoe::logits(const Tensor& hidden, const ForwardOptions& options) const {
  Tape tape(false);
  return linear(tape, Tape::constant(hidden), lm_head, options.compute).value;
}

TrainLosses Olmoe::forward_backward(const Batch& batch, const TrainOptions& options) {
  return forward_backward_with(*this, batch, options, [&](Tape& tape, const Var& states) {
    const Loss ce = lm_head_loss(tape, states, lm_head, batch.labels, options.loss_scale, options.compute);
    return [ce] { return ce.value(); };
  });
}

TrainLosses forward_backward_with(Olmoe& model, const Batch& batch, const TrainOptions& options, const LossRoot& root) {
  require(batch.labels.defined(), "forward_backward: the batch has no labels");
  TrainLosses losses{.labels = batch.num_labels};
  std::function<double()> ce;
  Loss aux, entropy, open;
  Tape tape;
  {
    const TraceRange trace(TraceLevel::kPhase, "forward", batch.tokens());
    BlockContext context{.config = model.config,
                         .positions = batch.positions,
                         .sequences = batch.sequences,
                         .compute = options.compute,
                         .cache_rows = {},
                         .observer = options.observer};
    std::vector<Var> probs, opens;
    std::vector<Tensor> slots;
    Residual state{embedding(tape, batch.ids, model.embedding), {}};
    for (size_t l = 0; l < model.blocks.size(); ++l) {
      context.layer = static_cast<int>(l);
      BlockPass pass = block_pass(tape, std::move(state), model.blocks[l], context, options.recompute);
      state = std::move(pass.out);
      probs.push_back(pass.probs);
      slots.push_back(pass.slots);
      if (pass.open.value.defined()) opens.push_back(pass.open);
    }
    ce = root(tape, final_norm(tape, state, model));
    Tape reporting(false);
    const double aux_scale = options.aux_coef * options.aux_scale;
    aux = load_balance_loss(aux_scale != 0 ? tape : reporting, probs, slots, batch.mask, aux_scale);
    const double entropy_scale = options.entropy_coef * options.aux_scale;
    if (entropy_scale != 0) entropy = router_entropy_loss(tape, probs, batch.mask, entropy_scale);
    const double sparsity_scale = options.sparsity_coef * options.aux_scale;
    check(sparsity_scale == 0 || !opens.empty(), ErrorKind::kUsage,
          "a sparsity loss needs an extension with gates of blocks of units (dsmoe); the model has none");
    if (sparsity_scale != 0) open = openness_loss(tape, opens, batch.mask, sparsity_scale);
  }
  const TraceRange trace(TraceLevel::kPhase, "backward", batch.tokens());
  tape.backward();
  for (const ParameterPtr& p : model.parameters()) {
    if (p->trainable) p->ensure_grad();
  }
  losses.ce_sum = ce(), losses.aux = aux.value();  // the host waits here and nowhere before
  if (entropy.sum.defined()) losses.entropy = entropy.value();
  if (open.sum.defined()) losses.open = open.value();
  return losses;
}

}  // namespace lightmoe
