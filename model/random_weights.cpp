#include "model/random_weights.h"

#include <xxhash.h>

#include <algorithm>

#include "runtime/philox.h"

namespace lightmoe {

void fill_random_weight(const OlmoeConfig& config, std::string_view hf_name, uint64_t seed, const Tensor& out) {
  float* values = out.data<float>();
  if (hf_name.ends_with("norm.weight")) {  // input_layernorm, post_attention_layernorm, q_norm, k_norm, model.norm
    std::fill_n(values, out.numel(), 1.0f);
    return;
  }
  const uint64_t stream = XXH3_64bits(hf_name.data(), hf_name.size());
  fill_normal(values, out.numel(), static_cast<float>(config.initializer_range), seed, stream);
}

}  // namespace lightmoe
