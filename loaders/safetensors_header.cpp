#include "loaders/safetensors_header.h"

#include <algorithm>
#include <array>
#include <limits>

#include "loaders/json.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

struct FileDType {
  std::string_view name;
  int64_t bits;
  std::optional<DType> dtype;
};
constexpr std::array kFileDTypes{
    FileDType{"F32", 32, DType::kF32},
    FileDType{"BF16", 16, DType::kBF16},
    FileDType{"F16", 16, DType::kF16},
    FileDType{"F64", 64, DType::kF64},
    FileDType{"I64", 64, DType::kI64},
    FileDType{"I32", 32, DType::kI32},
    FileDType{"U8", 8, DType::kU8},
    FileDType{"BOOL", 8, DType::kU8},
    FileDType{"I8", 8, {}},
    FileDType{"I16", 16, {}},
    FileDType{"U16", 16, {}},
    FileDType{"U32", 32, {}},
    FileDType{"U64", 64, {}},
    FileDType{"C64", 64, {}},
    FileDType{"F8_E4M3", 8, {}},
    FileDType{"F8_E5M2", 8, {}},
    FileDType{"F8_E8M0", 8, {}},
    FileDType{"F8_E4M3FNUZ", 8, {}},
    FileDType{"F8_E5M2FNUZ", 8, {}},
    FileDType{"F6_E2M3", 6, {}},
    FileDType{"F6_E3M2", 6, {}},
    FileDType{"F4", 4, {}},
};
constexpr size_t kMaxRank = 64, kMaxNameBytes = 4096;
constexpr JsonLimits kHeaderLimits{.max_bytes = kMaxHeaderBytes, .max_depth = 4, .max_values = 2'000'000};

const FileDType* find_file_dtype(std::string_view name) {
  const auto* found =
      std::find_if(kFileDTypes.begin(), kFileDTypes.end(), [&](const FileDType& d) { return d.name == name; });
  return found == kFileDTypes.end() ? nullptr : found;
}

// One entry of the header; `where` is "file: tensor "name"" and starts every message.
class EntryReader {
 public:
  EntryReader(const Json& entry, std::string where, uint64_t data_begin, uint64_t data_bytes)
      : entry_(entry), where_(std::move(where)), data_begin_(data_begin), data_bytes_(data_bytes) {}

  TensorInfo read(const std::string& name) const {
    check(entry_.is_object(), ErrorKind::kInput, "{}: its header entry is {}, expected an object", where_,
          entry_.type_name());
    for (const auto& [key, value] : entry_.items()) {
      check(key == "dtype" || key == "shape" || key == "data_offsets", ErrorKind::kInput,
            "{}: unknown header key \"{}\"", where_, printable(key));
    }
    TensorInfo info;
    info.name = name;
    const Json& dtype = at("dtype");
    check(dtype.is_string(), ErrorKind::kInput, "{}: dtype is not a string", where_);
    info.file_dtype = dtype.get<std::string>();
    read_shape(info);
    read_offsets(info);
    return info;
  }

 private:
  const Json& at(const char* key) const {
    const auto found = entry_.find(key);
    check(found != entry_.end(), ErrorKind::kInput, "{}: its header entry has no \"{}\"", where_, key);
    return *found;
  }

  void read_shape(TensorInfo& info) const {
    const Json& shape = at("shape");
    check(shape.is_array() && shape.size() <= kMaxRank, ErrorKind::kInput,
          "{}: shape is not an array of at most {} dimensions", where_, kMaxRank);
    for (const Json& dim : shape) {
      check(
          dim.is_number_unsigned() && dim.get<uint64_t>() <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()),
          ErrorKind::kInput, "{}: shape {} has a dimension that is not a non-negative integer", where_,
          printable(shape.dump()));
      info.shape.push_back(dim.get<int64_t>());
    }
  }

  // Bits of the whole tensor. The product of the non-zero dimensions must fit too: code downstream multiplies in any order.
  uint64_t checked_bytes(const TensorInfo& info) const {
    const FileDType* dtype = find_file_dtype(info.file_dtype);
    if (dtype == nullptr) {
      std::string known;
      for (const FileDType& d : kFileDTypes) known += fmt::format("{}{}", known.empty() ? "" : " ", d.name);
      fail(ErrorKind::kInput, "{}: dtype \"{}\" is unknown; known: {}", where_, printable(info.file_dtype), known);
    }
    int64_t bits = dtype->bits;
    bool empty = false;
    for (const int64_t dim : info.shape) {
      empty = empty || dim == 0;
      check(!__builtin_mul_overflow(bits, std::max<int64_t>(dim, 1), &bits), ErrorKind::kInput,
            "{}: shape {} overflows 64 bits", where_, shape_text(info.shape));
    }
    if (empty) bits = 0;
    check(bits % 8 == 0, ErrorKind::kInput, "{}: shape {} of {} is not a whole number of bytes", where_,
          shape_text(info.shape), info.file_dtype);
    return static_cast<uint64_t>(bits) / 8;
  }

  void read_offsets(TensorInfo& info) const {
    const Json& offsets = at("data_offsets");
    check(
        offsets.is_array() && offsets.size() == 2 && offsets[0].is_number_unsigned() && offsets[1].is_number_unsigned(),
        ErrorKind::kInput, "{}: data_offsets {} is not two non-negative integers", where_, printable(offsets.dump()));
    const uint64_t begin = offsets[0].get<uint64_t>(), end = offsets[1].get<uint64_t>();
    check(begin <= end, ErrorKind::kInput, "{}: data_offsets [{}, {}] run backwards", where_, begin, end);
    const uint64_t expected = checked_bytes(info);
    check(end - begin == expected, ErrorKind::kInput, "{}: data_offsets [{}, {}] hold {} bytes, {} {} needs {}", where_,
          begin, end, end - begin, info.file_dtype, shape_text(info.shape), expected);
    check(
        end <= data_bytes_, ErrorKind::kInput,
        "{}: needs the file's data to reach byte {}, it has {} bytes of data; the file is truncated, download it again",
        where_, end, data_bytes_);
    info.begin = data_begin_ + begin;
    info.end = data_begin_ + end;
  }

  const Json& entry_;
  std::string where_;
  uint64_t data_begin_, data_bytes_;
};

