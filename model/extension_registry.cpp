#include "model/moe_extension.h"

#include <xxhash.h>

#include <algorithm>
#include <charconv>
#include <cmath>

#include "loaders/json.h"
#include "runtime/nearest.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

std::vector<ExtensionKind>& registry() {
  static std::vector<ExtensionKind> kinds;
  return kinds;
}

std::string names_of_kinds() {
  std::string names;
  for (const ExtensionKind& kind : extension_kinds()) names += (names.empty() ? "" : ", ") + kind.name;
  return names;
}

const ExtensionKind* kind_or_null(std::string_view name) {
  for (const ExtensionKind& kind : extension_kinds()) {
    if (kind.name == name) return &kind;
  }
  return nullptr;
}

ExtensionShape defaults_of(const ExtensionKind& kind) {
  ExtensionShape shape{.kind = kind.name, .settings = {}};
  for (const ExtensionSetting& setting : kind.settings) shape.settings[setting.name] = setting.value;
  return shape;
}

template <class T>
void fill(const Tensor& out, ExtensionStart start, uint64_t seed, uint64_t stream) {
  if (start == ExtensionStart::kZero) return out.fill_zero();
  Philox random(seed, stream);
  const double deviation = 1 / std::sqrt(static_cast<double>(out.dim(-1)));
  for (int64_t i = 0; i < out.numel(); ++i)
    out.data<T>()[i] = static_cast<T>(start == ExtensionStart::kOne ? 1.0 : deviation * random.normal());
}

}  // namespace

std::string ExtensionShape::text() const {
  std::string text = kind;
  char separator = ':';
  for (const auto& [name, value] : settings) {
    text += fmt::format("{}{}={}", separator, name, value);
    separator = ',';
  }
  return text;
}

RegisterExtension::RegisterExtension(ExtensionKind kind) {
  std::vector<ExtensionKind>& all = registry();
  const auto place = std::lower_bound(all.begin(), all.end(), kind,
                                      [](const ExtensionKind& a, const ExtensionKind& b) { return a.name < b.name; });
  all.insert(place, std::move(kind));
}

const std::vector<ExtensionKind>& extension_kinds() { return registry(); }

const ExtensionKind& find_extension(std::string_view name) {
  if (const ExtensionKind* kind = kind_or_null(name)) return *kind;
  std::vector<std::string> names;
  for (const ExtensionKind& kind : extension_kinds()) names.push_back(kind.name);
  const std::string near = nearest(std::string(name), names);
  fail(ErrorKind::kUsage, "extension \"{}\": expected one of {}{}", name, names_of_kinds(),
       near.empty() ? "" : "; did you mean " + near + "?");
}

ExtensionShape parse_extension(const std::string& text) {
  const size_t colon = std::min(text.find(':'), text.size());
  const ExtensionKind& kind = find_extension(text.substr(0, colon));
  ExtensionShape shape = defaults_of(kind);
  for (size_t begin = colon + 1; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size()), equals = text.find('=', begin);
    const std::string item = text.substr(begin, end - begin);
    begin = end + 1;
    check(equals < end, ErrorKind::kUsage, "extension {}: \"{}\" is not NAME=NUMBER", kind.name, item);
    const std::string name = item.substr(0, item.find('=')), value = item.substr(item.find('=') + 1);
    check(shape.settings.contains(name), ErrorKind::kUsage, "extension {}: no setting \"{}\", expected {}", kind.name,
          name, defaults_of(kind).text());
    const auto [last, error] = std::from_chars(value.data(), value.data() + value.size(), shape.settings[name]);
    check(error == std::errc() && last == value.data() + value.size(), ErrorKind::kUsage,
          "extension {}: {} is \"{}\", expected a whole number", kind.name, name, value);
  }
  return shape;
}

void check_extension(const ExtensionShape& shape, const OlmoeConfig& config, ErrorKind error,
                     const std::string& where) {
  const ExtensionKind& kind = find_extension(shape.kind);
  for (const ExtensionSetting& setting : kind.settings) {
    const int64_t value = shape.settings.at(setting.name);
    check(value >= setting.low && value <= setting.high, error, "{}: {} {} is {}, expected {} to {}", where, kind.name,
          setting.name, value, setting.low, setting.high);
  }
  const std::string problem = kind.problem == nullptr ? "" : kind.problem(config, shape.settings);
  check(problem.empty(), error, "{}: {} {}", where, kind.name, problem);
}

Json extension_to_json(const ExtensionShape& shape) {
  Json json = shape.settings;
  json["kind"] = shape.kind;
  return json;
}

ExtensionShape extension_from_json(const Json& object, const std::string& where) {
  const bool named = object.is_object() && object.contains("kind") && object["kind"].is_string();
  check(named, ErrorKind::kInput, "{}: extension has no kind", where);
  const ExtensionKind* kind = kind_or_null(object["kind"].get_ref<const std::string&>());
  check(kind != nullptr, ErrorKind::kInput, "{}: extension of kind {}, this version knows {}", where,
        object["kind"].dump(), names_of_kinds());
  ExtensionShape shape = defaults_of(*kind);
  for (auto& [name, value] : shape.settings) {
    const bool given = object.contains(name) && object[name].is_number_integer();
    check(given, ErrorKind::kInput, "{}: extension {}: {} is missing or no integer", where, kind->name, name);
    const bool huge = object[name].is_number_unsigned() && object[name].get<uint64_t>() > uint64_t{1} << 62;
    value = huge ? int64_t{1} << 62 : object[name].get<int64_t>();
  }
  return shape;
}

std::shared_ptr<MoeExtension> declare_extension(const ExtensionShape& shape, const MoeDims& dims) {
  std::shared_ptr<MoeExtension> extension = find_extension(shape.kind).declare(dims, shape.settings);
  extension->shape_ = shape;
  return extension;
}

int64_t extension_parameters(const ExtensionShape& shape, const MoeDims& dims) {
  int64_t sum = 0;
  if (!shape.any()) return sum;
  for (const ExtensionTensor& tensor : declare_extension(shape, dims)->tensors())
    sum += tensor.parameter->value.numel();
  return sum;
}

std::string extension_tensor_name(int64_t layer, const std::string& kind, const std::string& name) {
  return fmt::format("model.layers.{}.mlp.{}.{}", layer, kind, name);
}

void start_extension(const MoeExtension& extension, int64_t layer, uint64_t seed) {
  for (const ExtensionTensor& tensor : extension.tensors()) {
    const std::string name = extension_tensor_name(layer, extension.shape().kind, tensor.name);
    const uint64_t stream = XXH3_64bits(name.data(), name.size());
    const Tensor& value = tensor.parameter->value;
    const Tensor made = Tensor::empty(value.shape(), value.dtype(), DeviceKind::kCpu);
    made.dtype() == DType::kF64 ? fill<double>(made, tensor.start, seed, stream)
                                : fill<float>(made, tensor.start, seed, stream);
    value.copy_from(made);
  }
}

}  // namespace lightmoe
