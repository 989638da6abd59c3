// compress on the golden checkpoints: what is written equals what the plan says, tensor by tensor.

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>

#include "compress/compressor.h"
#include "compress/weights.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/olmoe.h"
#include "runtime/philox.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

namespace fs = std::filesystem;

const fs::path kGolden = "tests/golden";

// A directory of its own per test, emptied first.
fs::path scratch() {
  const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
  const fs::path path = fs::path(::testing::TempDir()) / (std::string("lightmoe_compress_") + info->name());
  fs::remove_all(path);
  fs::create_directories(path);
  return path;
}

// Statistics of e64k8 with random masses, bound to the model.
fs::path random_statistics(const fs::path& model, const fs::path& where) {
  const OlmoeConfig config = read_config(model);
  Statistics s = empty_statistics(config.num_layers, config.num_experts, config.hidden_size, false);
  Philox random(4);
  s.model = model_fingerprint(Checkpoint(model));
  s.tokens = 500;
  for (LayerStatistics& layer : s.layers) {
    for (double& mass : layer.gate_mass) mass = random.uniform();
    for (double& count : layer.count) count = 1 + static_cast<double>(random.below(50));
    layer.logit_norm = 1 + random.uniform();
    for (int64_t i = 0; i < 20 * config.num_experts; ++i)
      layer.sample_logits.push_back(static_cast<float>(random.normal()));
  }
  for (int t = 0; t < 20; ++t) s.sample_token.push_back(t), s.sample_sequence.push_back(t / 5);
  save_statistics(s, where);
  return where;
}

CompressJob small_job(const fs::path& model, const fs::path& where, double ratio) {
  CompressJob job{.model = model, .output = where / "out"};
  job.options.budget.value = ratio;
  job.options.rank = 2;
  job.statistics = random_statistics(model, where / "statistics.safetensors");
  return job;
}

void expect_same_tensors(const fs::path& a, const fs::path& b) {
  const Checkpoint x(a), y(b);
  ASSERT_EQ(x.names(), y.names());
  for (const std::string& name : x.names()) {
    EXPECT_TRUE(testing::bits_equal(x.file_of(name).read(name), y.file_of(name).read(name))) << name;
  }
}

TEST(Compress, RatioZeroIsTheIdentity) {
  const fs::path where = scratch();
  for (const char* method : {"lightmoe", "replace-none", "lora", "original"}) {
    CompressJob job = small_job(kGolden / "e64k8-bf16", where, 0);
    job.method = method;
    job.force = true;
    const CompressionRecord record = compress_model(job);
    EXPECT_EQ(record.stored_parameters, record.original_parameters);
    expect_same_tensors(job.model, job.output);
    EXPECT_EQ(read_config(job.output).lightmoe_json, "");
    EXPECT_EQ(record.coverage.copied, record.coverage.seen);
    EXPECT_TRUE(is_complete(job.output, true));
  }
}

// One bank matrix of the output against the mean worked out here from the loaded original.
void check_bank(const CompressionRecord& record, const Olmoe& original, const Checkpoint& out) {
  for (size_t l = 0; l < record.plan.layers.size(); ++l) {
    const LayerPlan& layer = record.plan.layers[l];
    for (size_t j = 0; j < layer.bank.size(); ++j) {
      const std::string name = bank_tensor_name(static_cast<int64_t>(l), static_cast<int64_t>(j), ExpertMatrix::kDown);
      const Tensor made = out.read(name, DType::kF32);
      std::vector<double> expected(static_cast<size_t>(made.numel()), 0.0);
      for (size_t i = 0; i < layer.bank[j].experts.size(); ++i) {
        const auto e = static_cast<size_t>(layer.bank[j].experts[i]);
        const std::vector<double> w = testing::to_doubles(original.blocks[l].moe.experts[e].down->value);
        for (size_t k = 0; k < w.size(); ++k) expected[k] += layer.bank[j].weights[i] * w[k];
      }
      EXPECT_TRUE(testing::close(made, expected, layer.bank[j].is_copy() ? 0 : 0x1p-23)) << name;
    }
  }
}

