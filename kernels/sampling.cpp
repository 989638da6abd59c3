#include "kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/philox.h"

namespace lightmoe {
namespace {

struct Candidate {
  float logit;
  int32_t id;
  uint64_t weight;
};
bool likelier(const Candidate& a, const Candidate& b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

uint64_t total_of(const std::vector<Candidate>& candidates) {
  uint64_t sum = 0;
  for (const Candidate& c : candidates) sum += c.weight;
  return sum;
}

void keep_top_k(std::vector<Candidate>& candidates, int64_t k) {
  if (k == 0 || k >= static_cast<int64_t>(candidates.size())) return;
  std::nth_element(candidates.begin(), candidates.begin() + (k - 1), candidates.end(), likelier);
  candidates.resize(static_cast<size_t>(k));
}

// The nucleus is usually a small part of the vocabulary: a heap yields its ids in order without sorting the rest.
void keep_top_p(std::vector<Candidate>& candidates, double p) {
  if (p >= 1) return;
  const uint64_t target = mass_of(p, total_of(candidates));
  const auto less = [](const Candidate& a, const Candidate& b) { return likelier(b, a); };
  std::make_heap(candidates.begin(), candidates.end(), less);
  auto end = candidates.end();
  for (uint64_t sum = 0; sum < target;) {
    std::pop_heap(candidates.begin(), end, less);
    sum += (--end)->weight;
  }
  candidates.erase(candidates.begin(), end);
}

int32_t greedy(std::span<const float> logits) {
  int32_t best = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i]) || logits[i] == INFINITY) return -1;
    if (logits[i] > -INFINITY && (best < 0 || logits[i] > logits[static_cast<size_t>(best)]))
      best = static_cast<int32_t>(i);
  }
  return best;
}

void sample_cpu(const SampleTokens& op) {
  const int64_t width = op.logits.dim(1);
  const int32_t* streams = op.streams.data<int32_t>();
  int32_t* draws = op.draws.data<int32_t>();
  for (int64_t n = 0; n < op.logits.dim(0); ++n) {
    uint64_t random = 0;
    if (op.rule.temperature > 0) {
      Philox rng(op.rule.seed, static_cast<uint64_t>(streams[n]));
      rng.seek(2 * static_cast<uint64_t>(draws[n]++));
      random = rng.next_u64();
    }
    const std::span<const float> row(op.logits.data<float>() + n * width, static_cast<size_t>(op.allowed));
    op.tokens.data<int32_t>()[n] = sample_row(row, op.rule, random);
  }
}

void advance_cpu(const AdvanceSequences& op) {
  for (int64_t n = 0; n < op.tokens.numel(); ++n) {
    op.ids.data<int32_t>()[n] = op.tokens.data<int32_t>()[n];
    for (const Tensor& counter : {op.positions, op.k_count, op.cache_rows}) ++counter.data<int32_t>()[n];
  }
}

const RegisterKernel<SampleTokens> register_sample{DeviceKind::kCpu, &sample_cpu};
const RegisterKernel<AdvanceSequences> register_advance{DeviceKind::kCpu, &advance_cpu};

}  // namespace

int32_t sample_row(std::span<const float> logits, const SamplingRule& rule, uint64_t random) {
  const int32_t best = greedy(logits);
  if (best < 0 || rule.temperature == 0) return best;
  const double largest = logits[static_cast<size_t>(best)];
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    const double share = std::exp((static_cast<double>(logits[i]) - largest) * (1 / rule.temperature));
    const auto weight = static_cast<uint64_t>(kSamplingUnit * share);
    if (weight > 0) candidates.push_back({logits[i], static_cast<int32_t>(i), weight});
  }
  keep_top_k(candidates, rule.top_k);
  keep_top_p(candidates, rule.top_p);
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  auto left = static_cast<uint64_t>(static_cast<unsigned __int128>(random) * total_of(candidates) >> 64);
  for (const Candidate& c : candidates) {
    if (left < c.weight) return c.id;
    left -= c.weight;
  }
  fail(ErrorKind::kInternal, "sample_row: a draw beyond the total");
}

void run(const SampleTokens& op) {
  require(op.logits.rank() == 2 && op.logits.dtype() == DType::kF32,
          "sample_tokens: logits is {} {}, expected [N,V] f32", op.logits.shape(), name_of(op.logits.dtype()));
  const Shape rows{op.logits.dim(0)};
  require_tensor(op.streams, "sample_tokens", "streams", rows, DType::kI32);
  require_tensor(op.draws, "sample_tokens", "draws", rows, DType::kI32);
  require_tensor(op.tokens, "sample_tokens", "tokens", rows, DType::kI32);
  require(op.allowed > 0 && op.allowed <= op.logits.dim(1) && op.logits.dim(1) <= INT32_MAX,
          "sample_tokens: {} ids of {}", op.allowed, op.logits.dim(1));
  if (op.logits.dim(0) > 0) dispatch(op, op.logits.device(), "sample_tokens");
}

void run(const AdvanceSequences& op) {
  const Shape rows{op.tokens.numel()};
  require_tensor(op.tokens, "advance_sequences", "tokens", rows, DType::kI32);
  require_tensor(op.ids, "advance_sequences", "ids", rows, DType::kI32);
  require_tensor(op.positions, "advance_sequences", "positions", rows, DType::kI32);
  require_tensor(op.k_count, "advance_sequences", "k_count", rows, DType::kI32);
  require_tensor(op.cache_rows, "advance_sequences", "cache_rows", rows, DType::kI32);
  if (op.tokens.numel() > 0) dispatch(op, op.tokens.device(), "advance_sequences");
}

}  // namespace lightmoe
