// BuddyMoE at run time: who answers for experts that are not in memory, by hand, as invariants of a whole model, and from the program.

#include "model/buddies.h"

#include <gtest/gtest.h>

#include <set>

#include "compress/buddy_lists.h"
#include "loaders/json.h"
#include "tests/support/compression.h"
#include "tests/support/moe_layers.h"
#include "tests/support/program.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::CompressionGround;
using testing::fails_with;
using testing::TempDir;

// Six experts, of which 0, 1, 2 are resident.
BuddyOptions six_experts() {
  return {.layers = {{.resident = {1, 1, 1, 0, 0, 0}, .buddies = {{}, {}, {}, {4, 0, 1}, {0, 1}, {1, 2}}}}};
}

struct Ran {
  std::vector<int32_t> slots;
  ResidencyCounts counts;
};
Ran run_one(const BuddyOptions& options, const std::vector<int32_t>& slots, const std::vector<double>& gates) {
  Ran ran;
  const auto k = static_cast<int64_t>(slots.size());
  const Tensor before = Tensor::from(slots, {1, k});
  const Tensor after = substitute_missing(options, 0, before, Tensor::from(gates, {1, k}), ran.counts);
  EXPECT_EQ(std::vector<int32_t>(before.data<int32_t>(), before.data<int32_t>() + k), slots);
  ran.slots.assign(after.data<int32_t>(), after.data<int32_t>() + k);
  return ran;
}
void expect_counts(const ResidencyCounts& c, int64_t resident, int64_t substituted, int64_t fetched) {
  EXPECT_EQ(c.resident, resident);
  EXPECT_EQ(c.substituted, substituted);
  EXPECT_EQ(c.fetched, fetched);
}

TEST(Buddies, ByHand) {
  BuddyOptions options = six_experts();
  // 3: its buddy 4 is missing too, 0 is the token's own, so 1 answers. 4: 0 is the token's own, 1 is taken: fetched.
  Ran ran = run_one(options, {3, 4, 0}, {.5, .3, .2});
  EXPECT_EQ(ran.slots, (std::vector<int32_t>{1, 4, 0}));
  expect_counts(ran.counts, 1, 1, 1);
  // 5 takes 1, so 4 takes 0, and nobody is left for 3.
  ran = run_one(options, {5, 4, 3}, {.4, .3, .3});
  EXPECT_EQ(ran.slots, (std::vector<int32_t>{1, 0, 3}));
  expect_counts(ran.counts, 0, 2, 1);
  options.max_substitutions = 1;
  EXPECT_EQ(run_one(options, {5, 4, 3}, {.4, .3, .3}).slots, (std::vector<int32_t>{1, 4, 3}));
  options.max_substitutions = 0;
  EXPECT_EQ(run_one(options, {5, 4, 3}, {.4, .3, .3}).slots, (std::vector<int32_t>{5, 4, 3}));
  // A choice that was skipped (slot 6) is none.
  options = six_experts();
  ran = run_one(options, {5, 6, 2}, {.4, 0, .3});
  EXPECT_EQ(ran.slots, (std::vector<int32_t>{1, 6, 2}));
  expect_counts(ran.counts, 1, 1, 0);
}

TEST(Buddies, ConditionsOnTheRouter) {
  BuddyOptions options = six_experts();
  options.min_entropy = .5;  // of the gates' shares, over ln 3: 0.10 for the first token, 1 for the second
  EXPECT_EQ(run_one(options, {5, 4, 2}, {.49, .005, .005}).slots, (std::vector<int32_t>{5, 4, 2}));
  EXPECT_EQ(run_one(options, {5, 4, 2}, {.1, .1, .1}).slots, (std::vector<int32_t>{1, 0, 2}));
  options = six_experts();
  options.max_share = .5;  // of .3 + .1 + .1: the first choice has .6, the second .2
  EXPECT_EQ(run_one(options, {5, 4, 2}, {.3, .1, .1}).slots, (std::vector<int32_t>{5, 0, 2}));
}

TEST(Buddies, ListsAreCutAtTau) {
  // Row 0 has 6 co-activations: 2 with 3 of them, then 1 with 2, then 3 with 1.
  const std::vector<double> together = {9, 2, 3, 1, 2, 5, 0, 0, 3, 0, 4, 0, 1, 0, 0, 1};
  EXPECT_EQ(buddy_lists(together, 4, 1)[0], (std::vector<int32_t>{2, 1, 3}));
  EXPECT_EQ(buddy_lists(together, 4, .8)[0], (std::vector<int32_t>{2, 1}));  // 5/6 reaches .8
  EXPECT_EQ(buddy_lists(together, 4, .5)[0], (std::vector<int32_t>{2}));     // 3/6 is .5
  EXPECT_EQ(buddy_lists(together, 4, 1)[1], (std::vector<int32_t>{0}));      // never together: not a buddy
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--buddy-tau 0"}, [&] { buddy_lists(together, 4, 0); }));
}

