// Extensions of MoE blocks: what each computes by its plain definition, nothing at the start, gradients, files, what is refused.

#include "model/moe_extension.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "autograd/gradcheck.h"
#include "compress/exporter.h"
#include "compress/recover.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/summary.h"
#include "model/verify.h"
#include "model/weights.h"
#include "tests/support/compression.h"
#include "tests/support/extensions.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using namespace testing::extensions;
namespace fs = std::filesystem;
using testing::close;
using testing::fails_with;
using testing::random_tensor;
using testing::TempDir;
using testing::to_doubles;

// With small settings that do not divide evenly, where a kind has such.
const std::vector<std::string> kBeside = {"pesc:experts=3,top_k=2,rank=2", "mor1e:experts=5,clusters=3",
                                          "smore:residuals=3,fanout=2,rank=2,gate=4", "mode:width=7"};
const std::vector<std::string> kInstead = {"compressed-experts:auxiliary=1", "dsmoe:blocks=5", "moefication:blocks=5"};

TEST(Extensions, BesideTheExpertsStartAsNothing) {
  const Batch batch = some_batch();
  const Tensor plain = random_model(tiny_config(), DType::kF64, 3)->forward(batch, {});
  for (const std::string& text : kBeside) {
    EXPECT_TRUE(close(extended(text, DType::kF64, true)->forward(batch, {}), to_doubles(plain), 0)) << text;
    EXPECT_FALSE(close(extended(text, DType::kF64)->forward(batch, {}), to_doubles(plain), 1e-3)) << text;
  }
}

// --- plain definitions ---------------------------------------------------------------------------------------

double gelu(double v) { return .5 * v * std::erfc(-v / std::sqrt(2.0)); }
Vector pesc(const Tensors& t, const Vector& x) {  // 3 adapters of rank 2, of which 2
  const Vector w = softmax_of_largest(times(t.at("gate"), x), 2);
  Vector y(kHidden, 0.0);
  for (int64_t i = 0; i < 3; ++i) {
    const Vector hidden = mapped(times(t.at("down"), x, 2 * i, 2), gelu);
    for (int64_t d = 0; d < kHidden; ++d) {
      for (int64_t j = 0; j < 2; ++j)
        y[static_cast<size_t>(d)] +=
            w[static_cast<size_t>(i)] * t.at("up").data<double>()[d * 6 + 2 * i + j] * hidden[static_cast<size_t>(j)];
    }
  }
  return y;
}

Vector mor1e(const Tensors& t, const Vector& x) {  // 5 of rank 1, 3 clusters
  Vector likeness = times(t.at("clusters"), x);
  for (double& v : likeness) v /= std::sqrt(static_cast<double>(kHidden));
  Vector logits = times(t.at("gate"), x);
  const Vector intuition = times(t.at("intuition"), softmax_of_largest(likeness, 3));
  for (size_t e = 0; e < logits.size(); ++e) logits[e] += intuition[e];
  const Vector g = softmax_of_largest(logits, 5), a = times(t.at("a"), x);
  Vector y(kHidden, 0.0);
  for (int64_t d = 0; d < kHidden; ++d) {
    for (int64_t e = 0; e < 5; ++e)
      y[static_cast<size_t>(d)] +=
          g[static_cast<size_t>(e)] * t.at("b").data<double>()[d * 5 + e] * a[static_cast<size_t>(e)];
  }
  return y;
}

