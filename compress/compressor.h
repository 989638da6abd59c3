#pragma once
// compress: a stock checkpoint in, a compressed one out, tensor by tensor. Nothing larger than a few matrices is ever in memory,
// whatever the model's size (the original stays on disk; recovery reads its experts again from there).
//   kept experts          copied as they are
//   bases                 W = sum_i w_i W_i in f64, rounded once to the type written
//   adapters              of replaced slots only (recovery adds the others, which start at zero effect)
//   everything else       copied
// NaN and infinity are refused (Error(kNumeric) naming tensor, count, first index) unless allowed.

#include <filesystem>
#include <functional>
#include <optional>
#include <string>

#include "compress/record.h"

namespace lightmoe {

struct CompressJob {
  std::filesystem::path model, output;
  std::string method = "lightmoe";
  MethodOptions options;
  std::filesystem::path statistics;  // empty: uniform, for methods that take a budget
  std::optional<DType> dtype;        // of the output; absent: each tensor keeps its own
  int64_t max_shard_bytes = int64_t{5} << 30;
  bool force = false, allow_nonfinite = false;
  std::function<void(const std::string&)> say;  // progress and warnings, one line each; may be empty
};

// What will be written, before anything is: exact parameters and bytes, and the most memory the tensors of this program will take.
struct CompressEstimate {
  CompressionRecord record;
  int64_t peak_bytes = 0;
};
CompressEstimate estimate_compression(const CompressJob& job);

// Does it. The estimate's figures hold exactly for what is written.
CompressionRecord compress_model(const CompressJob& job);

// "6.92 B parameters, 12.89 GiB -> 3.47 B, 6.47 GiB (49.8 % less); ..." and one line per layer when it is asked for.
std::string describe(const CompressEstimate& estimate);

}  // namespace lightmoe
