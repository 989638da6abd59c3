#pragma once
// Ground for tests of compression methods: a model, text of its domain, statistics with every optional part, made once per process.

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "compress/compressor.h"
#include "loaders/dataset.h"
#include "model/olmoe.h"
#include "tests/support/files.h"

namespace lightmoe::testing {

class CompressionGround {
 public:
  // tests/golden/e64k8: 64 experts of width 16, top 8, two layers, random weights, f32.
  static const CompressionGround& golden();
  // demo/base: 32 experts of width 64, top 4, four layers, trained, bf16; text: its own pretraining tasks.
  static const CompressionGround& demo();

  std::filesystem::path model;
  std::vector<Document> calibration, held_out;
  Statistics statistics;

  // `ratio` of the expert weights goes; statistics are handed over unless the method needs none.
  CompressionRecord compress(const std::string& method, double ratio, const std::filesystem::path& output,
                             const std::function<void(MethodOptions&)>& change = {}) const;
  double loss(const std::filesystem::path& directory) const;  // mean cross-entropy on the held-out text
  double loss(const Olmoe& model, const RoutingOptions* routing = nullptr) const;
  Tensor logits(const std::filesystem::path& directory) const;  // of the first held-out document

 private:
  CompressionGround(std::filesystem::path model, std::vector<Document> calibration, std::vector<Document> held_out);
  TempDir directory_;
};

using ChangeOptions = std::function<void(MethodOptions&)>;

// Mean cross-entropy of the demo model, compressed by the method at 25 % of its experts: printed, and nearer to the original's than to
// a guess's (ln V).
void expect_useful_on_demo(const std::string& method, const ChangeOptions& change = {});
// At ratio 0 the tensors are those of the original, under their own names.
void expect_identity_at_zero(const std::string& method);
// At this ratio of the golden model's experts: file, live and recorded bytes agree and fall by at least that share of the experts
// (less what masks, constants and the like take, given by `slack_bytes`).
void expect_bytes_saved(const std::string& method, double ratio, int64_t slack_bytes = 0,
                        const ChangeOptions& change = {});
// Exported to a stock directory, the function is the same.
void expect_export_is_the_same(const std::string& method, double ratio, const ChangeOptions& change = {});
// A few steps on the golden model: what trains is what the record says (for adapters: LightMoE's number), the loss falls, and what is
// saved is the same function at no more than the compressed size plus the slack.
void expect_recovers(const std::string& method, double ratio, int64_t slack_bytes, const ChangeOptions& change = {});

}  // namespace lightmoe::testing
