#include "tests/support/compression.h"

#include <algorithm>
#include <cmath>

#include "compress/calibrate.h"
#include "compress/exporter.h"
#include "compress/recover.h"
#include "compress/weights.h"
#include "demo/disjoint.h"
#include "loaders/json.h"
#include "loaders/tokenizer.h"
#include "model/verify.h"
#include "tests/support/testing.h"

namespace lightmoe::testing {
namespace {

namespace fs = std::filesystem;

// Questions with answers, as the demo's base model was trained on, loss on the answers; every document is a handful of tokens.
std::vector<Document> demo_documents(size_t first, size_t count) {
  const Tokenizer tokenizer = Tokenizer::load("demo/base");
  const demo::DemoData data = demo::make_demo_data(20260, 1);
  std::vector<TextRecord> records;
  for (size_t i = first; i < first + count; ++i) {
    for (const size_t task : {0u, 1u}) {  // math and code
      const demo::Example& example = data.tasks[task].train[i];
      records.push_back({.parts = {{example.prompt, false}, {example.completion, true}}, .choices = {}});
    }
  }
  return tokenize(records, tokenizer, static_cast<int32_t>(read_config("demo/base").eos_token_ids.at(0)));
}

// All documents as one batch, each attending to itself.
Batch packed(const std::vector<Document>& documents) {
  std::vector<int32_t> ids, labels, positions, begins;
  for (const Document& document : documents) {
    begins.push_back(static_cast<int32_t>(ids.size()));
    for (size_t t = 0; t < document.ids.size(); ++t) {
      const bool counts = t + 1 < document.ids.size() && (document.loss.empty() || document.loss[t + 1] != 0);
      ids.push_back(document.ids[t]);
      labels.push_back(counts ? document.ids[t + 1] : -100);
      positions.push_back(static_cast<int32_t>(t));
    }
  }
  begins.push_back(static_cast<int32_t>(ids.size()));
  return make_packed_batch(ids, labels, positions, begins);
}

}  // namespace

CompressionGround::CompressionGround(fs::path where, std::vector<Document> seen, std::vector<Document> unseen)
    : model(std::move(where)), calibration(std::move(seen)), held_out(std::move(unseen)) {
  const CalibrateOptions options{.tokens = 2048,
                                 .length = 64,
                                 .batch_tokens = 1024,
                                 .sample_tokens = 1024,
                                 .all_outputs = true,
                                 .sample_inputs = true,
                                 .unit_gradients = true};
  statistics = calibrate(*load_model(model, DType::kF32), calibration_set(calibration, options),
                         model_fingerprint(Checkpoint(model)), options);
  save_statistics(statistics, directory_ / "statistics.safetensors");
}

const CompressionGround& CompressionGround::golden() {
  static const CompressionGround ground = [] {
    std::vector<Document> all = documents_from_tokens("tests/golden/e64k8/golden.safetensors", 131);
    return CompressionGround("tests/golden/e64k8", all, {all[0]});
  }();
  return ground;
}

const CompressionGround& CompressionGround::demo() {
  static const CompressionGround ground("demo/base", demo_documents(0, 100), demo_documents(300, 40));
  return ground;
}

CompressionRecord CompressionGround::compress(const std::string& method, double ratio, const fs::path& output,
                                              const std::function<void(MethodOptions&)>& change) const {
  CompressJob job{.model = model, .output = output, .method = method, .force = true};
  job.options.budget = {BudgetKind::kExperts, ratio};
  job.options.bases = 2, job.options.rank = 2;
  if (change) change(job.options);
  if (find_method(method).needs != Needs::kNothing || job.options.refit)
    job.statistics = directory_ / "statistics.safetensors";
  return compress_model(job);
}

double CompressionGround::loss(const Olmoe& m, const RoutingOptions* routing) const {
  const Batch batch = packed(held_out);
  const Tensor logits = m.logits(m.forward(batch, {.routing = routing}), {});
  double sum = 0, count = 0;
  const int64_t vocabulary = logits.dim(1);
  for (int64_t t = 0; t < logits.dim(0); ++t) {
    const int32_t label = batch.labels.data<int32_t>()[t];
    if (label < 0) continue;
    const float* row = logits.data<float>() + t * vocabulary;
    const double top = *std::max_element(row, row + vocabulary);
    double total = 0;
    for (int64_t v = 0; v < vocabulary; ++v) total += std::exp(static_cast<double>(row[v]) - top);
    sum += std::log(total) + top - static_cast<double>(row[label]);
    count += 1;
  }
  return sum / count;
}

double CompressionGround::loss(const fs::path& directory) const { return loss(*load_model(directory, DType::kF32)); }

Tensor CompressionGround::logits(const fs::path& directory) const {
  const auto m = load_model(directory, DType::kF32);
  const Document& document = held_out.front();
  return m->logits(m->forward(make_batch(document.ids, 1, static_cast<int64_t>(document.ids.size())), {}), {});
}

void expect_useful_on_demo(const std::string& method, const ChangeOptions& change) {
  SCOPED_TRACE(method);
  const CompressionGround& ground = CompressionGround::demo();
  const TempDir where;
  const CompressionRecord record = ground.compress(method, .25, where / "out", change);
  static const double original = ground.loss(ground.model);
  const double loss = ground.loss(where / "out"), guess = std::log(1024.0);
  ::testing::Test::RecordProperty("demo_loss", std::to_string(loss));
  fmt::print(
      "             {:<18} demo model, 25 % of the experts removed: loss {:.3f} (original {:.3f}), {} -> {} bytes\n",
      method, loss, original, record.original_bytes, record.stored_bytes);
  EXPECT_LT(loss, original + .5 * (guess - original));
}

void expect_identity_at_zero(const std::string& method) {
  SCOPED_TRACE(method);
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress(method, 0, where / "out");
  EXPECT_EQ(record.stored_parameters, record.original_parameters);
  const Checkpoint before(ground.model), after(where / "out");
  ASSERT_EQ(before.names(), after.names());
  for (const std::string& name : before.names()) {
    EXPECT_TRUE(bits_equal(before.file_of(name).read(name), after.file_of(name).read(name))) << name;
  }
}

void expect_bytes_saved(const std::string& method, double ratio, int64_t slack_bytes, const ChangeOptions& change) {
  SCOPED_TRACE(method);
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress(method, ratio, where / "out", change);
  const int64_t experts = model_size(read_config(ground.model)).all_experts() * 4;
  EXPECT_LE(record.stored_bytes,
            record.original_bytes - static_cast<int64_t>(ratio * static_cast<double>(experts)) + slack_bytes);
  EXPECT_EQ(Checkpoint(where / "out").total_bytes(), record.stored_bytes);
  const int64_t others = memory_use(MemoryCategory::kWeights).live_bytes;
  const auto loaded = load_model(where / "out", DType::kF32);
  EXPECT_EQ(memory_use(MemoryCategory::kWeights).live_bytes - others, record.stored_bytes);
  EXPECT_EQ(loaded->num_parameters(), record.stored_parameters);
  EXPECT_TRUE(verify_model(where / "out").ok());
  // Saved again by the model itself: the same tensors.
  fs::create_directories(where / "saved");
  save_model(*loaded, where / "saved", DType::kF32, int64_t{1} << 40);
  const Checkpoint a(where / "out"), b(where / "saved");
  ASSERT_EQ(a.names(), b.names());
  for (const std::string& name : a.names()) {
    EXPECT_TRUE(bits_equal(a.file_of(name).read(name), b.file_of(name).read(name))) << name;
  }
}

void expect_export_is_the_same(const std::string& method, double ratio, const ChangeOptions& change) {
  SCOPED_TRACE(method);
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  ground.compress(method, ratio, where / "out", change);
  export_to_hugging_face({.model = where / "out", .output = where / "stock"});
  EXPECT_EQ(read_config(where / "stock").lightmoe_json, "");
  EXPECT_TRUE(verify_model(where / "stock").ok());
  EXPECT_TRUE(close(ground.logits(where / "stock"), to_doubles(ground.logits(where / "out")), 2e-5));
}

void expect_recovers(const std::string& method, double ratio, int64_t slack_bytes, const ChangeOptions& change) {
  SCOPED_TRACE(method);
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const CompressionRecord record = ground.compress(method, ratio, where / "out", change);
  if (find_method(method).trainable == Trainable::kAdapters) {
    const auto target = static_cast<double>(lightmoe_trainable(model_size(read_config(ground.model)), 2, 2));
    EXPECT_NEAR(static_cast<double>(record.trainable_parameters), target, .2 * target);  // ranks are whole numbers
  }
  Recovery recovery(where / "out", ground.model, 4, {});
  int64_t trainable = 0;
  for (const ParameterPtr& p : recovery.model().parameters()) trainable += p->trainable ? p->value.numel() : 0;
  EXPECT_EQ(trainable, record.trainable_parameters);
  DataStream data(ground.calibration, {.rows = 1, .length = 40});
  TrainerOptions options;
  options.steps = 4;
  options.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 3e-3, .total_steps = 4};
  options.progress.quiet = true;
  const double before = ground.loss(recovery.model());
  train(recovery.trainable(), data, options, recovery.hooks(DType::kF32));
  EXPECT_LT(ground.loss(recovery.model()), before);
  recovery.finish();
  fs::create_directories(where / "saved");
  recovery.save(where / "saved", DType::kF32, nullptr);
  const int64_t bytes = Checkpoint(where / "saved").total_bytes();
  EXPECT_LE(bytes, record.stored_bytes + slack_bytes);
  const RecoveryEstimate estimate = estimate_recovery(where / "out", {}, DType::kF32, 40, Recompute::kNone);
  EXPECT_EQ(bytes, estimate.stored_bytes);
  EXPECT_NEAR(ground.loss(where / "saved"), ground.loss(recovery.model()), 1e-5);
}

}  // namespace lightmoe::testing
