// The statistics file: safetensors, layers stacked.

#include <algorithm>
#include <cmath>

#include "compress/statistics.h"
#include "compress/text.h"
#include "loaders/safetensors.h"

namespace lightmoe {
namespace {

constexpr const char* kFormat = "statistics-1";

enum class Extent : uint8_t { kSlots, kHidden, kUnits };  // [E], [E*D], [E*F]
struct Field {
  const char* name;
  std::vector<double> LayerStatistics::*values;
  Extent extent;
  bool optional = false;  // may be absent
  bool negative = false;  // may hold negative numbers
};
constexpr Field kFields[] = {
    {"count", &LayerStatistics::count, Extent::kSlots},
    {"gate_mass", &LayerStatistics::gate_mass, Extent::kSlots},
    {"output_norm", &LayerStatistics::output_norm, Extent::kSlots},
    {"gate_output_norm", &LayerStatistics::gate_output_norm, Extent::kSlots},
    {"output_norm2", &LayerStatistics::output_norm2, Extent::kSlots},
    {"gate_output_norm2", &LayerStatistics::gate_output_norm2, Extent::kSlots},
    {"routed_output", &LayerStatistics::routed_output, Extent::kHidden, false, true},
    {"routed_output2", &LayerStatistics::routed_output2, Extent::kHidden, true},
    {"all_output", &LayerStatistics::all_output, Extent::kHidden, true, true},
    {"unit_gradient2", &LayerStatistics::unit_gradient2, Extent::kUnits, true},
    {"taylor", &LayerStatistics::taylor, Extent::kSlots, true},
};

// `units`: F of the file or of the values.
Shape stacked_shape(const Statistics& s, Extent extent, int64_t units) {
  if (extent == Extent::kSlots) return {s.num_layers, s.num_slots};
  return {s.num_layers, s.num_slots, extent == Extent::kHidden ? s.hidden : units};
}
int64_t units_of(const Statistics& s) {
  return static_cast<int64_t>(s.layers.front().unit_gradient2.size()) / s.num_slots;
}

template <class T>
Tensor stack(const Statistics& s, const Shape& shape, std::vector<T> LayerStatistics::*values) {
  Tensor out = Tensor::empty(shape, dtype_of<T>);
  T* to = out.data<T>();
  for (const LayerStatistics& layer : s.layers) to = std::copy((layer.*values).begin(), (layer.*values).end(), to);
  return out;
}

template <class T>
std::vector<T> part(const Tensor& stacked, int64_t layer) {
  const Tensor row = stacked.row(layer);
  return std::vector<T>(row.data<T>(), row.data<T>() + row.numel());
}

std::string metadata_text(const SafetensorsFile& file, const char* key) {
  const auto found = file.metadata().find(key);
  return found == file.metadata().end() ? std::string() : found->second;
}

int64_t metadata_integer(const SafetensorsFile& file, const char* key, int64_t low, int64_t high) {
  const std::string text = metadata_text(file, key);
  const bool digits = !text.empty() && text.size() < 19 && text.find_first_not_of("0123456789") == std::string::npos;
  const int64_t value = digits ? std::stoll(text) : -1;
  check(value >= low && value <= high, ErrorKind::kInput,
        "{}: metadata \"{}\" is \"{}\", expected a number from {} to {}", file.path().string(), key, text, low, high);
  return value;
}

void check_shape(const SafetensorsFile& file, const char* name, const Shape& shape) {
  const TensorInfo* info = file.find(name);
  check(info != nullptr, ErrorKind::kInput, "{}: tensor \"{}\" is missing", file.path().string(), name);
  check(info->shape.size() == static_cast<size_t>(shape.rank()) && Shape(info->shape) == shape, ErrorKind::kInput,
        "{}: tensor \"{}\" is [{}], expected {}", file.path().string(), name, joined(info->shape, ", "), shape);
}

Tensor read_checked(const SafetensorsFile& file, const char* name, const Shape& shape, DType dtype) {
  check_shape(file, name, shape);
  return file.read(name, dtype);
}

template <class T>
void check_finite(const std::vector<T>& values, bool non_negative, const SafetensorsFile& file, const char* name,
                  size_t layer) {
  for (size_t i = 0; i < values.size(); ++i) {
    check(std::isfinite(values[i]) && (!non_negative || values[i] >= 0), ErrorKind::kNumeric,
          "{}: {} of layer {} holds {} at {}; the statistics are unusable", file.path().string(), name, layer,
          values[i], i);
  }
}

// F as the file has it, 1 where it is not to be had.
int64_t units_in(const SafetensorsFile& file) {
  const TensorInfo* info = file.find("unit_gradient2");
  return info != nullptr && info->shape.size() == 3 && info->shape[2] <= 1 << 20 ? info->shape[2] : 1;
}

// [L,N,D] as a matrix [L*N,D], to read one layer at a time.
TensorInfo stacked_rows(TensorInfo info) {
  info.shape = {info.shape[0] * info.shape[1], info.shape[2]};
  return info;
}

void read_sample(const SafetensorsFile& file, Statistics& s) {
  const TensorInfo* info = file.find("sample_sequence");
  if (info == nullptr) return;
  check(info->shape.size() == 1, ErrorKind::kInput, "{}: tensor \"sample_sequence\" is not a vector",
        file.path().string());
  const int64_t n = info->shape[0];
  const Tensor sequence = read_checked(file, "sample_sequence", {n}, DType::kI32);
  s.sample_sequence.assign(sequence.data<int32_t>(), sequence.data<int32_t>() + n);
  const Tensor token = read_checked(file, "sample_token", {n}, DType::kI64);
  s.sample_token.assign(token.data<int64_t>(), token.data<int64_t>() + n);
  const auto read_optional = [&](const char* name, std::vector<int32_t>& values) {
    if (file.find(name) == nullptr) return;
    const Tensor t = read_checked(file, name, {n}, DType::kI32);
    values.assign(t.data<int32_t>(), t.data<int32_t>() + n);
  };
  read_optional("sample_ids", s.sample_ids);
  read_optional("sample_labels", s.sample_labels);
  const Tensor logits = read_checked(file, "sample_logits", {s.num_layers, n, s.num_slots}, DType::kF32);
  for (size_t l = 0; l < s.layers.size(); ++l) {
    s.layers[l].sample_logits = part<float>(logits, static_cast<int64_t>(l));
    check_finite(s.layers[l].sample_logits, false, file, "sample_logits", l);
  }
  if (file.find("sample_inputs") == nullptr) return;
  check_shape(file, "sample_inputs", {s.num_layers, n, s.hidden});
  for (size_t l = 0; l < s.layers.size(); ++l) {
    std::vector<float>& inputs = s.layers[l].sample_inputs;
    inputs.resize(static_cast<size_t>(n * s.hidden));
    const TensorInfo flat = stacked_rows(*file.find("sample_inputs"));
    file.read_rows(flat, static_cast<int64_t>(l) * n, Tensor::borrow(inputs.data(), {n, s.hidden}, DType::kF32));
    check_finite(inputs, false, file, "sample_inputs", l);
  }
}

}  // namespace

void save_statistics(const Statistics& s, const std::filesystem::path& file) {
  const DeviceScope host(DeviceKind::kCpu);
  require(!s.layers.empty(), "save_statistics: no layers");
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const Field& field : kFields) {
    if ((s.layers.front().*field.values).empty()) continue;
    tensors.emplace_back(field.name, stack(s, stacked_shape(s, field.extent, units_of(s)), field.values));
  }
  std::vector<double> norms;
  for (const LayerStatistics& layer : s.layers) norms.push_back(layer.logit_norm);
  tensors.emplace_back("logit_norm", Tensor::from(norms, {s.num_layers}));
  if (const int64_t n = s.sample_size(); n > 0) {
    tensors.emplace_back("sample_sequence", Tensor::from(s.sample_sequence, {n}));
    tensors.emplace_back("sample_token", Tensor::from(s.sample_token, {n}));
    if (!s.sample_ids.empty()) tensors.emplace_back("sample_ids", Tensor::from(s.sample_ids, {n}));
    if (!s.sample_labels.empty()) tensors.emplace_back("sample_labels", Tensor::from(s.sample_labels, {n}));
    tensors.emplace_back("sample_logits", stack(s, {s.num_layers, n, s.num_slots}, &LayerStatistics::sample_logits));
    if (!s.layers.front().sample_inputs.empty()) {
      tensors.emplace_back("sample_inputs", stack(s, {s.num_layers, n, s.hidden}, &LayerStatistics::sample_inputs));
    }
  }
  write_safetensors(file, tensors,
                    {{"lightmoe", kFormat},
                     {"model", s.model},
                     {"data", s.data},
                     {"tokens", std::to_string(s.tokens)},
                     {"layers", std::to_string(s.num_layers)},
                     {"slots", std::to_string(s.num_slots)},
                     {"hidden", std::to_string(s.hidden)},
                     {"version", s.version}});
}