Vector smore(const Tensors& t, const Vector& x) {  // 3 residuals of rank 2 a level, 2 picked, gates of 4
  const Vector low = times(t.at("project"), x);
  const Vector parents = softmax_of_largest(times(t.at("parent_keys"), low), 2);
  Vector h2(12, 0.0);
  for (int64_t i = 0; i < 3; ++i) {
    if (parents[static_cast<size_t>(i)] == 0) continue;  // not picked: its branch is not there at all
    const double* key = t.at("parent_keys").data<double>() + 4 * i;
    Vector logits = times(t.at("child_keys_x"), low);
    const Vector of_parent = times(t.at("child_keys_parent"), Vector(key, key + 4));
    for (size_t j = 0; j < 3; ++j) logits[j] += of_parent[j];
    const Vector children = softmax_of_largest(logits, 2);
    Vector h1(6, 0.0);
    for (int64_t j = 0; j < 3; ++j) {
      const Vector leaf = mapped(times(t.at("b0"), times(t.at("a0"), x, 2 * j, 2), 6 * j, 6), std::tanh);
      for (size_t d = 0; d < 6; ++d) h1[d] += children[static_cast<size_t>(j)] * leaf[d];
    }
    Vector branch = times(t.at("b1"), times(t.at("a1"), x, 2 * i, 2), 12 * i, 12);
    const Vector lifted = times(t.at("lift"), h1);
    for (size_t d = 0; d < 12; ++d) h2[d] += parents[static_cast<size_t>(i)] * std::tanh(branch[d] + lifted[d]);
  }
  return times(t.at("final"), h2);
}

Vector mode(const Tensors& t, const Vector& x) {  // width 7
  const Vector h = times(t.at("gate_up"), x);
  Vector a(7);
  for (size_t j = 0; j < 7; ++j) a[j] = h[j] / (1 + std::exp(-h[j])) * h[7 + j];
  Vector y = times(t.at("down"), a);
  for (double& v : y) v *= t.at("alpha").data<double>()[0];
  return y;
}

TEST(Extensions, BesideTheExpertsAreTheirDefinitions) {
  Vector (*definitions[])(const Tensors&, const Vector&) = {&pesc, &mor1e, &smore, &mode};
  for (size_t i = 0; i < kBeside.size(); ++i) {
    const BlockCase c(kBeside[i]);
    const Tensors t = tensors_of(*c.layer().extension);
    Vector expected = to_doubles(c.experts());
    for (int64_t token = 0; token < kTokens; ++token) {
      const double* x = c.x.value.data<double>() + token * kHidden;
      const Vector side = definitions[i](t, Vector(x, x + kHidden));
      for (size_t d = 0; d < side.size(); ++d) expected[static_cast<size_t>(token * kHidden) + d] += side[d];
    }
    Tape tape(false);
    EXPECT_TRUE(close(c.run(tape).y.value, expected, 1e-13)) << kBeside[i];  // a few hundred products in double
  }
}

TEST(Extensions, Gradients) {
  std::vector<std::string> smooth = kBeside;
  smooth.push_back("compressed-experts:auxiliary=1"), smooth.push_back("compressed-experts:auxiliary=2");
  for (const std::string& text : smooth) {
    const BlockCase c(text);
    const Tensor weights = random_tensor({kTokens, kHidden}, DType::kF64, 23);
    const GradCheckReport report = check_gradients([&](Tape& tape) { return dot_loss(tape, c.run(tape).y, weights); },
                                                   {c.x, c.gates}, c.parameters());
    EXPECT_LT(report.worst, 1e-6) << text << " " << report.where;
    EXPECT_GT(report.checked, 300) << text;
  }
}

// --- files ------------------------------------------------------------------------------------------------------

