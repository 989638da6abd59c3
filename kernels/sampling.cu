#include "kernels/sampling.h"

#include "kernels/device/numeric.h"
#include "kernels/device/philox.h"
#include "kernels/device/reduce.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = 512, kBins = 256;
using Mass = unsigned long long;  // a count or a weight: what atomics and shuffles take

struct SampleShared {
  BlockScratch<Mass> scratch;
  Mass bins[kBins];
  Mass part[kThreads + 1];
  int ties[kThreads + 1];
  Mass above;
  uint32_t bin;
};

// Ascending with the logit; both zeros alike.
DEVICE_FN uint32_t key_of(float logit) {
  const uint32_t bits = std::bit_cast<uint32_t>(logit + 0.0f);
  return bits ^ ((bits & 0x80000000u) != 0 ? 0xffffffffu : 0x80000000u);
}
DEVICE_FN float logit_of(uint32_t key) {
  return std::bit_cast<float>(key ^ ((key & 0x80000000u) != 0 ? 0x80000000u : 0xffffffffu));
}
constexpr uint32_t kMinusInfinityKey = 0x007fffffu;

// Ids above a key, and the first `ties` ids of those at it.
struct Kept {
  uint32_t key;
  int64_t ties;
};

struct Row {
  const float* logits;
  int count;
  double largest, inverse_temperature;
  DEVICE_FN Mass weight(float logit) const {
    return static_cast<Mass>(kSamplingUnit * std::exp((static_cast<double>(logit) - largest) * inverse_temperature));
  }
};

// The largest key whose ids, with all above it, measure at least `target`; *above: the measure of those above it. By digits of 8 bits,
// the highest first; sums of integers, so no order matters.
template <class Measure>
DEVICE_FN uint32_t threshold(const Row& row, Mass target, const Measure& measure, SampleShared& shared, Mass* above) {
  uint32_t prefix = 0;
  Mass before = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int b = static_cast<int>(threadIdx.x); b < kBins; b += kThreads) shared.bins[b] = 0;
    sync_block();
    for (int i = static_cast<int>(threadIdx.x); i < row.count; i += kThreads) {
      const uint32_t key = key_of(row.logits[i]);
      if (shift < 24 && key >> (shift + 8) != prefix >> (shift + 8)) continue;
      const Mass own = measure(key, row.logits[i]);
      if (own > 0) atomic_add(&shared.bins[key >> shift & 255u], own);
    }
    sync_block();
    if (threadIdx.x == 0) {
      int b = kBins - 1;
      Mass sum = before;
      for (; b > 0 && sum + shared.bins[b] < target; --b) sum += shared.bins[b];
      shared.above = sum, shared.bin = static_cast<uint32_t>(b);
    }
    sync_block();
    before = shared.above;
    prefix |= shared.bin << shift;
  }
  *above = before;
  return prefix;
}

// shared.part (ties) of thread i becomes what the threads before it have; returns the total.
template <class T>
DEVICE_FN T scan_threads(T own, T* parts) {
  sync_block();
  parts[threadIdx.x] = own;
  sync_block();
  if (threadIdx.x == 0) {
    T sum = 0;
    for (int i = 0; i < kThreads; ++i) {
      const T next = parts[i];
      parts[i] = sum;
      sum += next;
    }
    parts[kThreads] = sum;
  }
  sync_block();
  return parts[kThreads];
}

// The id at `random`'s place of the kept weights, ids in order: each thread has a range of ids.
DEVICE_FN void draw(const Row& row, const Kept& kept, Mass random, SampleShared& shared, int* token) {
  const int each = (row.count + kThreads - 1) / kThreads, thread = static_cast<int>(threadIdx.x);
  const int begin = std::min(row.count, thread * each), end = std::min(row.count, begin + each);
  int ties = 0;
  for (int i = begin; i < end; ++i) ties += key_of(row.logits[i]) == kept.key ? 1 : 0;
  scan_threads(ties, shared.ties);
  const auto walk = [&](auto&& visit) {
    int64_t rank = shared.ties[thread];
    for (int i = begin; i < end; ++i) {
      const uint32_t key = key_of(row.logits[i]);
      const bool is_tie = key == kept.key;
      if (key > kept.key || (is_tie && rank < kept.ties)) visit(i, row.weight(row.logits[i]));
      rank += is_tie ? 1 : 0;
    }
  };
  Mass own = 0;
  walk([&](int, Mass weight) { own += weight; });
  const Mass total = scan_threads(own, shared.part);
  // floor(random total / 2^64); total is below 2^57.
  const Mass low = (random & 0xffffffffu) * (total & 0xffffffffu), a = (random >> 32) * (total & 0xffffffffu),
             b = (random & 0xffffffffu) * (total >> 32);
  const Mass carry = (low >> 32) + (a & 0xffffffffu) + (b & 0xffffffffu);
  const Mass place = (random >> 32) * (total >> 32) + (a >> 32) + (b >> 32) + (carry >> 32);
  Mass at = shared.part[thread];
  if (place < at || place >= at + own) return;
  walk([&](int i, Mass weight) {
    if (place >= at && place < at + weight) *token = i;
    at += weight;
  });
}