Statistics load_statistics(const std::filesystem::path& path) {
  const DeviceScope host(DeviceKind::kCpu);
  const SafetensorsFile file(path);
  const std::string format = metadata_text(file, "lightmoe");
  check(format == kFormat, ErrorKind::kInput,
        "{}: not a statistics file (metadata \"lightmoe\" is \"{}\", expected \"{}\"); `lightmoe calibrate` writes one",
        path.string(), format, kFormat);
  Statistics s{.num_layers = metadata_integer(file, "layers", 1, 4096),
               .num_slots = metadata_integer(file, "slots", 1, 4096),
               .hidden = metadata_integer(file, "hidden", 1, 1 << 20)};
  for (const Field& field : kFields) {  // all shapes before any memory
    if (field.optional && file.find(field.name) == nullptr) continue;
    check_shape(file, field.name, stacked_shape(s, field.extent, units_in(file)));
  }
  s = empty_statistics(s.num_layers, s.num_slots, s.hidden, true);
  s.tokens = metadata_integer(file, "tokens", 1, int64_t{1} << 50);
  s.model = metadata_text(file, "model"), s.data = metadata_text(file, "data");
  s.version = metadata_text(file, "version");
  for (const Field& field : kFields) {
    if (field.optional && file.find(field.name) == nullptr) {
      for (LayerStatistics& layer : s.layers) (layer.*field.values).clear();
      continue;
    }
    const Tensor stacked = read_checked(file, field.name, stacked_shape(s, field.extent, units_in(file)), DType::kF64);
    for (size_t l = 0; l < s.layers.size(); ++l) {
      s.layers[l].*field.values = part<double>(stacked, static_cast<int64_t>(l));
      check_finite(s.layers[l].*field.values, !field.negative, file, field.name, l);
    }
  }
  const Tensor norms = read_checked(file, "logit_norm", {s.num_layers}, DType::kF64);
  for (size_t l = 0; l < s.layers.size(); ++l) {
    s.layers[l].logit_norm = norms.data<double>()[l];
    check_finite(std::vector<double>{s.layers[l].logit_norm}, true, file, "logit_norm", l);
  }
  read_sample(file, s);
  return s;
}

}  // namespace lightmoe
