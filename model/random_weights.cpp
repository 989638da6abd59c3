#include "model/random_weights.h"

#include <xxhash.h>

#include <algorithm>

#include "loaders/output.h"
#include "loaders/safetensors.h"
#include "model/parameter_table.h"
#include "runtime/philox.h"

namespace lightmoe {

void fill_random_weight(const OlmoeConfig& config, std::string_view hf_name, uint64_t seed, const Tensor& out) {
  if (!is_host_memory(out.device())) {
    const Tensor staged = Tensor::empty(out.shape(), out.dtype(), DeviceKind::kCpu);
    fill_random_weight(config, hf_name, seed, staged);
    return out.copy_from(staged);
  }
  float* values = out.data<float>();
  if (hf_name.ends_with("norm.weight")) {  // input_layernorm, post_attention_layernorm, q_norm, k_norm, model.norm
    std::fill_n(values, out.numel(), 1.0f);
    return;
  }
  const uint64_t stream = XXH3_64bits(hf_name.data(), hf_name.size());
  fill_normal(values, out.numel(), static_cast<float>(config.initializer_range), seed, stream);
}

void write_random_model(OlmoeConfig config, DType dtype, uint64_t seed, const std::filesystem::path& directory,
                        int64_t max_shard_bytes, const std::function<void(int64_t done, int64_t all)>& progress) {
  check(config.lightmoe_json.empty(), ErrorKind::kUsage,
        "random: the config is of a compressed model (it has a \"lightmoe\" object); give a stock one");
  require(dtype == DType::kF32 || dtype == DType::kBF16, "write_random_model: dtype {}", name_of(dtype));
  config.torch_dtype = dtype == DType::kBF16 ? "bfloat16" : "float32";
  write_file_atomically(directory / "config.json", config_to_json(config));

  const std::vector<ParameterInfo> parameters = stock_parameters(config);
  std::vector<TensorSpec> specs;
  int64_t largest = 0, all = 0, done = 0;
  for (const ParameterInfo& p : parameters) {
    specs.push_back({p.name, dtype, p.shape});
    largest = std::max(largest, p.numel());
    all += p.numel();
  }
  SafetensorsWriter writer(directory, std::move(specs), {.max_shard_bytes = max_shard_bytes, .metadata = {}});
  const MemoryScope scope(MemoryCategory::kScratch);
  const Tensor buffer = Tensor::empty({largest}, DType::kF32, DeviceKind::kCpu);
  for (const ParameterInfo& p : parameters) {
    const Tensor values = buffer.slice(0, p.numel()).reshape(Shape(p.shape));
    fill_random_weight(config, p.name, seed, values);
    writer.write(p.name, values);
    done += p.numel();
    if (progress) progress(done, all);
  }
  writer.finish();
}

}  // namespace lightmoe
