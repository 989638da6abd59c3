#include "loaders/finite_scan.h"

#include <algorithm>
#include <cstring>

namespace lightmoe {
namespace {

constexpr int64_t kPieceBytes = 4 << 20, kBlock = 4096;

// An exponent of all ones is a NaN or an infinity. The largest exponent of a block tells, in vector instructions, whether to count.
template <class Bits>
int64_t count_nonfinite(const char* data, int64_t count, Bits exponent) {
  int64_t found = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    Bits block[kBlock];
    const int64_t n = std::min(kBlock, count - begin);
    std::memcpy(block, data + begin * static_cast<int64_t>(sizeof(Bits)), static_cast<size_t>(n) * sizeof(Bits));
    Bits largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, static_cast<Bits>(block[i] & exponent));
    if (largest != exponent) continue;
    for (int64_t i = 0; i < n; ++i) found += (block[i] & exponent) == exponent ? 1 : 0;
  }
  return found;
}

int64_t count_in(DType dtype, const char* data, int64_t count) {
  switch (dtype) {
    case DType::kF32:
      return count_nonfinite<uint32_t>(data, count, 0x7f800000u);
    case DType::kBF16:
      return count_nonfinite<uint16_t>(data, count, 0x7f80u);
    case DType::kF16:
      return count_nonfinite<uint16_t>(data, count, 0x7c00u);
    case DType::kF64:
      return count_nonfinite<uint64_t>(data, count, 0x7ff0000000000000u);
    default:
      return 0;
  }
}

// `first` is the index of data[0] in its tensor.
void scan_piece(DType dtype, const char* data, int64_t first, int64_t count, FiniteScan* result) {
  const int64_t width = static_cast<int64_t>(size_of(dtype));
  const int64_t found = count_in(dtype, data, count);  // one thread keeps up with any disk
  if (found == 0) return;
  result->nonfinite += found;
  if (result->first >= 0) return;
  int64_t i = 0;
  while (count_in(dtype, data + i * width, 1) == 0) ++i;
  result->first = first + i;
  convert(data + i * width, dtype, &result->first_value, DType::kF64, 1);
}

}  // namespace

FiniteScan scan_finite(const SafetensorsFile& file, const TensorInfo& info, StreamHash* hash) {
  FiniteScan result{.elements = info.numel()};
  const std::optional<DType> dtype = info.dtype();
  const bool floating = dtype && is_floating(*dtype);
  if (!floating && hash == nullptr) return result;
  const int64_t width = floating ? static_cast<int64_t>(size_of(*dtype)) : 1, all = static_cast<int64_t>(info.bytes());
  std::vector<char> data(static_cast<size_t>(std::min(kPieceBytes, all)));
  for (int64_t at = 0; at < all; at += kPieceBytes) {  // the piece is a multiple of every width
    const int64_t bytes = std::min(kPieceBytes, all - at);
    file.read_raw(info, static_cast<uint64_t>(at), data.data(), static_cast<size_t>(bytes));
    if (hash != nullptr) hash->update(data.data(), static_cast<size_t>(bytes));
    if (floating) scan_piece(*dtype, data.data(), at / width, bytes / width, &result);
  }
  return result;
}

FileScan scan_file(const SafetensorsFile& file, const std::function<void(int64_t bytes)>& progress) {
  FileScan result;
  StreamHash hash;
  // Prefix and header come before the first tensor, and the tensors tile the rest in file order.
  const uint64_t header_end =
      file.tensors().empty() ? std::filesystem::file_size(file.path()) : file.tensors().front().begin;
  const TensorInfo header{
      .file_dtype = "U8", .shape = {static_cast<int64_t>(header_end)}, .begin = 0, .end = header_end};
  scan_finite(file, header, &hash);
  for (const TensorInfo& info : file.tensors()) {
    result.tensors.push_back(scan_finite(file, info, &hash));
    if (progress) progress(static_cast<int64_t>(info.bytes()));
  }
  result.hash = hash.digest();
  return result;
}

}  // namespace lightmoe
