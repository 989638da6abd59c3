#include "compress/weights.h"

#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "compress/text.h"
#include "model/parameter_table.h"

namespace lightmoe {
namespace {

constexpr uint64_t kWholeTensorBytes = 64 << 10, kBlockBytes = 4 << 10, kBlocks = 16;

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t dim : shape) n *= dim;
  return n;
}

DType floating_dtype(const Checkpoint& checkpoint, const TensorInfo& info) {
  const std::optional<DType> dtype = info.dtype();
  check(dtype && is_floating(*dtype), ErrorKind::kInput,
        "{}: tensor \"{}\" has dtype {}, expected F32, BF16, F16 or F64", checkpoint.path().string(), info.name,
        info.file_dtype);
  return *dtype;
}

void check_shape(const Checkpoint& checkpoint, const TensorInfo& info, const std::vector<int64_t>& shape) {
  check(info.shape == shape, ErrorKind::kInput, "{}: tensor \"{}\" has shape [{}], expected [{}] (config.json)",
        checkpoint.path().string(), info.name, joined(info.shape, ", "), joined(shape, ", "));
}

std::string fused_name(const Checkpoint& checkpoint, int64_t layer, ExpertMatrix matrix) {
  const std::string name = fused_tensor_name(layer, matrix == ExpertMatrix::kDown);
  return checkpoint.contains(name) ? name : name + ".weight";
}

std::string hex(XXH128_hash_t hash) { return fmt::format("{:016x}{:016x}", hash.high64, hash.low64); }

}  // namespace

void MatrixPlace::read_rows(int64_t first, const Tensor& out) const {
  require(first >= 0 && out.rank() == 2 && out.dim(1) == columns && first + out.dim(0) <= rows,
          "MatrixPlace: rows {}.. as {} of {}x{}", first, out.shape(), rows, columns);
  if (out.device() != DeviceKind::kCpu) {
    const Tensor staged = Tensor::empty(out.shape(), out.dtype(), DeviceKind::kCpu);
    read_rows(first, staged);
    return out.copy_from(staged);
  }
  const auto count = static_cast<size_t>(out.numel());
  const uint64_t begin = offset + static_cast<uint64_t>(first * columns) * size_of(dtype);
  if (out.dtype() == dtype) return file->read_raw(*info, begin, out.raw(), count * size_of(dtype));
  std::vector<unsigned char> raw(count * size_of(dtype));
  file->read_raw(*info, begin, raw.data(), raw.size());
  convert(raw.data(), dtype, out.raw(), out.dtype(), count);
}

Tensor MatrixPlace::read(DType as) const {
  Tensor out = Tensor::empty({rows, columns}, as);
  read_rows(0, out);
  return out;
}

MatrixPlace place_of(const Checkpoint& checkpoint, const std::string& name, const std::vector<int64_t>& shape) {
  const TensorInfo& info = checkpoint.info(name);
  check_shape(checkpoint, info, shape);
  const int64_t columns = shape.empty() ? 1 : shape.back();
  return {.file = &checkpoint.file_of(name),
          .info = &info,
          .rows = columns == 0 ? 0 : product(shape) / columns,
          .columns = columns,
          .dtype = floating_dtype(checkpoint, info)};
}

std::vector<int64_t> expert_matrix_shape(int64_t hidden, int64_t width, ExpertMatrix matrix) {
  return matrix == ExpertMatrix::kDown ? std::vector{hidden, width} : std::vector{width, hidden};
}
std::vector<int64_t> expert_matrix_shape(const OlmoeConfig& config, ExpertMatrix matrix) {
  return expert_matrix_shape(config.hidden_size, config.intermediate_size, matrix);
}

ExpertSource::ExpertSource(const Checkpoint& checkpoint, const OlmoeConfig& config)
    : checkpoint_(checkpoint),
      config_(config),
      fused_(checkpoint.contains(fused_name(checkpoint, 0, ExpertMatrix::kGate))) {
  for (int64_t l = 0; l < config.num_layers; ++l) {  // every name, shape and dtype, before any work
    for (int64_t e = 0; e < config.num_experts; ++e) {
      for (const ExpertMatrix matrix : kExpertMatrices) place(l, e, matrix);
    }
  }
}

