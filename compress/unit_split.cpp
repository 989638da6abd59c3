#include "compress/unit_split.h"

#include <algorithm>
#include <cmath>

#include "compress/balanced_kmeans.h"
#include "compress/unit_selector.h"
#include "model/extend.h"
#include "model/moe_modulated.h"
#include "model/moe_widths.h"
#include "model/unit_blocks.h"

namespace lightmoe {
namespace {

constexpr int64_t kHeldOut = 5;       // every fifth token
constexpr int64_t kFewestTokens = 8;  // an expert that fewer chose is split and taught on all of the sample

// The sample as one layer's experts see it.
class LayerInputs {
 public:
  LayerInputs(const Statistics& s, const Olmoe& model, size_t layer)
      : hidden_(s.hidden), rows_(s.layers[layer].sample_inputs.data()) {
    const MoeLayer& moe = model.blocks[layer].moe;
    const auto top_k = static_cast<size_t>(model.config.num_experts_per_token);
    chosen_.resize(moe.slots.size());
    for (int64_t t = 0; t < s.sample_size(); ++t) {
      const float* logits = s.layers[layer].sample_logits.data() + t * s.num_slots;
      std::vector<int32_t> order;
      for (size_t e = 0; e < moe.slots.size(); ++e) {
        if (moe.slots[e].kind != SlotKind::kRemoved) order.push_back(static_cast<int32_t>(e));
      }
      std::stable_sort(order.begin(), order.end(), [logits](int32_t a, int32_t b) { return logits[a] > logits[b]; });
      for (size_t k = 0; k < top_k; ++k) chosen_[static_cast<size_t>(order[k])].push_back(t);
      all_.push_back(t);
    }
  }

  // Tokens that chose the slot.
  const std::vector<int64_t>& tokens(size_t slot) const {
    return std::ssize(chosen_[slot]) < kFewestTokens ? all_ : chosen_[slot];
  }
  Tensor rows(const std::vector<int64_t>& tokens) const {
    const Tensor x = Tensor::empty({static_cast<int64_t>(tokens.size()), hidden_}, DType::kF32);
    for (size_t i = 0; i < tokens.size(); ++i)
      std::copy_n(rows_ + tokens[i] * hidden_, hidden_, x.data<float>() + static_cast<int64_t>(i) * hidden_);
    return x;
  }

 private:
  int64_t hidden_;
  const float* rows_;
  std::vector<std::vector<int64_t>> chosen_;
  std::vector<int64_t> all_;
};

Tensor slots_of(int64_t rows, size_t slot) {
  return Tensor::from(std::vector<int32_t>(static_cast<size_t>(rows), static_cast<int32_t>(slot)), {rows, 1});
}

std::vector<double> weight_features(const Expert& expert) {
  const Tensor w = expert.gate_up->value.to(DType::kF64);
  const int64_t f = w.dim(0) / 2, d = w.dim(1);
  std::vector<double> features;
  for (int64_t j = 0; j < f; ++j) {
    for (const int64_t row : {j, f + j})
      features.insert(features.end(), w.data<double>() + row * d, w.data<double>() + (row + 1) * d);
  }
  return features;
}

std::vector<double> activation_features(const MoeLayer& layer, size_t slot, const Tensor& x) {
  const Tensor a = unit_activations(layer, x, slots_of(x.dim(0), slot), GemmCompute::kF32);
  const int64_t n = a.dim(0), f = a.dim(1);
  std::vector<double> features(static_cast<size_t>(n * f));
  for (int64_t t = 0; t < n; ++t) {
    for (int64_t j = 0; j < f; ++j)
      features[static_cast<size_t>(j * n + t)] = std::abs(static_cast<double>(a.data<float>()[t * f + j]));
  }
  return features;
}

// Row (or column) i of the result is row `order[i]` of w; rows from `first` on.
Tensor permuted_rows(const Tensor& w, const std::vector<int32_t>& order, int64_t first) {
  const Tensor out = Tensor::empty({static_cast<int64_t>(order.size()), w.dim(1)}, w.dtype());
  for (size_t i = 0; i < order.size(); ++i) out.row(static_cast<int64_t>(i)).copy_from(w.row(first + order[i]));
  return out;
}

template <class T>
void permute_columns(const Tensor& w, const std::vector<int32_t>& order) {
  std::vector<T> row(order.size());
  for (int64_t i = 0; i < w.dim(0); ++i) {
    T* values = w.row(i).data<T>();
    for (size_t j = 0; j < order.size(); ++j) row[j] = values[order[j]];
    std::copy(row.begin(), row.end(), values);
  }
}

void permute_units(const Expert& expert, const Clusters& clusters) {
  std::vector<int32_t> order;
  for (const auto& cluster : clusters) order.insert(order.end(), cluster.begin(), cluster.end());
  const auto f = static_cast<int64_t>(order.size());
  const Tensor &w = expert.gate_up->value, gate = permuted_rows(w, order, 0), up = permuted_rows(w, order, f);
  w.slice(0, f).copy_from(gate);
  w.slice(f, 2 * f).copy_from(up);
  const Tensor& down = expert.down->value;
  down.dtype() == DType::kF64 ? permute_columns<double>(down, order) : permute_columns<float>(down, order);
}

// Share of the contributions that the half of the blocks with the largest scores makes, summed over rows.
double share_of_half(const Tensor& contributions, const Tensor& scores) {
  const Tensor kept = keep_largest(scores, scores.dim(1) / 2);
  double sum = 0;
  for (int64_t t = 0; t < kept.dim(0); ++t) {
    double all = 0, half = 0;
    for (int64_t b = 0; b < kept.dim(1); ++b) {
      const int64_t i = t * kept.dim(1) + b;
      all += static_cast<double>(contributions.data<float>()[i]);
      half += static_cast<double>(contributions.data<float>()[i] * kept.data<float>()[i]);
    }
    sum += all > 0 ? half / all : 1;
  }
  return sum;
}

class Splitter {
 public:
  Splitter(Olmoe& model, const Statistics* s, const UnitSplitOptions& o) : model_(model), statistics_(s), options_(o) {}

