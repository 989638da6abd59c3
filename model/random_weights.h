#pragma once
// The random OLMoE of a seed, one parameter at a time: norms are 1, everything else normal(0, initializer_range) from
// Philox(seed, XXH3-64 of the Hugging Face name of the per-expert tensor). A value depends on nothing else, so a model made in
// memory and one streamed to disk are the same bit for bit, in any order. Other dtypes are the f32 values rounded.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string_view>

#include "model/config.h"
#include "runtime/tensor.h"

namespace lightmoe {

// out: f32, any shape (the parameter's elements in row-major order).
void fill_random_weight(const OlmoeConfig& config, std::string_view hf_name, uint64_t seed, const Tensor& out);

// The same as a checkpoint (config.json and safetensors, per-expert names) in a directory being prepared (loaders/output.h).
// Holds one tensor at a time. progress may be empty.
void write_random_model(OlmoeConfig config, DType dtype, uint64_t seed, const std::filesystem::path& directory,
                        int64_t max_shard_bytes, const std::function<void(int64_t done, int64_t all)>& progress = {});

}  // namespace lightmoe
