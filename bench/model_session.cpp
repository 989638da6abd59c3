#include "bench/model_session.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <set>
#include <utility>

#include "compress/budget.h"
#include "kernels/gemm.h"
#include "kernels/simd.h"
#include "runtime/parallel.h"
#include "runtime/philox.h"

namespace lightmoe::bench {
namespace {

constexpr double kBeta = 0.5;
constexpr int64_t kBases = 3, kRank = 16;

// Of the whole model.
double removed_share(ModelKind kind) {
  if (kind == ModelKind::kLightMoe30) return 0.3;
  return kind == ModelKind::kLightMoe40 ? 0.4 : 0.5;
}

int64_t replaced_per_layer(const OlmoeConfig& config, ModelKind kind) {
  const ReplacementCost cost{.size = model_size(config), .bases = kBases, .rank = kRank};
  const int64_t target = target_parameters({.kind = BudgetKind::kWholeModel, .value = removed_share(kind)}, cost, 2);
  int64_t replaced = 0;
  while (cost.size.rest + config.num_layers * cost.layer_parameters(replaced) > target) ++replaced;
  return replaced;
}

ParameterPtr random_parameter(const std::string& name, const Shape& shape, DType dtype, uint64_t seed) {
  const MemoryScope scope(MemoryCategory::kWeights);
  const Tensor host = Tensor::empty(shape, DType::kF32, DeviceKind::kCpu);
  fill_normal(host.data<float>(), host.numel(), 0.02f, seed, 11);
  const auto p = std::make_shared<Parameter>();
  p->name = name, p->value = (dtype == DType::kF32 ? host : host.to(dtype)).on(default_device());
  return p;
}

Adapter random_adapter(const OlmoeConfig& c, const std::string& name, DType dtype, uint64_t seed) {
  const int64_t d = c.hidden_size, f = c.intermediate_size;
  const auto part = [&](const char* suffix, const Shape& shape) {
    return random_parameter(name + suffix, shape, dtype, seed);
  };
  return {.a_gate_up = part(".a_gate_up", {2 * kRank, d}),
          .b_gate = part(".b_gate", {f, kRank}),
          .b_up = part(".b_up", {f, kRank}),
          .a_down = part(".a_down", {kRank, f}),
          .b_down = part(".b_down", {d, kRank})};
}

Expert base_of(const Expert& expert, const std::string& name, bool copy) {
  const MemoryScope scope(MemoryCategory::kWeights);
  Expert base{.gate_up = std::make_shared<Parameter>(*expert.gate_up),
              .down = std::make_shared<Parameter>(*expert.down)};
  base.gate_up->name = name + ".gate_up", base.down->name = name + ".down";
  if (copy) base.gate_up->value = base.gate_up->value.clone(), base.down->value = base.down->value.clone();
  return base;
}

void compress_layer(const OlmoeConfig& c, MoeLayer& moe, int64_t replaced, ModelKind kind, const std::string& name) {
  const std::vector<Expert> originals = std::exchange(moe.experts, {});
  const DType dtype = originals[0].down->value.dtype();
  const auto is_replaced = [&](int64_t s) {  // evenly spread
    return (s + 1) * replaced / c.num_experts > s * replaced / c.num_experts;
  };
  std::vector<int64_t> gone;
  for (int64_t s = 0; s < c.num_experts; ++s) {
    if (is_replaced(s)) {
      gone.push_back(s);
    } else {
      moe.slots[static_cast<size_t>(s)].expert = static_cast<int32_t>(moe.experts.size());
      moe.experts.push_back(originals[static_cast<size_t>(s)]);
    }
  }
  const size_t first_base = moe.experts.size();
  for (size_t i = 0; i < gone.size(); ++i) {
    const size_t base = i % static_cast<size_t>(kBases);
    if (i == base) {
      moe.experts.push_back(base_of(originals[static_cast<size_t>(gone[i])], fmt::format("{}.base.{}", name, base),
                                    kind == ModelKind::kAnnealing));
    }
    moe.slots[static_cast<size_t>(gone[i])].expert = static_cast<int32_t>(first_base + base);
  }
  for (int64_t s = 0; s < c.num_experts; ++s) {
    if (is_for_inference(kind) && !is_replaced(s)) continue;
    moe.slots[static_cast<size_t>(s)].adapter = static_cast<int32_t>(moe.adapters.size());
    moe.adapters.push_back(random_adapter(c, fmt::format("{}.adapter.{}", name, s), dtype, static_cast<uint64_t>(s)));
  }
  if (is_for_inference(kind)) return;
  for (size_t e = 0; e < first_base; ++e) {
    moe.experts[e].gate_up->trainable = moe.experts[e].down->trainable = false;
  }
  moe.router->trainable = false;
  if (kind != ModelKind::kAnnealing) return;
  moe.beta = kBeta;
  for (const int64_t s : gone) {
    const Expert& original = originals[static_cast<size_t>(s)];
    original.gate_up->trainable = original.down->trainable = false;
    moe.annealed.push_back({.slot = static_cast<int32_t>(s), .original = original});
  }
}

void compress_in_place(Olmoe& model, ModelKind kind) {
  const int64_t replaced = replaced_per_layer(model.config, kind);
  if (!is_for_inference(kind)) model.set_trainable([](const std::string&) { return false; });
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    compress_layer(model.config, model.blocks[l].moe, replaced, kind, fmt::format("layer.{}", l));
  }
  if (is_for_inference(kind)) return;
  for (const Block& block : model.blocks) {
    for (const Adapter& a : block.moe.adapters) {
      for (const ParameterPtr& p : {a.a_gate_up, a.b_gate, a.b_up, a.a_down, a.b_down}) p->trainable = true;
    }
    for (size_t e = block.moe.experts.size() - static_cast<size_t>(kBases); e < block.moe.experts.size(); ++e) {
      block.moe.experts[e].gate_up->trainable = block.moe.experts[e].down->trainable = true;
    }
  }
  for (const ParameterPtr& p : model.parameters()) {  // as recovery keeps them
    if (p->trainable && p->value.dtype() == DType::kBF16) p->value = p->value.to(DType::kF32);
  }
}

class Counting {
 public:
  explicit Counting(const Olmoe& model) : model_(model) {}
  void matrix(const Parameter& p, double rows, double reads) {
    const double flop = 2 * static_cast<double>(p.value.numel()) * rows;
    work.linear_flop += flop;
    if (p.trainable) work.trained_flop += flop;
    work.weight_bytes += static_cast<double>(p.value.bytes()) * reads;
  }
  void experts(const RouterView& view) {
    const MoeLayer& moe = model_.blocks[static_cast<size_t>(view.layer)].moe;
    const int64_t tokens = view.slots.dim(0), chosen = view.slots.dim(1);
    const Tensor slots = view.slots.on(DeviceKind::kCpu);
    for (int64_t t = 0; t < tokens; ++t) {
      std::set<int32_t> stored;
      for (int64_t k = 0; k < chosen; ++k) {
        const Slot& slot = moe.slots[static_cast<size_t>(slots.data<int32_t>()[t * chosen + k])];
        stored.insert(slot.expert);
        if (slot.adapter < 0) continue;
        const Adapter& a = moe.adapters[static_cast<size_t>(slot.adapter)];
        for (const ParameterPtr& p : {a.a_gate_up, a.b_gate, a.b_up, a.a_down, a.b_down}) matrix(*p, 1, 1);
      }
      for (const int32_t e : stored) {
        const Expert& expert = moe.experts[static_cast<size_t>(e)];
        matrix(*expert.gate_up, 1, 1), matrix(*expert.down, 1, 1);
      }
    }
    const double rows = static_cast<double>(tokens);
    const AttentionWeights& a = model_.blocks[static_cast<size_t>(view.layer)].attention;
    for (const ParameterPtr& p : {a.q, a.k, a.v, a.o, moe.router}) matrix(*p, rows, rows);
  }
  void scores(double pairs) {  // (query, key) pairs of one layer and head
    const OlmoeConfig& c = model_.config;
    work.score_flop += 4 * pairs * static_cast<double>(c.num_layers * c.num_heads * c.head_dim());
  }
  PassWork work;

