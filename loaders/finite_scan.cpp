#include "loaders/finite_scan.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <vector>

#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kPieceBytes = 1 << 20;

// An exponent of all ones is a NaN or an infinity.
template <class Bits>
int64_t count_nonfinite(const char* data, int64_t count, Bits exponent) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, data + i * static_cast<int64_t>(sizeof(Bits)), sizeof(Bits));
    found += (bits & exponent) == exponent ? 1 : 0;
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

double value_at(DType dtype, const char* data) {
  double value = 0;
  convert(data, dtype, &value, DType::kF64, 1);
  return value;
}

}  // namespace

FiniteScan scan_finite(const SafetensorsFile& file, const TensorInfo& info) {
  FiniteScan result{.elements = info.numel()};
  const std::optional<DType> dtype = info.dtype();
  if (!dtype || !is_floating(*dtype)) return result;
  const int64_t width = static_cast<int64_t>(size_of(*dtype)), piece = kPieceBytes / width;
  std::mutex mutex;
  parallel_for(0, result.elements, piece, [&](int64_t begin, int64_t end) {
    std::vector<char> data(static_cast<size_t>(std::min(piece, end - begin) * width));
    for (int64_t at = begin; at < end; at += piece) {
      const int64_t n = std::min(piece, end - at);
      file.read_raw(info, static_cast<uint64_t>(at * width), data.data(), static_cast<size_t>(n * width));
      const int64_t found = count_in(*dtype, data.data(), n);
      if (found == 0) continue;
      int64_t first = 0;
      while (count_in(*dtype, data.data() + first * width, 1) == 0) ++first;
      const std::lock_guard<std::mutex> lock(mutex);
      result.nonfinite += found;
      if (result.first >= 0 && result.first < at + first) continue;
      result.first = at + first;
      result.first_value = value_at(*dtype, data.data() + first * width);
    }
  });
  return result;
}

}  // namespace lightmoe
