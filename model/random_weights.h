#pragma once
// The random OLMoE of a seed, one parameter at a time: norms are 1, everything else normal(0, initializer_range) from
// Philox(seed, XXH3-64 of the Hugging Face name of the per-expert tensor). A value depends on nothing else, so a model made in
// memory and one streamed to disk are the same bit for bit, in any order. Other dtypes are the f32 values rounded.

#include <cstdint>
#include <string_view>

#include "model/config.h"
#include "runtime/tensor.h"

namespace lightmoe {

// out: f32, any shape (the parameter's elements in row-major order).
void fill_random_weight(const OlmoeConfig& config, std::string_view hf_name, uint64_t seed, const Tensor& out);

}  // namespace lightmoe
