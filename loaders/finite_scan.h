#pragma once
// NaN and infinity in stored tensors, found without loading them: pieces of 8 MB.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "loaders/hash.h"
#include "loaders/safetensors.h"

namespace lightmoe {

struct FiniteScan {
  int64_t elements = 0;
  int64_t nonfinite = 0;
  int64_t first = -1;  // row-major index of the first one
  double first_value = 0;
};
// F32, BF16, F16, F64; other dtypes hold nothing to find (elements counted, nonfinite 0). The bytes go into `hash` as well, if given.
FiniteScan scan_finite(const SafetensorsFile& file, const TensorInfo& info, StreamHash* hash = nullptr);

// Every tensor in file order, and the hash of the whole file, in one pass.
struct FileScan {
  std::vector<FiniteScan> tensors;
  std::string hash;
};
FileScan scan_file(const SafetensorsFile& file, const std::function<void(int64_t bytes)>& progress = {});

}  // namespace lightmoe