MatrixPlace ExpertSource::place(int64_t layer, int64_t expert, ExpertMatrix matrix) const {
  const std::vector<int64_t> shape = expert_matrix_shape(config_, matrix);
  if (!fused_) return place_of(checkpoint_, expert_tensor_name(layer, expert, matrix), shape);
  const bool down = matrix == ExpertMatrix::kDown;
  const int64_t d = config_.hidden_size, f = config_.intermediate_size;
  const std::string name = fused_name(checkpoint_, layer, matrix);
  const TensorInfo& info = checkpoint_.info(name);
  check_shape(checkpoint_, info, {config_.num_experts, down ? d : 2 * f, down ? f : d});
  const DType dtype = floating_dtype(checkpoint_, info);
  const int64_t first = expert * (down ? 1 : 2) * d * f + (matrix == ExpertMatrix::kUp ? d * f : 0);
  return {.file = &checkpoint_.file_of(name),
          .info = &info,
          .offset = static_cast<uint64_t>(first) * size_of(dtype),
          .rows = shape[0],
          .columns = shape[1],
          .dtype = dtype};
}

MatrixPlace ExpertSource::router(int64_t layer) const {
  return place_of(checkpoint_, fmt::format("model.layers.{}.mlp.gate.weight", layer),
                  {config_.num_experts, config_.hidden_size});
}

std::vector<std::string> ExpertSource::tensors_of(int64_t layer) const {
  if (fused_)
    return {fused_name(checkpoint_, layer, ExpertMatrix::kGate), fused_name(checkpoint_, layer, ExpertMatrix::kDown)};
  std::vector<std::string> names;
  for (int64_t e = 0; e < config_.num_experts; ++e) {
    for (const ExpertMatrix matrix : kExpertMatrices) names.push_back(expert_tensor_name(layer, e, matrix));
  }
  return names;
}

namespace {

// Exponent all ones: NaN or infinity. Files may hold unaligned data, hence memcpy.
template <class Bits>
int64_t count_non_finite(const void* data, int64_t count, Bits exponent, int64_t& first) {
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits value;
    std::memcpy(&value, static_cast<const char*>(data) + static_cast<size_t>(i) * sizeof value, sizeof value);
    if ((value & exponent) == exponent && bad++ == 0) first = i;
  }
  return bad;
}

}  // namespace

void FiniteCheck::scan(const void* data, DType dtype, int64_t count) {
  int64_t bad = 0, first = -1;
  switch (dtype) {
    case DType::kF32:
      bad = count_non_finite<uint32_t>(data, count, 0x7f800000u, first);
      break;
    case DType::kBF16:
      bad = count_non_finite<uint16_t>(data, count, 0x7f80u, first);
      break;
    case DType::kF16:
      bad = count_non_finite<uint16_t>(data, count, 0x7c00u, first);
      break;
    case DType::kF64:
      bad = count_non_finite<uint64_t>(data, count, 0x7ff0000000000000u, first);
      break;
    default:
      break;
  }
  if (bad > 0 && bad_ == 0) first_ = seen_ + first;
  bad_ += bad;
  seen_ += count;
}

int64_t FiniteCheck::finish() const {
  check(
      bad_ == 0 || allowed_, ErrorKind::kNumeric,
      "{}: tensor \"{}\": {} of {} values are NaN or infinite, the first at index {}; --allow-nonfinite copies them as "
      "they are",
      place_.file->path().string(), place_.info->name, bad_, seen_, first_);
  return bad_;
}

std::string model_fingerprint(const Checkpoint& checkpoint) {
  XXH3_state_t* state = XXH3_createState();
  XXH3_128bits_reset(state);
  std::vector<unsigned char> buffer;
  for (const std::string& name : checkpoint.names()) {
    const TensorInfo& info = checkpoint.info(name);
    const std::string head = fmt::format("{}|{}|{};", name, info.file_dtype, joined(info.shape, ","));
    XXH3_128bits_update(state, head.data(), head.size());
    const uint64_t total = info.bytes(), block = total <= kWholeTensorBytes ? total : kBlockBytes;
    const uint64_t blocks = total <= kWholeTensorBytes ? 1 : kBlocks;
    buffer.resize(block);
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t begin = blocks == 1 ? 0 : (total - block) / (blocks - 1) * i;
      checkpoint.file_of(name).read_raw(info, begin, buffer.data(), block);
      XXH3_128bits_update(state, buffer.data(), block);
    }
  }
  const std::string text = hex(XXH3_128bits_digest(state));
  XXH3_freeState(state);
  return text;
}

std::string hash_bytes(const void* data, size_t bytes) { return hex(XXH3_128bits(data, bytes)); }

}  // namespace lightmoe
