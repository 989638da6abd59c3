#pragma once
// NaN and infinity in a stored tensor, found without loading it: pieces of about 1 MB per thread.

#include <cstdint>

#include "loaders/safetensors.h"

namespace lightmoe {

struct FiniteScan {
  int64_t elements = 0;
  int64_t nonfinite = 0;
  int64_t first = -1;  // row-major index of the first one
  double first_value = 0;
};
// F32, BF16, F16, F64; other dtypes hold nothing to find (elements counted, nonfinite 0).
FiniteScan scan_finite(const SafetensorsFile& file, const TensorInfo& info);

}  // namespace lightmoe
