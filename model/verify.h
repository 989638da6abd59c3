#pragma once
// Is a model directory whole and what its config says? Marker and hashes (when there), every rule of the files, names and shapes
// exactly as the config (stock per-expert or fused, or compressed), every value finite. Reads everything once, loads nothing.

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace lightmoe {

struct VerifyOptions {
  bool hashes = true;  // compare with the marker's XXH3-128, where there is a marker
  bool values = true;  // look at every value
  std::function<void(int64_t done_bytes, int64_t all_bytes)> progress;
};
struct VerifyReport {
  std::vector<std::string> problems;  // in the order found, each naming file, tensor, expected and actual
  std::vector<std::string> notes;     // worth saying, not wrong
  std::string layout;                 // "per-expert", "fused", "compressed"
  // Coverage account: of the tensors the config asks for, how many are there with the right shape and were looked at.
  int64_t expected = 0, matched = 0, in_files = 0, unexpected = 0, scanned = 0, values = 0, nonfinite = 0, bytes = 0;
  bool ok() const { return problems.empty(); }
};
// Throws only when the directory cannot be read at all; what is wrong in it is in the report.
VerifyReport verify_model(const std::filesystem::path& directory, const VerifyOptions& options = {});

}  // namespace lightmoe