TEST(ExtensionFiles, ComeBackBitForBit) {
  std::vector<std::string> all = kBeside;
  all.insert(all.end(), kInstead.begin(), kInstead.end());
  for (const std::string& text : all) {
    const TempDir where, other;
    const auto model = extended(text, DType::kF32);
    save_model(*model, where.path(), DType::kF32, int64_t{1} << 30);
    const auto again = load_model(where.path(), DType::kF32);
    EXPECT_EQ(again->blocks[1].moe.extension->shape().text(), parse_extension(text).text());
    EXPECT_TRUE(testing::bits_equal(model->forward(some_batch(), {}), again->forward(some_batch(), {}))) << text;
    EXPECT_TRUE(verify_model(where.path()).ok()) << text;
    const ModelSummary summary = summarize_model(where.path());
    EXPECT_EQ(summary.layers[0].extension, parse_extension(text).text());
    const int64_t counted = summary.kinds[static_cast<size_t>(ParameterKind::kExtension)].parameters;
    EXPECT_EQ(counted,
              2 * extension_parameters(parse_extension(text), {.hidden = kHidden, .width = kWidth, .slots = kSlots}));
    EXPECT_EQ(model->num_parameters(), summary.total.parameters);
    const auto exporting = [&] { export_to_hugging_face({.model = where.path(), .output = other / "stock"}); };
    if (!find_extension(text.substr(0, text.find(':'))).may_be_left) {
      EXPECT_TRUE(
          fails_with(ErrorKind::kInput, {text.substr(0, text.find(':')), "stock model has no place"}, exporting));
      continue;
    }
    exporting();
    EXPECT_TRUE(testing::bits_equal(load_model(other / "stock", DType::kF32)->forward(some_batch(), {}),
                                    model->forward(some_batch(), {})));
  }
}

TEST(ExtensionFiles, BadOnesAreNamed) {
  const TempDir where;
  save_model(*extended("pesc:experts=3,top_k=2,rank=2", DType::kF32), where.path(), DType::kF32, int64_t{1} << 30);
  const std::string config = testing::get_file(where / "config.json");
  const Json parsed = parse_json(config, "json");
  const auto with = [&](const char* key, const Json& value, const std::vector<std::string>& pieces) {
    Json changed = parsed;
    changed["lightmoe"]["layers"][0]["extension"][key] = value;
    testing::put_file(where / "config.json", changed.dump());
    return fails_with(ErrorKind::kInput, pieces, [&] { load_model(where.path(), DType::kF32); });
  };
  EXPECT_TRUE(with("kind", "lora", {"lightmoe.layers[0]", "\"lora\"", "pesc"}));
  EXPECT_TRUE(with("kind", 3, {"extension has no kind"}));
  EXPECT_TRUE(with("rank", "two", {"rank is missing or no integer"}));
  EXPECT_TRUE(with("rank", 0, {"rank is 0", "1 to"}));
  EXPECT_TRUE(with("rank", uint64_t{1} << 63, {"rank is"}));
  EXPECT_TRUE(with("top_k", 4, {"top_k is more than experts"}));
  EXPECT_TRUE(with("rank", 3, {"pesc.down", "[6, 12], expected [9, 12]"}));
}

TEST(Extensions, BadSettingsAreOneLine) {
  const auto usage = [](const std::string& text, const std::vector<std::string>& pieces) {
    return fails_with(ErrorKind::kUsage, pieces, [&] {
      const auto model = random_model(tiny_config(), DType::kF32, 3);
      extend_model(*model, parse_extension(text), 1);
    });
  };
  EXPECT_TRUE(usage("pecs", {"\"pecs\"", "did you mean pesc"}));
  EXPECT_TRUE(usage("pesc:rank", {"\"rank\" is not NAME=NUMBER"}));
  EXPECT_TRUE(usage("pesc:width=3", {"no setting \"width\"", "experts=8"}));
  EXPECT_TRUE(usage("pesc:rank=2x", {"rank is \"2x\""}));
  EXPECT_TRUE(usage("pesc:rank=0", {"rank is 0"}));
  EXPECT_TRUE(usage("dsmoe:blocks=3", {"do not divide"}));
  EXPECT_TRUE(usage("compressed-experts:auxiliary=3", {"leaves no main choice"}));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"layer 0 has the extension mode:width=7 already"},
                         [] { extend_model(*extended("mode:width=7", DType::kF32), parse_extension("pesc"), 1); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"layer 1 has slots without an expert of their own"}, [] {
    const auto model = random_model(tiny_config(), DType::kF32, 3);
    model->blocks[1].moe.slots[2].expert = 1;
    extend_model(*model, parse_extension("dsmoe:blocks=2"), 1);
  }));
}

