// Reading one safetensors file.

#include "loaders/safetensors.h"

#include <bit>
#include <cstring>
#include <limits>
#include <unordered_map>
#include <utility>

#include "loaders/input_file.h"
#include "loaders/safetensors_header.h"
#include "runtime/device.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors data are little endian");

constexpr int64_t kConvertPiece = 256 * 1024;  // elements; a piece stays in the cache between pread and conversion
constexpr std::string_view kLfsPointer = "version https://git-lfs";

std::string read_header_text(const InputFile& file) {
  const std::string name = file.path().string();
  char start[kLfsPointer.size()] = {};
  const size_t available = std::min<uint64_t>(file.size(), sizeof start);
  file.read(0, start, available);
  check(std::string_view(start, available) != kLfsPointer, ErrorKind::kInput,
        "{}: is a Git-LFS pointer, not the file itself; download the real file (git lfs pull)", name);
  check(file.size() >= 8, ErrorKind::kInput, "{}: has {} bytes, a safetensors file has at least 8; download it again",
        name, file.size());
  uint64_t length = 0;
  std::memcpy(&length, start, sizeof length);
  check(length <= kMaxHeaderBytes, ErrorKind::kInput,
        "{}: header of {} bytes, at most {} accepted; not a safetensors file", name, length, kMaxHeaderBytes);
  check(length <= file.size() - 8, ErrorKind::kInput,
        "{}: needs {} bytes for its header alone, has {}; download it again", name, 8 + length, file.size());
  std::string text(length, '\0');
  file.read(8, text.data(), length);
  return text;
}

// Integers of any width in files to i32, i64, u8: each value checked against the range of the target.
template <class From, class To>
void convert_integers(const char* from, To* to, int64_t count, const std::string& where) {
  for (int64_t i = 0; i < count; ++i) {
    From value;
    std::memcpy(&value, from + i * static_cast<int64_t>(sizeof(From)), sizeof(From));
    check(std::in_range<To>(value), ErrorKind::kInput, "{}: value {} does not fit {}", where, value,
          name_of(dtype_of<To>));
    to[i] = static_cast<To>(value);
  }
}

template <class To>
bool convert_integers_to(std::string_view file_dtype, const char* from, To* to, int64_t count,
                         const std::string& where) {
  if (file_dtype == "I64")
    convert_integers<int64_t>(from, to, count, where);
  else if (file_dtype == "U64")
    convert_integers<uint64_t>(from, to, count, where);
  else if (file_dtype == "I32")
    convert_integers<int32_t>(from, to, count, where);
  else if (file_dtype == "U32")
    convert_integers<uint32_t>(from, to, count, where);
  else if (file_dtype == "I16")
    convert_integers<int16_t>(from, to, count, where);
  else if (file_dtype == "U16")
    convert_integers<uint16_t>(from, to, count, where);
  else if (file_dtype == "I8")
    convert_integers<int8_t>(from, to, count, where);
  else if (file_dtype == "U8" || file_dtype == "BOOL")
    convert_integers<uint8_t>(from, to, count, where);
  else
    return false;
  return true;
}

}  // namespace

struct SafetensorsFile::State {
  explicit State(const std::filesystem::path& path) : file(path) {
    const std::string text = read_header_text(file);
    header = parse_safetensors_header(text, file.size(), path.string());
    index.reserve(header.tensors.size());
    for (size_t i = 0; i < header.tensors.size(); ++i) index.emplace(header.tensors[i].name, i);
  }

  std::string where(const TensorInfo& info) const {
    return fmt::format("{}: tensor \"{}\"", file.path().string(), printable(info.name));
  }

  // `count` elements from number `first` on, converted, into memory of the given dtype.
  void read_elements(const TensorInfo& info, int64_t first, int64_t count, void* out, DType dtype) const {
    const int64_t width = bits_of_file_dtype(info.file_dtype) / 8;
    const uint64_t begin = info.begin + static_cast<uint64_t>(first * width);
    const std::optional<DType> own = info.dtype();
    if (own == dtype) return file.read(begin, out, static_cast<size_t>(count * width));
    const bool floating = own && is_floating(*own);
    check(width > 0 && floating == is_floating(dtype) && (floating || !info.file_dtype.starts_with('F')),
          ErrorKind::kInput, "{}: holds {}, which cannot be read as {}", where(info), info.file_dtype, name_of(dtype));
    char* to = static_cast<char*>(out);
    parallel_for(0, count, kConvertPiece, [&](int64_t from, int64_t end) {
      std::vector<char> piece(static_cast<size_t>(std::min(end - from, kConvertPiece) * width));
      for (int64_t i = from; i < end; i += kConvertPiece) {
        const int64_t n = std::min(kConvertPiece, end - i);
        file.read(begin + static_cast<uint64_t>(i * width), piece.data(), static_cast<size_t>(n * width));
        convert_piece(info, piece.data(), to + i * static_cast<int64_t>(size_of(dtype)), n, dtype);
      }
    });
  }

