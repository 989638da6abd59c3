// Densified and factored models are the same function; the densified one is a stock checkpoint.

#include "compress/exporter.h"

#include <gtest/gtest.h>

#include "compress/compressor.h"
#include "compress/recover.h"
#include "model/verify.h"
#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;

const fs::path kModel = "tests/golden/e64k8";

Tensor logits_of(const fs::path& directory) {
  const auto model = load_model(directory, DType::kF32);
  const std::vector<Document> documents = documents_from_tokens(kModel / "golden.safetensors", 131);
  const Batch batch = make_batch(documents[0].ids, 1, static_cast<int64_t>(documents[0].ids.size()));
  return model->logits(model->forward(batch, {}), {});
}

// A compressed model whose adapters do something.
fs::path compressed(const testing::TempDir& where, const std::string& method) {
  CompressJob job{.model = kModel, .output = where / method, .method = method};
  job.options.rank = 2;
  job.options.budget.value = .4;
  job.options.adapter_init = AdapterInit::kSvd;
  compress_model(job);
  return job.output;
}

TEST(Export, DensifiedIsTheSameFunction) {
  const testing::TempDir where;
  for (const char* method : {"lightmoe", "replace-none"}) {
    const fs::path factored = compressed(where, method), dense = where / (std::string(method) + "-hf");
    const ExportReport report = export_to_hugging_face({.model = factored, .output = dense});
    EXPECT_TRUE(testing::close(logits_of(dense), testing::to_doubles(logits_of(factored)), 1e-5)) << method;
    EXPECT_EQ(report.written_bytes, Checkpoint(kModel).total_bytes());
    EXPECT_EQ(Checkpoint(dense).names(), Checkpoint(kModel).names());
    EXPECT_TRUE(load_model(dense, DType::kF32)->blocks[0].moe.is_plain());
    EXPECT_EQ(read_config(dense).lightmoe_json, "");
    EXPECT_TRUE(verify_model(dense).ok());
    // Kept experts and everything outside the experts are copied bit for bit.
    EXPECT_TRUE(testing::bits_equal(Checkpoint(dense).read("model.layers.0.mlp.gate.weight", DType::kF32),
                                    Checkpoint(kModel).read("model.layers.0.mlp.gate.weight", DType::kF32)));
  }
}

TEST(Export, OtherTypesAndShards) {
  const testing::TempDir where;
  const fs::path factored = compressed(where, "lightmoe"), dense = where / "bf16";
  export_to_hugging_face({.model = factored, .output = dense, .dtype = DType::kBF16, .max_shard_bytes = 200000});
  EXPECT_EQ(read_config(dense).torch_dtype, "bfloat16");
  EXPECT_TRUE(fs::exists(dense / "model.safetensors.index.json"));
  EXPECT_EQ(Checkpoint(dense).total_bytes() * 2, Checkpoint(kModel).total_bytes());
}

TEST(Export, AStockModelIsRefused) {
  const testing::TempDir where;
  EXPECT_TRUE(testing::fails_with(ErrorKind::kInput, {"stock model already"},
                                  [&] { export_to_hugging_face({.model = kModel, .output = where / "out"}); }));
  EXPECT_FALSE(fs::exists(where / "out"));
}

}  // namespace
}  // namespace lightmoe
