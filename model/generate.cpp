#include "model/generate.h"

#include <algorithm>
#include <chrono>

#include "model/decode.h"
#include "runtime/trace.h"

namespace lightmoe {
namespace {

using Clock = std::chrono::steady_clock;

struct Sequence {
  int64_t index;  // in the caller's list
  std::vector<int32_t> prompt;
  Generation result;
  int32_t draws = 0;
  bool done = false;
};

void check_options(const Olmoe& model, const GenerateOptions& options) {
  check_sampling(options.sampling);
  check(options.max_new_tokens >= 1, ErrorKind::kUsage, "--max-new-tokens {}: expected 1 or more",
        options.max_new_tokens);
  check(options.batch >= 1, ErrorKind::kUsage, "--batch {}: expected 1 or more", options.batch);
  check(options.max_new_tokens <= model.config.max_position_embeddings, ErrorKind::kUsage,
        "--max-new-tokens {}: the context has {} positions", options.max_new_tokens,
        model.config.max_position_embeddings);
  check(options.stop_strings.empty() || options.tokenizer != nullptr, ErrorKind::kUsage,
        "a stop string needs a tokenizer");
  for (const std::string& stop : options.stop_strings) {
    check(!stop.empty(), ErrorKind::kUsage, "a stop string is empty");
  }
}

// The ids to feed: checked, and cut from the left where told. The last new token is never fed, hence the 1.
std::vector<int32_t> checked_prompt(const Olmoe& model, const std::vector<int32_t>& prompt, int64_t index,
                                    const GenerateOptions& options) {
  check(!prompt.empty(), ErrorKind::kInput, "prompt {}: no tokens", index);
  for (int32_t id : prompt) {
    check(id >= 0 && id < model.config.vocab_size, ErrorKind::kInput, "prompt {}: id {}, expected 0 to {}", index, id,
          model.config.vocab_size - 1);
  }
  const int64_t context = model.config.max_position_embeddings, length = static_cast<int64_t>(prompt.size());
  const int64_t room = context - (options.max_new_tokens - 1);
  if (length <= room) return prompt;
  check(options.truncate, ErrorKind::kUsage,
        "prompt {} has {} tokens, with {} new ones it exceeds the context of {}; --truncate drops the oldest tokens",
        index, length, options.max_new_tokens, context);
  return {prompt.end() - room, prompt.end()};
}

// Position of the first stop string in text, npos without one.
size_t find_stop(const std::string& text, const std::vector<std::string>& stops) {
  size_t first = std::string::npos;
  for (const std::string& stop : stops) first = std::min(first, text.find(stop));
  return first;
}

// A stop string that ends in the newest token lies within the last `bytes` tokens, as every token has a byte or more.
bool reached_stop(const std::vector<int32_t>& tokens, const GenerateOptions& options) {
  size_t bytes = 0;
  for (const std::string& stop : options.stop_strings) bytes = std::max(bytes, stop.size());
  if (bytes == 0) return false;
  const size_t tail = std::min(tokens.size(), bytes);
  const std::string text = options.tokenizer->decode({tokens.end() - static_cast<int64_t>(tail), tokens.end()}, true);
  return find_stop(text, options.stop_strings) != std::string::npos;
}

void take_token(Sequence& sequence, int32_t token, const GenerateOptions& options) {
  Generation& result = sequence.result;
  if (std::find(options.eos_ids.begin(), options.eos_ids.end(), token) != options.eos_ids.end()) {
    result.finish = FinishReason::kEos;
    sequence.done = true;
    return;
  }
  result.tokens.push_back(token);
  if (options.on_token) options.on_token(sequence.index, token);
  if (reached_stop(result.tokens, options)) {
    result.finish = FinishReason::kStopString;
    sequence.done = true;
  } else if (static_cast<int64_t>(result.tokens.size()) >= options.max_new_tokens) {
    result.finish = FinishReason::kLength;
    sequence.done = true;
  }
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

TokenChoice token_choice(const Olmoe& model, const GenerateOptions& options) {
  int64_t allowed = model.config.vocab_size;
  if (options.tokenizer != nullptr) allowed = std::min(allowed, options.tokenizer->vocab_size());
  return {.rule = options.sampling, .allowed = allowed};
}

// tokens[i] is the new one of the i-th sequence that is not done.
void take_tokens(std::vector<Sequence>& sequences, const std::vector<int32_t>& tokens, const GenerateOptions& options) {
  auto token = tokens.begin();
  for (Sequence& sequence : sequences) {
    if (sequence.done) continue;
    check(*token >= 0, ErrorKind::kNumeric, "prompt {}: logits of token {} are not finite", sequence.index,
          sequence.result.tokens.size());
    if (options.sampling.temperature > 0) ++sequence.draws;
    take_token(sequence, *token++, options);
  }
}

std::vector<int32_t> prefill(const Olmoe& model, std::vector<Sequence>& sequences, KvCache& cache,
                             const GenerateOptions& options, GenerateReport& report) {
  std::vector<int32_t> ids, counts, streams;
  for (const Sequence& s : sequences) {
    ids.insert(ids.end(), s.prompt.begin(), s.prompt.end());
    counts.push_back(static_cast<int32_t>(s.prompt.size()));
    streams.push_back(static_cast<int32_t>(s.index));
  }
  report.prefill_tokens += static_cast<int64_t>(ids.size());
  const TraceRange range(TraceLevel::kPhase, "prefill", static_cast<int64_t>(ids.size()));
  const Tensor hidden = model.forward_cached(ids, counts, cache, options.forward);
  return choose_tokens(model, hidden, counts, streams, std::vector<int32_t>(sequences.size(), 0),
                       token_choice(model, options), options.forward);
}

// The sequences that go on. A loop serves until one of them ends; the rest go on in a loop of their own.
DecodeLoop make_loop(const Olmoe& model, const std::vector<Sequence>& sequences, KvCache& cache,
                     const GenerateOptions& options) {
  std::vector<DecodeSequence> going;
  for (size_t s = 0; s < sequences.size(); ++s) {
    const Sequence& sequence = sequences[s];
    if (sequence.done) continue;
    going.push_back({.row = static_cast<int32_t>(s),
                     .token = sequence.result.tokens.back(),
                     .stream = static_cast<int32_t>(sequence.index),
                     .draws = sequence.draws});
  }
  return {model, cache, going, token_choice(model, options), options.forward};
}

void run_batch(const Olmoe& model, std::vector<Sequence>& sequences, const GenerateOptions& options,
               GenerateReport& report) {
  size_t longest = 0;
  for (const Sequence& s : sequences) longest = std::max(longest, s.prompt.size());
  KvCache cache(model.config, static_cast<int64_t>(sequences.size()),
                static_cast<int64_t>(longest) + options.max_new_tokens - 1, options.cache_dtype);
  const auto count_going = [&] {
    return std::count_if(sequences.begin(), sequences.end(), [](const Sequence& s) { return !s.done; });
  };
  Clock::time_point start = Clock::now();
  int64_t pass = 0;
  profile_step(pass++);
  take_tokens(sequences, prefill(model, sequences, cache, options, report), options);
  report.prefill_seconds += seconds_since(start);
  start = Clock::now();
  for (int64_t going = count_going(); going > 0; going = count_going()) {
    DecodeLoop loop = make_loop(model, sequences, cache, options);
    while (count_going() == going) {
      profile_step(pass++);
      const TraceRange range(TraceLevel::kPhase, "decode", going);
      take_tokens(sequences, loop.step(), options);
      report.decode_tokens += going;
    }
  }
  report.decode_seconds += seconds_since(start);
}

}  // namespace

const char* name_of(FinishReason reason) {
  return reason == FinishReason::kEos ? "eos" : reason == FinishReason::kStopString ? "stop" : "length";
}

std::vector<Generation> generate(const Olmoe& model, const std::vector<std::vector<int32_t>>& prompts,
                                 const GenerateOptions& options, GenerateReport* report) {
  check_options(model, options);
  std::vector<std::vector<int32_t>> checked;
  GenerateReport own;
  for (size_t i = 0; i < prompts.size(); ++i) {
    checked.push_back(checked_prompt(model, prompts[i], static_cast<int64_t>(i), options));
    own.truncated += checked[i].size() < prompts[i].size();
  }
  std::vector<Generation> results;
  for (size_t begin = 0; begin < prompts.size(); begin += static_cast<size_t>(options.batch)) {
    const size_t end = std::min(prompts.size(), begin + static_cast<size_t>(options.batch));
    std::vector<Sequence> sequences;
    for (size_t i = begin; i < end; ++i) {
      sequences.push_back({.index = static_cast<int64_t>(i), .prompt = std::move(checked[i]), .result = {}});
    }
    run_batch(model, sequences, options, own);
    for (Sequence& sequence : sequences) {
      if (options.tokenizer != nullptr) {
        std::string text = options.tokenizer->decode(sequence.result.tokens, true);
        sequence.result.text = text.substr(0, find_stop(text, options.stop_strings));
      }
      results.push_back(std::move(sequence.result));
    }
  }
  if (report != nullptr) *report = own;
  return results;
}

}  // namespace lightmoe
