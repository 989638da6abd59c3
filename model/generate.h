#pragma once
// Text from a model with a KV cache: each prompt is prefilled once, then every step feeds one token per unfinished sequence.
// Ragged prompts are not padded. A sequence's tokens depend on (model, prompt, its index, options) alone, not on batch or order,
// when products come from the `native` GEMM backend (the caller's choice, GemmBackendScope in kernels/gemm.h).

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "loaders/tokenizer.h"
#include "model/olmoe.h"
#include "model/sampling.h"

namespace lightmoe {

enum class FinishReason : uint8_t { kEos, kStopString, kLength };
const char* name_of(FinishReason reason);  // "eos", "stop", "length"

struct GenerateOptions {
  SamplingOptions sampling;
  int64_t max_new_tokens = 64;
  std::vector<int32_t> eos_ids;           // a sequence ends at the first of them, which is not part of its tokens
  std::vector<std::string> stop_strings;  // needs `tokenizer`; the text ends before the first occurrence
  const Tokenizer* tokenizer = nullptr;   // ids at or past its vocab_size() are never chosen
  int64_t batch = 16;                     // sequences that run side by side
  bool truncate = false;  // prompt + max_new_tokens past the context: drop the oldest ids instead of Error(kUsage)
  DType cache_dtype = DType::kF32;
  ForwardOptions forward;
  std::function<void(int64_t sequence, int32_t token)> on_token;  // in order within a sequence
};

struct Generation {
  std::vector<int32_t> tokens;  // new ids, without EOS
  std::string text;             // decoded (special tokens skipped), cut at a stop string; "" without tokenizer
  FinishReason finish = FinishReason::kLength;
};
struct GenerateReport {
  int64_t prefill_tokens = 0, decode_tokens = 0;  // ids fed in each phase
  int64_t truncated = 0;                          // prompts of which the oldest tokens were dropped
  double prefill_seconds = 0, decode_seconds = 0;
};

// prompts: ids in [0, V), at least one each. Error(kUsage) for bad options, Error(kInput) naming the prompt otherwise.
std::vector<Generation> generate(const Olmoe& model, const std::vector<std::vector<int32_t>>& prompts,
                                 const GenerateOptions& options, GenerateReport* report = nullptr);

}  // namespace lightmoe