 private:
  const Olmoe& model_;
};

}  // namespace

std::unique_ptr<Olmoe> make_model(const OlmoeConfig& config, DType weights, ModelKind kind) {
  std::unique_ptr<Olmoe> model = random_model(config, weights, 1);
  if (kind != ModelKind::kOriginal) compress_in_place(*model, kind);
  return model;
}

ModelSession& ModelSession::get(const std::string& shape, DType weights, ModelKind kind) {
  static ModelSession session;
  const bool loaded = session.model_ && session.shape_ == shape && session.weights_ == weights;
  if (loaded && session.kind_ == kind) return session;
  session.optimizer_.reset();
  if (loaded && session.kind_ == ModelKind::kOriginal && is_for_inference(kind)) {
    for (const ParameterPtr& p : session.model_->parameters()) p->grad.reset();
  } else {
    session.model_.reset();
    trim_memory_cache();
    session.model_ = random_model(named_config(shape).value(), weights, 1);
  }
  if (kind != ModelKind::kOriginal) compress_in_place(*session.model_, kind);
  trim_memory_cache();
  session.shape_ = shape, session.weights_ = weights, session.kind_ = kind;
  return session;
}

int64_t ModelSession::original_bytes() const {
  return model_size(model_->config).total() * static_cast<int64_t>(size_of(weights_));
}

