#include "compress/measure.h"

#include <algorithm>
#include <chrono>

#include "model/generate.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

constexpr int kRepetitions = 3;
constexpr int64_t kRows = 8, kLength = 64, kDecoded = 32;

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace

Speed measure_speed(const Olmoe& model) {
  Philox random(1, 0x5eed);
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < kRows * kLength; ++i) {
    ids.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(model.config.vocab_size))));
  }
  const Batch batch = make_batch(ids, kRows, kLength);
  const std::vector<std::vector<int32_t>> prompt = {{ids[0], ids[1], ids[2], ids[3]}};
  Speed best;
  for (int i = 0; i < kRepetitions; ++i) {
    const double prefill = seconds_of([&] { model.forward(batch, {}); });
    best.prefill_tokens_per_second =
        std::max(best.prefill_tokens_per_second, static_cast<double>(kRows * kLength) / prefill);
    GenerateReport report;
    generate(model, prompt, {.max_new_tokens = kDecoded}, &report);
    if (report.decode_seconds > 0) {
      best.decode_tokens_per_second =
          std::max(best.decode_tokens_per_second, static_cast<double>(report.decode_tokens) / report.decode_seconds);
    }
  }
  return best;
}

}  // namespace lightmoe