TEST(Compress, WritesWhatThePlanSays) {
  const fs::path where = scratch();
  CompressJob job = small_job(kGolden / "e64k8", where, .5);
  const CompressEstimate estimate = estimate_compression(job);
  EXPECT_FALSE(fs::exists(job.output));
  const CompressionRecord record = compress_model(job);
  EXPECT_EQ(record.stored_parameters, estimate.record.stored_parameters);
  EXPECT_LE(record.stored_parameters, record.original_parameters / 2);
  const Checkpoint out(job.output);
  EXPECT_EQ(out.total_bytes(), estimate.record.stored_bytes);
  EXPECT_EQ(out.total_bytes(), 4 * record.stored_parameters);

  const auto original = load_model(job.model, DType::kF32), model = load_model(job.output, DType::kF32);
  EXPECT_EQ(model->num_parameters(), record.stored_parameters);
  EXPECT_EQ(model->stored_bytes(), record.stored_bytes);
  check_bank(record, *original, out);
  for (size_t l = 0; l < record.plan.layers.size(); ++l) {
    const LayerPlan& layer = record.plan.layers[l];
    EXPECT_EQ(layer.bases.size(), 3u);
    EXPECT_EQ(layer.bank.size(), 64 - layer.replaced.size() + 3);
    EXPECT_EQ(layer.adapter_slot.size(), layer.replaced.size());
    for (const Adapter& adapter : model->blocks[l].moe.adapters) {
      for (const double b : testing::to_doubles(adapter.b_down->value)) EXPECT_EQ(b, 0);
    }
    EXPECT_TRUE(testing::bits_equal(model->blocks[l].moe.router->value, original->blocks[l].moe.router->value));
  }
  // A of the first adapters: standard deviation 1 / sqrt(3 in), over 2 * 2 * 64 values.
  double squares = 0;
  const std::vector<double> a = testing::to_doubles(model->blocks[0].moe.adapters[0].a_gate_up->value);
  for (const double v : a) squares += v * v;
  EXPECT_NEAR(std::sqrt(squares / static_cast<double>(a.size())), 1 / std::sqrt(3. * 64), .2 / std::sqrt(3. * 64));
}

TEST(Compress, RecordSurvivesTheRoundTrip) {
  const fs::path where = scratch();
  CompressJob job = small_job(kGolden / "e64k8", where, .3);
  job.options.seed = 77;
  const CompressionRecord written = compress_model(job), read = read_record(job.output);
  EXPECT_EQ(record_to_json(read, nullptr).substr(0, 400), record_to_json(written, nullptr).substr(0, 400));
  EXPECT_EQ(to_json(read.plan).dump(), to_json(written.plan).dump());
  EXPECT_EQ(read.options.seed, 77u);
  EXPECT_EQ(read.rank, 2);
  EXPECT_EQ(read.statistics, hash_file(job.statistics));
}

TEST(Compress, LayoutOfTheInputDoesNotMatter) {
  const fs::path where = scratch();
  CompressJob job = small_job(kGolden / "e64k8", where, .5);
  compress_model(job);
  for (const char* layout : {"e64k8-sharded", "e64k8-fused"}) {
    CompressJob other = small_job(kGolden / layout, where, .5);
    other.output = where / layout;
    other.max_shard_bytes = 100000;
    const CompressionRecord record = compress_model(other);
    expect_same_tensors(job.output, other.output);
    EXPECT_EQ(record.coverage.seen, static_cast<int64_t>(Checkpoint(other.model).names().size()));
    EXPECT_TRUE(fs::exists(other.output / "model.safetensors.index.json"));
  }
  EXPECT_EQ(model_fingerprint(Checkpoint(kGolden / "e64k8")), model_fingerprint(Checkpoint(kGolden / "e64k8-sharded")));
  EXPECT_NE(model_fingerprint(Checkpoint(kGolden / "e64k8")), model_fingerprint(Checkpoint(kGolden / "e64k8-bf16")));
}

TEST(Compress, SavingTheLoadedModelGivesTheSameTensors) {
  const fs::path where = scratch();
  for (const char* method : {"lightmoe", "replace-one", "replace-none"}) {
    CompressJob job = small_job(kGolden / "e64k8", where, .4);
    job.method = method;
    job.output = where / method;
    compress_model(job);
    fs::create_directories(where / "saved");
    save_model(*load_model(job.output, DType::kF32), where / "saved", DType::kF32, int64_t{1} << 40);
    expect_same_tensors(job.output, where / "saved");
    fs::remove_all(where / "saved");
  }
}

TEST(Compress, SvdAdaptersAreNearerToTheOriginal) {
  const fs::path where = scratch();
  CompressJob job = small_job(kGolden / "e64k8", where, .4);
  job.options.adapter_init = AdapterInit::kSvd;
  const CompressionRecord record = compress_model(job);
  const auto original = load_model(job.model, DType::kF32), model = load_model(job.output, DType::kF32);
  const LayerPlan& layer = record.plan.layers[1];
  const int32_t slot = layer.adapter_slot[0];
  const MoeLayer& moe = model->blocks[1].moe;
  const std::vector<double> w =
      testing::to_doubles(original->blocks[1].moe.experts[static_cast<size_t>(slot)].down->value);
  const std::vector<double> base =
      testing::to_doubles(moe.experts[static_cast<size_t>(moe.slots[static_cast<size_t>(slot)].expert)].down->value);
  const std::vector<double> a = testing::to_doubles(moe.adapters[0].a_down->value),
                            b = testing::to_doubles(moe.adapters[0].b_down->value);
  const size_t rows = 64, columns = 16, rank = 2;
  double without = 0, with = 0;
  for (size_t i = 0; i < rows; ++i) {
    for (size_t j = 0; j < columns; ++j) {
      double delta = 0;
      for (size_t r = 0; r < rank; ++r) delta += b[i * rank + r] * a[r * columns + j];
      const double residual = w[i * columns + j] - base[i * columns + j];
      without += residual * residual;
      with += (residual - delta) * (residual - delta);
    }
  }
  EXPECT_LT(with, without * .85);  // 2 of 16 directions of a random matrix hold clearly more than 2/16
}

