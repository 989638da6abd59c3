#include "model/sampling.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "runtime/error.h"

namespace lightmoe {
namespace {

struct Candidate {
  int32_t id;
  double weight;  // exp((logit - largest) / temperature)
};
bool likelier(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

double sum_of(const std::vector<Candidate>& candidates) {
  double sum = 0;
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
  const double target = p * sum_of(candidates);
  const auto less = [](const Candidate& a, const Candidate& b) { return likelier(b, a); };
  std::make_heap(candidates.begin(), candidates.end(), less);
  auto end = candidates.end();
  double sum = 0;
  while (end != candidates.begin() && sum < target) {
    std::pop_heap(candidates.begin(), end, less);
    sum += (--end)->weight;
  }
  candidates.erase(candidates.begin(), end);
}

}  // namespace

void check_sampling(const SamplingOptions& options) {
  check(std::isfinite(options.temperature) && options.temperature >= 0, ErrorKind::kUsage,
        "--temperature {}: expected 0 (greedy) or more", options.temperature);
  check(options.top_k >= 0, ErrorKind::kUsage, "--top-k {}: expected 0 (all) or more", options.top_k);
  check(options.top_p > 0 && options.top_p <= 1, ErrorKind::kUsage, "--top-p {}: expected more than 0, at most 1",
        options.top_p);
}

int32_t argmax(std::span<const float> logits) {
  int32_t best = -1;
  for (size_t i = 0; i < logits.size(); ++i) {
    check(!std::isnan(logits[i]) && logits[i] < INFINITY, ErrorKind::kNumeric, "logit of id {} is {}", i, logits[i]);
    if (logits[i] > -INFINITY && (best < 0 || logits[i] > logits[static_cast<size_t>(best)]))
      best = static_cast<int32_t>(i);
  }
  check(best >= 0, ErrorKind::kNumeric, "no finite logit among {}", logits.size());
  return best;
}

int32_t sample(std::span<const float> logits, const SamplingOptions& options, Philox& rng) {
  const int32_t best = argmax(logits);
  if (options.temperature == 0) return best;
  const double largest = logits[static_cast<size_t>(best)];
  std::vector<Candidate> candidates;
  candidates.reserve(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    const double weight = std::exp((static_cast<double>(logits[i]) - largest) / options.temperature);
    if (weight > 0) candidates.push_back({static_cast<int32_t>(i), weight});
  }
  keep_top_k(candidates, options.top_k);
  keep_top_p(candidates, options.top_p);
  // Selection leaves an order that depends on the library's heap and partition: draw in order of ids.
  std::sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
  double left = rng.uniform() * sum_of(candidates);
  for (const Candidate& c : candidates) {
    left -= c.weight;
    if (left < 0) return c.id;
  }
  return candidates.back().id;  // the sum's rounding, at most once in 2^50 draws
}

}  // namespace lightmoe