// --- training ---------------------------------------------------------------------------------------------------

TEST(Extensions, RecoveryTrainsThemAlone) {
  const testing::CompressionGround& ground = testing::CompressionGround::golden();
  for (const char* text : {"pesc", "mor1e", "smore", "mode"}) {
    SCOPED_TRACE(text);
    const TempDir where;
    ground.compress("reap", .4, where / "out");
    RecoveryOptions options;
    options.extend = parse_extension(text);
    Recovery recovery(where / "out", ground.model, 8, options);
    std::map<std::string, Tensor> before;
    int64_t trained = 0;
    for (const ParameterPtr& p : recovery.model().parameters()) {
      before[p->name] = p->value.clone();
      trained += p->trainable ? p->value.numel() : 0;
    }
    const double loss = ground.loss(recovery.model());
    EXPECT_NEAR(loss, ground.loss(where / "out"), 1e-6);  // nothing at the start
    DataStream data(ground.calibration, {.rows = 2, .length = 40});
    TrainerOptions training;
    training.steps = 8;
    training.schedule = {.kind = ScheduleKind::kConstant, .peak_lr = 1e-2, .total_steps = 8};
    training.progress.quiet = true;
    train(recovery.trainable(), data, training, recovery.hooks(DType::kF32));
    recovery.finish();
    EXPECT_LT(ground.loss(recovery.model()), loss);
    for (const ParameterPtr& p : recovery.model().parameters()) {
      const bool own = p->name.find(std::string(".mlp.") + text + ".") != std::string::npos;
      EXPECT_EQ(own, p->trainable) << p->name;
      EXPECT_EQ(own, !testing::bits_equal(p->value, before.at(p->name))) << p->name;
    }
    fs::create_directories(where / "saved");
    recovery.save(where / "saved", DType::kF32, nullptr);
    EXPECT_NEAR(ground.loss(where / "saved"), ground.loss(recovery.model()), 1e-6);
    const CompressionRecord record = read_record(where / "saved");
    EXPECT_EQ(record.trainable_parameters, trained);
    EXPECT_EQ(Checkpoint(where / "saved").total_bytes(), record.stored_bytes);
    EXPECT_EQ(record.stored_parameters,
              estimate_recovery(where / "out", options, DType::kF32, 40, Recompute::kNone).stored_parameters);
  }
}

TEST(Extensions, FromTheProgram) {
  const testing::CompressionGround& ground = testing::CompressionGround::golden();
  const TempDir where;
  const std::string tokens = ground.model / "golden.safetensors";
  save_statistics(ground.statistics, where / "s.safetensors");
  testing::ProgramResult run =
      testing::run_lightmoe({"train", ground.model, "--tokens", tokens, "--steps", "2", "--length", "40",
                             "--batch-rows", "1", "--extend", "mor1e:experts=4", "--extend-clusters",
                             where / "s.safetensors", "--train-only", "*.mlp.mor1e.*", "-o", where / "out"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const Checkpoint before(ground.model), after(where / "out");
  const Tensor router = before.file_of("model.layers.0.mlp.gate.weight").read("model.layers.0.mlp.gate.weight");
  EXPECT_TRUE(testing::bits_equal(
      router, after.file_of("model.layers.0.mlp.gate.weight").read("model.layers.0.mlp.gate.weight")));
  EXPECT_TRUE(after.contains("model.layers.1.mlp.mor1e.clusters"));
  run = testing::run_lightmoe({"inspect", where / "out"});
  EXPECT_NE(run.out.find("extension from layer 0 on: mor1e:clusters=8,experts=4"), std::string::npos) << run.out;
  run = testing::run_lightmoe(
      {"train", ground.model, "--tokens", tokens, "--steps", "2", "--extend", "lora", "-o", where / "no"});
  EXPECT_EQ(run.exit_code, 2);
  EXPECT_NE(run.err.find("extension \"lora\""), std::string::npos) << run.err;
}

}  // namespace
}  // namespace lightmoe
