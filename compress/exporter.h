#pragma once
// export: a compressed directory as a stock OlmoeForCausalLM one that any Hugging Face reader loads: every slot that is not removed
// gets an expert of its own, W_bank + B A (computed in f32, rounded once). The function is the same. Tensor by tensor, like compress.
//   removed slots, the same number in every layer    a smaller stock model: num_experts and the routers' rows shrink
//   shared experts, adapters, latents                written out: nothing is smaller any more
//   constants                                        Error(kInput): no SwiGLU expert without biases is constant
//   removed slots, numbers that differ by layer      Error(kInput): a stock model has one num_experts

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "compress/streamed_tensors.h"

namespace lightmoe {

struct ExportJob {
  std::filesystem::path model, output;
  std::optional<DType> dtype;
  int64_t max_shard_bytes = int64_t{5} << 30;
  bool force = false, allow_nonfinite = false;
  std::function<void(const std::string&)> say;
};
struct ExportReport {
  int64_t num_experts = 0, original_experts = 0;
  int64_t compressed_bytes = 0, written_bytes = 0;  // of all tensors
};
// Error(kInput): not a compressed directory, or slots that a stock model cannot express.
ExportReport export_to_hugging_face(const ExportJob& job);

}  // namespace lightmoe