TEST(Buddies, CoactivationsCountTheSample) {
  Statistics s = empty_statistics(1, 4, 2, false);
  s.sample_sequence = {0, 0}, s.sample_token = {0, 1};
  s.layers[0].sample_logits = {1, 3, 2, 0, 5, 1, 4, 9};  // top 2: {1, 2}, {3, 0}
  EXPECT_EQ(coactivations(s, 0, 2), (std::vector<double>{1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1}));
  // Slot 3 masked: the second token chooses {0, 2}.
  EXPECT_EQ(coactivations(s, 0, 2, {0, 0, 0, 1}),
            (std::vector<double>{1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 2, 0, 0, 0, 0, 0}));
}

Batch batch_of(const CompressionGround& ground) {
  const Document& document = ground.held_out.front();
  return make_batch(document.ids, 1, static_cast<int64_t>(document.ids.size()));
}
Tensor hidden_with(const Olmoe& model, const CompressionGround& ground, const BuddyOptions& buddies,
                   RoutingCounts* counts) {
  const RoutingOptions routing{.buddies = buddies, .counts = counts};
  return model.forward(batch_of(ground), {.routing = &routing});
}

TEST(Buddies, InvariantsOnAWholeModel) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto model = load_model(ground.model, DType::kF32);
  const Tensor original = model->forward(batch_of(ground), {});
  BuddyOptions buddies{.layers = buddy_layers(ground.statistics, *model, {.most_used = 64, .declared = {}}, .95)};
  RoutingCounts counts;
  EXPECT_TRUE(testing::bits_equal(hidden_with(*model, ground, buddies, &counts), original));  // all are there
  expect_counts(counts.residency, counts.chosen, 0, 0);
  buddies.layers = buddy_layers(ground.statistics, *model, {.most_used = 24, .declared = {}}, .95);
  buddies.max_substitutions = 0;
  counts = {};
  EXPECT_TRUE(testing::bits_equal(hidden_with(*model, ground, buddies, &counts), original));  // all are fetched
  EXPECT_EQ(counts.residency.substituted, 0);
  EXPECT_GT(counts.residency.fetched, 0);
  const int64_t misses = counts.residency.fetched;
  buddies.max_substitutions = 3;
  counts = {};
  EXPECT_FALSE(testing::bits_equal(hidden_with(*model, ground, buddies, &counts), original));
  EXPECT_GT(counts.residency.substituted,
            misses / 4);  // later layers see other tokens, so not exactly min(3, misses) a token
  EXPECT_EQ(counts.residency.resident + counts.residency.substituted + counts.residency.fetched, counts.chosen);
  // What a token runs: at most three others than it chose, all resident, none twice.
  const Tensor slots = testing::random_slots(
      500, 8,
      [] {
        std::vector<int32_t> all(64);
        for (int32_t e = 0; e < 64; ++e) all[static_cast<size_t>(e)] = e;
        return all;
      }(),
      3);
  const Tensor gates = Tensor::zeros({500, 8}, DType::kF32);
  ResidencyCounts random;
  const Tensor ran = substitute_missing(buddies, 1, slots, gates, random);
  for (int64_t t = 0; t < 500; ++t) {
    std::set<int32_t> distinct;
    int changed = 0;
    for (int64_t k = 0; k < 8; ++k) {
      const int32_t before = slots.data<int32_t>()[t * 8 + k], after = ran.data<int32_t>()[t * 8 + k];
      distinct.insert(after);
      if (before == after) continue;
      ++changed;
      EXPECT_EQ(buddies.layers[1].resident[static_cast<size_t>(before)], 0);
      EXPECT_EQ(buddies.layers[1].resident[static_cast<size_t>(after)], 1);
    }
    EXPECT_EQ(distinct.size(), 8u);
    EXPECT_LE(changed, 3);
  }
}