  void split_layer(size_t layer) {
    const MoeLayer& moe = model_.blocks[layer].moe;
    std::optional<LayerInputs> inputs;
    if (options_.likeness == UnitLikeness::kActivations) inputs.emplace(*statistics_, model_, layer);
    for (size_t s = 0; s < moe.slots.size(); ++s) {
      if (moe.slots[s].kind == SlotKind::kRemoved) continue;
      const Expert& expert = moe.experts[static_cast<size_t>(moe.slots[s].expert)];
      const std::vector<double> features =
          inputs ? activation_features(moe, s, inputs->rows(inputs->tokens(s))) : weight_features(expert);
      permute_units(expert, balanced_kmeans(features, expert.down->value.dim(1), options_.blocks, options_.seed));
    }
  }

  UnitSplitReport::Layer teach_layer(size_t layer) {
    const MoeLayer& moe = model_.blocks[layer].moe;
    const LayerInputs inputs(*statistics_, model_, layer);
    const Tensor in = extension_parameter(moe, "select_in")->value, out = extension_parameter(moe, "select_out")->value;
    UnitSplitReport::Layer report;
    for (size_t s = 0; s < moe.slots.size(); ++s) {
      if (moe.slots[s].kind == SlotKind::kRemoved) continue;
      std::vector<int64_t> taught, held_out;
      for (const int64_t t : inputs.tokens(s)) (t % kHeldOut == 0 ? held_out : taught).push_back(t);
      if (taught.empty()) taught = held_out;
      const Tensor x = inputs.rows(taught);
      const UnitSelector selector =
          train_selector(x, contributions(moe, s, x), options_, options_.seed + layer * moe.slots.size() + s);
      const auto first = static_cast<int64_t>(s) * options_.blocks;
      in.slice(first, first + options_.blocks).copy_from(selector.in);
      out.slice(first, first + options_.blocks).copy_from(selector.out);
      if (held_out.empty()) continue;
      const Tensor unseen = inputs.rows(held_out), real = contributions(moe, s, unseen);
      report.selector += share_of_half(real, select_scores(selector, unseen));
      report.oracle += share_of_half(real, real);
      report.choices += std::ssize(held_out);
    }
    if (report.choices > 0) {
      report.selector /= static_cast<double>(report.choices);
      report.oracle /= static_cast<double>(report.choices);
    }
    return report;
  }

 private:
  Tensor contributions(const MoeLayer& moe, size_t slot, const Tensor& x) const {
    const Tensor slots = slots_of(x.dim(0), slot);
    return block_contributions(moe, unit_activations(moe, x, slots, GemmCompute::kF32), slots, options_.blocks);
  }

  Olmoe& model_;
  const Statistics* statistics_;
  const UnitSplitOptions& options_;
};

void check_inputs(const Olmoe& model, const Statistics* s, const UnitSplitOptions& o) {
  const OlmoeConfig& c = model.config;
  check(o.blocks >= 2 && c.intermediate_size % o.blocks == 0, ErrorKind::kUsage,
        "--blocks {}: expected 2 or more that divide intermediate_size {}", o.blocks, c.intermediate_size);
  check(o.epochs >= 1 && o.lr > 0 && o.rows >= 1, ErrorKind::kUsage, "--epochs {} --lr {:g}: expected more than 0",
        o.epochs, o.lr);
  for (const Block& block : model.blocks) {
    check(owns_its_experts(block.moe) && has_one_width(block.moe), ErrorKind::kUsage,
          "{}: units are split where every slot has an expert of its own, all of one width", block.moe.router->name);
  }
  if (!o.selectors && o.likeness == UnitLikeness::kWeights) return;
  check(s != nullptr && s->sample_size() > 0 && !s->layers.front().sample_inputs.empty(), ErrorKind::kInput,
        "splitting by activations and selectors need --statistics of calibrate --sample-inputs");
  check(s->num_layers == c.num_layers && s->num_slots == c.num_experts && s->hidden == c.hidden_size, ErrorKind::kInput,
        "statistics of {} layers, {} experts, hidden {}; the model has {}, {}, {}", s->num_layers, s->num_slots,
        s->hidden, c.num_layers, c.num_experts, c.hidden_size);
}

}  // namespace

UnitLikeness parse_unit_likeness(std::string_view name) {
  check(name == "weights" || name == "activations", ErrorKind::kUsage, "--by {}: expected weights or activations",
        name);
  return name == "weights" ? UnitLikeness::kWeights : UnitLikeness::kActivations;
}

UnitSplitReport split_units(Olmoe& model, const Statistics* statistics, const UnitSplitOptions& options) {
  check_inputs(model, statistics, options);
  Splitter splitter(model, statistics, options);
  for (size_t l = 0; l < model.blocks.size(); ++l) splitter.split_layer(l);
  UnitSplitReport report;
  if (!options.selectors) return report;
  extend_model(model, parse_extension(fmt::format("moefication:blocks={}", options.blocks)), options.seed);
  for (size_t l = 0; l < model.blocks.size(); ++l) report.layers.push_back(splitter.teach_layer(l));
  return report;
}

}  // namespace lightmoe