  void convert_piece(const TensorInfo& info, const char* from, char* to, int64_t count, DType dtype) const {
    bool done = false;
    switch (dtype) {
      case DType::kI32:
        done = convert_integers_to(info.file_dtype, from, reinterpret_cast<int32_t*>(to), count, where(info));
        break;
      case DType::kI64:
        done = convert_integers_to(info.file_dtype, from, reinterpret_cast<int64_t*>(to), count, where(info));
        break;
      case DType::kU8:
        done = convert_integers_to(info.file_dtype, from, reinterpret_cast<uint8_t*>(to), count, where(info));
        break;
      default:
        convert(from, *info.dtype(), to, dtype, static_cast<size_t>(count));
        done = true;
    }
    check(done, ErrorKind::kInput, "{}: holds {}, which cannot be read as {}", where(info), info.file_dtype,
          name_of(dtype));
  }

  InputFile file;
  SafetensorsHeader header;
  std::unordered_map<std::string, size_t> index;
};

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : state_(std::make_unique<State>(path)) {}
SafetensorsFile::~SafetensorsFile() = default;
SafetensorsFile::SafetensorsFile(SafetensorsFile&&) noexcept = default;

const std::vector<TensorInfo>& SafetensorsFile::tensors() const { return state_->header.tensors; }
const std::map<std::string, std::string>& SafetensorsFile::metadata() const { return state_->header.metadata; }
const std::filesystem::path& SafetensorsFile::path() const { return state_->file.path(); }

const TensorInfo* SafetensorsFile::find(const std::string& name) const {
  const auto found = state_->index.find(name);
  return found == state_->index.end() ? nullptr : &state_->header.tensors[found->second];
}

// Files are read by the host: what the host cannot write to gets its values piece by piece. read(first element, count, to).
template <class Read>
static void fill_from_host(const Tensor& out, Read&& read) {
  if (is_host_memory(out.device())) return read(0, out.numel(), out.raw());
  const auto size = size_of(out.dtype());
  upload(out.device(), out.raw(), static_cast<size_t>(out.bytes()), [&](void* piece, size_t offset, size_t count) {
    read(static_cast<int64_t>(offset / size), static_cast<int64_t>(count / size), piece);
  });
}

Tensor SafetensorsFile::read(const std::string& name, DType dtype) const {
  const TensorInfo* info = find(name);
  check(info != nullptr, ErrorKind::kInput, "{}: has no tensor \"{}\"", path().string(), printable(name));
  check(info->shape.size() <= Shape::kMaxRank, ErrorKind::kInput, "{}: shape {} has more than {} dimensions",
        state_->where(*info), shape_text(info->shape), Shape::kMaxRank);
  const Tensor out = Tensor::empty(Shape(info->shape), dtype);
  fill_from_host(
      out, [&](int64_t first, int64_t count, void* to) { state_->read_elements(*info, first, count, to, dtype); });
  return out;
}

Tensor SafetensorsFile::read(const std::string& name) const {
  const TensorInfo* info = find(name);
  check(info != nullptr, ErrorKind::kInput, "{}: has no tensor \"{}\"", path().string(), printable(name));
  check(info->dtype().has_value(), ErrorKind::kInput, "{}: dtype {} is not supported", state_->where(*info),
        info->file_dtype);
  return read(name, *info->dtype());
}

void SafetensorsFile::read_rows(const TensorInfo& info, int64_t first_row, const Tensor& out) const {
  bool fits = !info.shape.empty() && static_cast<size_t>(out.rank()) == info.shape.size() && first_row >= 0 &&
              first_row <= info.shape[0] && out.dim(0) <= info.shape[0] - first_row;
  for (size_t i = 1; fits && i < info.shape.size(); ++i) fits = out.dim(static_cast<int>(i)) == info.shape[i];
  check(fits, ErrorKind::kInput, "{}: shape {}, asked for rows {}..{} as {}", state_->where(info),
        shape_text(info.shape), first_row, first_row + (out.rank() > 0 ? out.dim(0) : 0), out.shape());
  const int64_t row = info.shape[0] == 0 ? 0 : info.numel() / info.shape[0];
  fill_from_host(out, [&](int64_t first, int64_t count, void* to) {
    state_->read_elements(info, first_row * row + first, count, to, out.dtype());
  });
}

void SafetensorsFile::read_raw(const TensorInfo& info, uint64_t offset, void* out, size_t bytes) const {
  check(offset <= info.bytes() && bytes <= info.bytes() - offset, ErrorKind::kInput,
        "{}: {} bytes from byte {} asked, has {}", state_->where(info), bytes, offset, info.bytes());
  state_->file.read(info.begin + offset, out, bytes);
}

}  // namespace lightmoe