TEST(Compress, RefusesBeforeAnythingIsWritten) {
  const fs::path where = scratch();
  const auto refused = [&](CompressJob job, ErrorKind kind, const char* message) {
    try {
      compress_model(job);
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), kind) << error.what();
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
    EXPECT_FALSE(fs::exists(where / "out"));
    for (const auto& entry : fs::directory_iterator(where))
      EXPECT_EQ(entry.path().filename().string()[0] == '.', false) << entry.path();
  };
  refused(small_job(kGolden / "e64k8", where, .99), ErrorKind::kUsage, "is impossible");
  CompressJob job = small_job(kGolden / "e64k8", where, .5);
  job.method = "ligthmoe";
  refused(job, ErrorKind::kUsage, "did you mean lightmoe?");
  job = small_job(kGolden / "e64k8-bf16", where, .5);
  job.model = kGolden / "e64k8";
  refused(job, ErrorKind::kInput, "made on another model");
  job = small_job(kGolden / "e64k8", where, .5);
  job.statistics = kGolden / "e64k8" / "golden.safetensors";
  refused(job, ErrorKind::kInput, "not a statistics file");
}

TEST(Compress, ACompressedModelIsRefused) {
  const fs::path where = scratch();
  CompressJob job = small_job(kGolden / "e64k8", where, .5);
  compress_model(job);
  job.model = job.output;
  job.output = where / "again";
  EXPECT_THROW(compress_model(job), Error);
  EXPECT_FALSE(fs::exists(job.output));
}

// A copy of e64k8 with NaNs in one expert.
fs::path poisoned_model(const fs::path& where) {
  const fs::path model = where / "poisoned";
  fs::create_directories(model);
  fs::copy_file(kGolden / "e64k8" / "config.json", model / "config.json");
  const Checkpoint source(kGolden / "e64k8");
  std::vector<std::pair<std::string, Tensor>> tensors;
  for (const std::string& name : source.names()) {
    Tensor t = source.read(name, DType::kF32);
    if (name == "model.layers.1.mlp.experts.5.up_proj.weight")
      t.data<float>()[7] = NAN, t.data<float>()[900] = INFINITY;
    tensors.emplace_back(name, t);
  }
  write_safetensors(model / "model.safetensors", tensors);
  return model;
}

TEST(Compress, NonFiniteWeightsAreRefusedUnlessAllowed) {
  const fs::path where = scratch();
  for (const double ratio : {0.0, 0.6}) {  // copied, and (most likely) mixed
    CompressJob job = small_job(poisoned_model(where), where, ratio);
    try {
      compress_model(job);
      ADD_FAILURE() << "NaN was copied";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kNumeric);
      EXPECT_EQ(error.what(), (job.model / "model.safetensors").string() +
                                  ": tensor \"model.layers.1.mlp.experts.5.up_proj.weight\": 2 of 1024 values are NaN "
                                  "or infinite, the first at "
                                  "index 7; --allow-nonfinite copies them as they are");
    }
    EXPECT_FALSE(fs::exists(job.output));
    job.allow_nonfinite = true;
    EXPECT_EQ(compress_model(job).coverage.non_finite, 2);
    fs::remove_all(job.output);
    fs::remove_all(where / "poisoned");
  }
}

TEST(Compress, UnknownTensorsAreNamedNotCopied) {
  const fs::path where = scratch();
  const fs::path model = where / "model";
  fs::create_directories(model);
  fs::copy_file(kGolden / "plain" / "config.json", model / "config.json");
  std::ofstream(model / "tokenizer_config.json") << "{}";
  const Checkpoint source(kGolden / "plain");
  std::vector<std::pair<std::string, Tensor>> tensors = {{"model.extra", Tensor::zeros({3}, DType::kF32)}};
  for (const std::string& name : source.names()) tensors.emplace_back(name, source.read(name, DType::kF32));
  write_safetensors(model / "model.safetensors", tensors);
  std::string said;
  CompressJob job = small_job(model, where, 0);
  job.say = [&](const std::string& line) { said += line; };
  const CompressionRecord record = compress_model(job);
  EXPECT_EQ(record.coverage.skipped, (std::vector<std::string>{"model.extra"}));
  EXPECT_NE(said.find("\"model.extra\""), std::string::npos);
  EXPECT_EQ(read_file(job.output / "tokenizer_config.json", 10), "{}");
}

}  // namespace
}  // namespace lightmoe