TEST(Buddies, DeclaredSetsAndBadInput) {
  const CompressionGround& ground = CompressionGround::golden();
  const auto model = load_model(ground.model, DType::kF32);
  const TempDir where;
  testing::put_file(where / "set.json", "[[1, 5], [63]]");
  const ResidentSet set = read_resident_set(where / "set.json", 2, 64);
  const std::vector<BuddyLayer> layers = buddy_layers(ground.statistics, *model, set, .95);
  EXPECT_EQ(layers[0].resident[5], 1);
  EXPECT_EQ(layers[1].resident[5], 0);
  testing::put_file(where / "bad.json", "[[1, 64], [63]]");
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"layer 0 holds 64", "0 to 63"},
                         [&] { read_resident_set(where / "bad.json", 2, 64); }));
  testing::put_file(where / "short.json", "[[1]]");
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"2 lists"}, [&] { read_resident_set(where / "short.json", 2, 64); }));
  EXPECT_TRUE(fails_with(ErrorKind::kUsage, {"--resident 65"},
                         [&] { buddy_layers(ground.statistics, *model, {.most_used = 65, .declared = {}}, .95); }));
  ground.compress("conmoe", .4, where / "shared");
  const auto shared = load_model(where / "shared", DType::kF32);
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"share an expert"},
                         [&] { buddy_layers(ground.statistics, *shared, {.most_used = 8, .declared = {}}, .95); }));
  ground.compress("reap", .4, where / "pruned");
  const auto pruned = load_model(where / "pruned", DType::kF32);
  const std::vector<BuddyLayer> left = buddy_layers(ground.statistics, *pruned, {.most_used = 8, .declared = {}}, 1);
  for (size_t l = 0; l < left.size(); ++l) {
    for (const std::vector<int32_t>& list : left[l].buddies) {
      for (const int32_t buddy : list)  // a slot that is gone answers for nobody
        EXPECT_NE(pruned->blocks[l].moe.slots[static_cast<size_t>(buddy)].kind, SlotKind::kRemoved);
    }
  }
}

TEST(Buddies, FromTheProgram) {
  const CompressionGround& ground = CompressionGround::golden();
  const TempDir where;
  const std::string statistics = where / "s.safetensors", model = ground.model,
                    tokens = ground.model / "golden.safetensors";
  save_statistics(ground.statistics, statistics);
  const testing::ProgramResult run =
      testing::run_lightmoe({"eval", model, "--tokens", tokens, "--resident", "24", "--buddies", statistics,
                             "--buddy-max", "2", "--out", where / "r.json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  EXPECT_NE(run.out.find("ran on a buddy"), std::string::npos) << run.out;
  const Json r = read_json_file((where / "r.json").string())["config"]["residency"];
  EXPECT_EQ(r["resident"], 24);
  EXPECT_GT(r["substituted"].get<int64_t>(), 0);
  const auto refused = [&](const std::vector<std::string>& flags, const std::string& words) {
    std::vector<std::string> arguments{"eval", model, "--tokens", tokens};
    arguments.insert(arguments.end(), flags.begin(), flags.end());
    const testing::ProgramResult r2 = testing::run_lightmoe(arguments);
    EXPECT_NE(r2.exit_code, 0);
    EXPECT_NE(r2.err.find(words), std::string::npos) << r2.err;
  };
  refused({"--resident", "24"}, "--buddies");
  refused({"--resident", "0", "--resident-set", where / "none.json", "--buddies", statistics}, "none.json");
  refused({"--resident", "24", "--buddies", statistics, "--buddy-max-share", "2"}, "--buddy-max-share 2");
}

// What residency costs on the trained demo model: printed.
TEST(Buddies, OnTheDemo) {
  const CompressionGround& ground = CompressionGround::demo();
  const auto model = load_model(ground.model, DType::kF32);
  const double original = ground.loss(*model);
  double loss_at[2];
  for (const int64_t resident : {24, 8}) {
    RoutingCounts counts;
    const RoutingOptions routing{
        .buddies = {.layers = buddy_layers(ground.statistics, *model, {.most_used = resident, .declared = {}}, .95)},
        .counts = &counts};
    const double loss = loss_at[resident == 8] = ground.loss(*model, &routing);
    const ResidencyCounts& r = counts.residency;
    fmt::print(
        "             {} of 32 resident: {} in memory, {} by buddies, {} fetched, loss {:.3f} (original {:.3f})\n",
        resident, r.resident, r.substituted, r.fetched, loss, original);
  }
  EXPECT_LT(loss_at[0], loss_at[1]);
  EXPECT_LT(loss_at[1], std::log(1024.0));
}

}  // namespace
}  // namespace lightmoe
