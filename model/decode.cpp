#include "model/decode.h"

#include <numeric>

#include "kernels/combine.h"
#include "model/block.h"

namespace lightmoe {
namespace {

Tensor tensor_of(const std::vector<int32_t>& values) {
  return Tensor::from(values, {static_cast<int64_t>(values.size())});
}

std::vector<int32_t> to_host(const Tensor& tokens) {
  const Tensor host = tokens.on(DeviceKind::kCpu);
  return {host.data<int32_t>(), host.data<int32_t>() + host.numel()};
}

}  // namespace

std::vector<int32_t> choose_tokens(const Olmoe& model, const Tensor& hidden, const std::vector<int32_t>& counts,
                                   const std::vector<int32_t>& streams, const std::vector<int32_t>& draws,
                                   const TokenChoice& choice, const ForwardOptions& options) {
  std::vector<int32_t> rows;
  int32_t row = 0;
  for (const int32_t count : counts) {
    row += count;
    if (count > 0) rows.push_back(row - 1);
  }
  const auto fed = static_cast<int64_t>(rows.size());
  const Tensor last = Tensor::empty({fed, hidden.dim(1)}, hidden.dtype()), tokens = Tensor::empty({fed}, DType::kI32);
  run(ExpandPairs{.x = hidden, .pair_visit = tensor_of(rows), .y = last});
  run(SampleTokens{.logits = model.logits(last, options),
                   .allowed = choice.allowed,
                   .rule = choice.rule,
                   .streams = tensor_of(streams),
                   .draws = tensor_of(draws),
                   .tokens = tokens});
  return to_host(tokens);
}

DecodeLoop::DecodeLoop(const Olmoe& model, KvCache& cache, const std::vector<DecodeSequence>& sequences,
                       const TokenChoice& choice, const ForwardOptions& options)
    : model_(model), cache_(cache), choice_(choice), options_(options) {
  std::vector<int32_t> ids, positions, k_count, cache_rows, q_begin(sequences.size() + 1), k_begin, streams, draws;
  for (const DecodeSequence& s : sequences) {
    const int32_t used = cache.lengths[static_cast<size_t>(s.row)];
    const auto begin = static_cast<int32_t>(s.row * cache.max_length);
    rows_.push_back(s.row);
    ids.push_back(s.token), positions.push_back(used), k_count.push_back(used + 1);
    k_begin.push_back(begin), cache_rows.push_back(begin + used);
    streams.push_back(s.stream), draws.push_back(s.draws);
  }
  std::iota(q_begin.begin(), q_begin.end(), 0);
  ids_ = tensor_of(ids), positions_ = tensor_of(positions), k_count_ = tensor_of(k_count);
  cache_rows_ = tensor_of(cache_rows), q_begin_ = tensor_of(q_begin), k_begin_ = tensor_of(k_begin);
  streams_ = tensor_of(streams), draws_ = tensor_of(draws);
  tokens_ = Tensor::empty(ids_.shape(), DType::kI32);
}

void DecodeLoop::queue_step() {
  const AttentionSequences sequences{.q_begin = q_begin_,
                                     .k_begin = k_begin_,
                                     .k_count = k_count_,
                                     .q_pos = positions_,
                                     .max_k_count = cache_.max_length};
  const Tensor hidden = run_blocks(model_, ids_,
                                   {.config = model_.config,
                                    .positions = positions_,
                                    .sequences = sequences,
                                    .compute = options_.compute,
                                    .cache = &cache_,
                                    .cache_rows = cache_rows_,
                                    .observer = options_.observer,
                                    .routing = options_.routing});
  run(SampleTokens{.logits = model_.logits(hidden, options_),
                   .allowed = choice_.allowed,
                   .rule = choice_.rule,
                   .streams = streams_,
                   .draws = draws_,
                   .tokens = tokens_});
  run(AdvanceSequences{
      .tokens = tokens_, .ids = ids_, .positions = positions_, .k_count = k_count_, .cache_rows = cache_rows_});
}

std::vector<int32_t> DecodeLoop::step() {
  for (const int32_t row : rows_) {
    int32_t& used = cache_.lengths[static_cast<size_t>(row)];
    require(used < cache_.max_length, "DecodeLoop: sequence {} has {} tokens, the cache holds no more", row, used);
    ++used;
  }
  // Observers, and rules that choose slots at run time, may look at values on the host.
  const DeviceKind device = ids_.device();
  if (device == DeviceKind::kCpu || steps_ == 0 || options_.observer != nullptr || options_.routing != nullptr) {
    queue_step();
  } else {
    if (!graph_) graph_ = std::make_unique<DeviceGraph>(device, [this] { queue_step(); });
    graph_->replay();
  }
  ++steps_;
  return to_host(tokens_);
}

}  // namespace lightmoe