// Sorted by offset, the tensors must follow each other without hole or overlap and end with the file.
void check_tiling(const std::vector<TensorInfo>& tensors, uint64_t data_begin, uint64_t file_bytes,
                  const std::string& file) {
  uint64_t reached = data_begin;
  const TensorInfo* previous = nullptr;
  for (const TensorInfo& info : tensors) {
    if (info.begin != reached) {
      const std::string before =
          previous == nullptr ? "the start of the data" : fmt::format("tensor \"{}\"", printable(previous->name));
      fail(ErrorKind::kInput, "{}: tensor \"{}\" begins at data byte {}, {} ends at {}: {}", file, printable(info.name),
           info.begin - data_begin, before, reached - data_begin,
           info.begin < reached ? "they overlap" : "a hole between them");
    }
    reached = info.end;
    previous = &info;
  }
  check(reached == file_bytes, ErrorKind::kInput, "{}: the tensors end at byte {}, the file has {} bytes ({} trailing)",
        file, reached, file_bytes, file_bytes - reached);
}

std::map<std::string, std::string> read_metadata(const Json& object, const std::string& file) {
  check(object.is_object(), ErrorKind::kInput, "{}: __metadata__ is {}, expected an object", file, object.type_name());
  std::map<std::string, std::string> metadata;
  for (const auto& [key, value] : object.items()) {
    check(value.is_string(), ErrorKind::kInput, "{}: __metadata__ \"{}\" is {}, expected a string", file,
          printable(key), value.type_name());
    metadata.emplace(key, value.get<std::string>());
  }
  return metadata;
}

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view text, uint64_t file_bytes, const std::string& name) {
  check(!text.empty() && text[0] == '{', ErrorKind::kInput,
        "{}: the header does not start with '{{'; not a safetensors file", name);
  const uint64_t data_begin = 8 + text.size();
  require(data_begin <= file_bytes, "{}: header past the file", name);
  const Json root = parse_json(text, name + ": header", kHeaderLimits);
  SafetensorsHeader header;
  for (const auto& [key, value] : root.items()) {
    if (key == "__metadata__") {
      header.metadata = read_metadata(value, name);
      continue;
    }
    check(!key.empty() && key.size() <= kMaxNameBytes, ErrorKind::kInput,
          "{}: a tensor name of {} bytes, expected 1 to {}", name, key.size(), kMaxNameBytes);
    const EntryReader reader(value, fmt::format("{}: tensor \"{}\"", name, printable(key)), data_begin,
                             file_bytes - data_begin);
    header.tensors.push_back(reader.read(key));
  }
  std::stable_sort(header.tensors.begin(), header.tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;  // empty tensors first
  });
  check_tiling(header.tensors, data_begin, file_bytes, name);
  return header;
}

int64_t TensorInfo::numel() const {
  int64_t count = 1;
  for (const int64_t dim : shape) count *= dim;
  return count;
}

std::optional<DType> TensorInfo::dtype() const {
  const FileDType* found = find_file_dtype(file_dtype);
  return found == nullptr ? std::nullopt : found->dtype;
}

int64_t bits_of_file_dtype(std::string_view file_dtype) {
  const FileDType* found = find_file_dtype(file_dtype);
  return found == nullptr ? 0 : found->bits;
}

std::string_view file_dtype_of(DType dtype) {
  for (const FileDType& d : kFileDTypes) {
    if (d.dtype == dtype) return d.name;
  }
  return "?";
}

std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += fmt::format("{}{}", i ? ", " : "", shape[i]);
  return text + "]";
}

}  // namespace lightmoe
