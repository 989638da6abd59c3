// OPTIONAL, used by scripts/peer_llama_cpp.py alone: times llama.cpp on a GGUF file. It reads PROMPT tokens in one pass (logits of the
// last one) and then writes NEW tokens greedily, twice: the first round warms up. Built against llama.cpp's public header, see there.
//   peer_llama_cpp MODEL.gguf PROMPT NEW THREADS

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

int main(int argc, char** argv) {
  if (argc != 5) return std::fprintf(stderr, "usage: peer_llama_cpp MODEL.gguf PROMPT NEW THREADS\n"), 2;
  const int prompt = std::atoi(argv[2]), count = std::atoi(argv[3]), threads = std::atoi(argv[4]);
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  if (model == nullptr) return 1;
  const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(prompt + count + 8);
  params.n_batch = params.n_ubatch = static_cast<uint32_t>(prompt);
  params.n_threads = params.n_threads_batch = threads;
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) return 1;

  const auto feed = [&](std::vector<llama_token> tokens) -> llama_token {  // the likeliest next token
    if (llama_decode(context, llama_batch_get_one(tokens.data(), static_cast<int32_t>(tokens.size()))) != 0)
      std::exit(1);
    const float* logits = llama_get_logits_ith(context, -1);
    return static_cast<llama_token>(std::max_element(logits, logits + vocabulary) - logits);
  };
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  std::vector<llama_token> ids;
  for (int i = 0; i < prompt; ++i) ids.push_back((17 + 31 * i) % std::min(vocabulary, 4000));
  double prefill = 0, decode = 0;
  for (int round = 0; round < 2; ++round) {
    llama_memory_clear(llama_get_memory(context), true);
    const double start = now();
    llama_token token = feed(ids);
    const double middle = now();
    const int steps = round == 0 ? 2 : count;
    for (int i = 0; i < steps; ++i) token = feed({token});
    prefill = middle - start, decode = now() - middle;
  }
  std::printf("{\"prefill\": %.2f, \"decode\": %.2f}\n", prompt / prefill, count / decode);
  return 0;
}