PassWork ModelSession::count(const Batch& batch, bool all_logits) {
  Counting counting(*model_);
  const Observer observer{.on_hidden = {}, .on_router = [&](const RouterView& view) { counting.experts(view); }};
  model_->forward(batch, {.compute = GemmCompute::kBF16, .observer = &observer});
  const double tokens = static_cast<double>(batch.tokens());
  counting.matrix(*model_->lm_head, all_logits ? tokens : 1, tokens);
  const AttentionSequences& s = batch.sequences;
  const Tensor lengths = s.k_count.on(DeviceKind::kCpu);
  for (int64_t n = 0; n < lengths.dim(0); ++n) {
    const double length = lengths.data<int32_t>()[n];
    counting.scores(length * (length + 1) / 2);
  }
  return counting.work;
}

PassWork ModelSession::count_decode(const Batch& batch, int64_t length) {
  PassWork work = count(batch, true);  // the routing of a token does not depend on how it is batched
  const OlmoeConfig& c = model_->config;
  const double keys = static_cast<double>(batch.tokens() * length), size = weights_ == DType::kBF16 ? 2 : 4;
  work.weight_bytes += 2 * size * keys * static_cast<double>(c.num_layers * c.num_kv_heads * c.head_dim());
  return work;
}

void ModelSession::train_step(const Batch& batch, GemmCompute compute, int64_t passes) {
  optimizer_->zero_grad();
  const double labels = static_cast<double>(passes * (batch.tokens() - batch.sequences.k_count.dim(0)));
  const double share = 1 / static_cast<double>(passes);
  for (int64_t i = 0; i < passes; ++i)
    model_->forward_backward(batch, {.compute = compute, .loss_scale = 1 / labels, .aux_coef = 0.01 * share});
  optimizer_->step(1e-4, optimizer_->gradient_norm());
}

void ModelSession::start_training(const Batch& batch, GemmCompute compute) {
  if (optimizer_) return;
  optimizer_ = std::make_unique<Optimizer>(model_->parameters(), OptimizerOptions{});
  for (int i = 0; i < 2; ++i) train_step(batch, compute);
}

}  // namespace lightmoe::bench