// Of the kept ids, the shortest prefix in order of logit that weighs top_p of them.
DEVICE_FN void keep_top_p(const Row& row, double top_p, SampleShared& shared, Kept& kept) {
  Mass above = 0;
  // Ties beyond the kept ones count here as well, which does not matter: the threshold ends at or above their key.
  const auto weight = [&](uint32_t key, float x) { return key >= kept.key ? row.weight(x) : Mass{0}; };
  Mass own = 0;
  int ties = 0;
  for (int i = static_cast<int>(threadIdx.x); i < row.count; i += kThreads) {
    const uint32_t key = key_of(row.logits[i]);
    if (key > kept.key) own += row.weight(row.logits[i]);
    ties += key == kept.key ? 1 : 0;
  }
  const Mass tied = block_sum<Mass>(static_cast<Mass>(ties), shared.scratch);
  const Mass each = tied > 0 ? row.weight(logit_of(kept.key)) : 0;
  const Mass total = block_sum<Mass>(own, shared.scratch) + std::min(tied, static_cast<Mass>(kept.ties)) * each;
  const Mass target = mass_of(top_p, total);
  kept.key = threshold(row, target, weight, shared, &above);
  const Mass at = row.weight(logit_of(kept.key));
  // ceil((target - above) / at) by halves: a division of 64 bits is a call, around which registers spill.
  int low = 0, high = row.count;
  while (low < high) {
    const int middle = (low + high) >> 1;
    if (above + static_cast<Mass>(middle) * at >= target) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  kept.ties = low;
}

// A block has one row.
__global__ void __launch_bounds__(kThreads, 2)
    sample_kernel(const float* logits, int width, int allowed, SamplingRule rule, double inverse_temperature,
                  const int* streams, int* draws, int* tokens) {
  auto& shared = shared_memory<SampleShared>();
  const int n = static_cast<int>(blockIdx.x);
  Row row{logits + static_cast<int64_t>(n) * width, allowed, 0, inverse_temperature};
  bool bad = false;
  Mass best = 0;  // key, then the lower id
  for (int i = static_cast<int>(threadIdx.x); i < allowed; i += kThreads) {
    const float x = row.logits[i];
    bad = bad || !(x < INFINITY);
    const Mass mine = static_cast<Mass>(key_of(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(i));
    best = best < mine ? mine : best;
  }
  best = block_max<Mass>(best, 0, shared.scratch);
  bad = sync_block_or(bad) || best >> 32 <= kMinusInfinityKey;
  const int winner = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best & 0xffffffffu));
  const bool draws_one = rule.temperature > 0;
  const int drawn = draws_one ? draws[n] : 0;
  sync_block();
  if (threadIdx.x == 0) {
    if (draws_one) draws[n] = drawn + 1;
    tokens[n] = bad ? -1 : winner;
  }
  sync_block();
  if (bad || !draws_one) return;  // the whole block

  row.largest = row.logits[winner];
  Kept kept{0, allowed};
  if (rule.top_k > 0 && rule.top_k < allowed) {
    Mass above = 0;
    const auto count = [](uint32_t, float) { return Mass{1}; };
    kept.key = threshold(row, static_cast<Mass>(rule.top_k), count, shared, &above);
    kept.ties = rule.top_k - static_cast<int64_t>(above);
  }
  if (rule.top_p < 1) keep_top_p(row, rule.top_p, shared, kept);
  draw(row, kept, philox_u64(rule.seed, static_cast<uint64_t>(streams[n]), static_cast<uint64_t>(drawn)), shared,
       tokens + n);
}

__global__ void __launch_bounds__(kThreads)
    advance_kernel(const int* tokens, int* ids, int* positions, int* k_count, int* cache_rows, int count) {
  const int n = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (n >= count) return;
  ids[n] = tokens[n];
  ++positions[n], ++k_count[n], ++cache_rows[n];
}

void sample_device(const SampleTokens& op) {
  launch<sample_kernel>({.blocks = {static_cast<uint32_t>(op.logits.dim(0))},
                         .threads = {kThreads},
                         .shared_bytes = sizeof(SampleShared)},
                        op.logits.data<float>(), static_cast<int>(op.logits.dim(1)), static_cast<int>(op.allowed),
                        op.rule, op.rule.temperature > 0 ? 1 / op.rule.temperature : 0.0, op.streams.data<int32_t>(),
                        op.draws.data<int32_t>(), op.tokens.data<int32_t>());
}

void advance_device(const AdvanceSequences& op) {
  const int count = static_cast<int>(op.tokens.numel());
  launch<advance_kernel>({.blocks = {static_cast<uint32_t>(ceil_div(count, kThreads))}, .threads = {kThreads}},
                         op.tokens.data<int32_t>(), op.ids.data<int32_t>(), op.positions.data<int32_t>(),
                         op.k_count.data<int32_t>(), op.cache_rows.data<int32_t>(), count);
}

const RegisterKernel<SampleTokens> register_sample{kDevice, &sample_device};
const RegisterKernel<AdvanceSequences> register_advance{kDevice, &advance_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
