#include "model/slot_table.h"

#include <gtest/gtest.h>

#include "loaders/json.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

OlmoeConfig small_config() {
  OlmoeConfig config;
  config.num_layers = 2;
  config.num_experts = 4;
  config.num_experts_per_token = 2;
  config.intermediate_size = 8;
  return config;
}

// Layer 0 plain; layer 1: slots 1 and 3 share a base with an adapter each, slot 2 is a zero base with an adapter.
std::vector<LayerShape> two_layers() {
  LayerShape shared;
  shared.slots = {Slot{.expert = 0}, Slot{.expert = 1, .adapter = 0}, Slot{.expert = 2, .adapter = 2},
                  Slot{.expert = 1, .adapter = 1}};
  shared.zero_expert = {0, 0, 1};
  shared.adapter_rank = {16, 16, 2};
  return {plain_layer_shape(4), shared};
}

void expect_equal(const LayerShape& a, const LayerShape& b) {
  ASSERT_EQ(a.slots.size(), b.slots.size());
  for (size_t i = 0; i < a.slots.size(); ++i) {
    EXPECT_EQ(a.slots[i].kind, b.slots[i].kind);
    EXPECT_EQ(a.slots[i].expert, b.slots[i].expert);
    EXPECT_EQ(a.slots[i].adapter, b.slots[i].adapter);
  }
  EXPECT_EQ(a.zero_expert, b.zero_expert);
  EXPECT_EQ(a.adapter_rank, b.adapter_rank);
  EXPECT_EQ(a.widths, b.widths);
}

TEST(SlotTable, SurvivesTheRoundTrip) {
  std::vector<LayerShape> layers = two_layers();
  for (const SlotKind kind : {SlotKind::kExpert, SlotKind::kRemoved}) {
    layers[0].slots[1].kind = kind;
    const Json written = slot_tables_to_json(layers, {{"name", "lightmoe"}});
    const std::vector<LayerShape> read =
        slot_tables_from_json(parse_json(written.dump(), "json"), small_config(), "config.json");
    ASSERT_EQ(read.size(), 2u);
    expect_equal(read[0], layers[0]);
    expect_equal(read[1], layers[1]);
    EXPECT_EQ(written["method"]["name"], "lightmoe");
  }
}

TEST(SlotTable, WidthsSurviveAndAreCounted) {
  std::vector<LayerShape> layers = two_layers();
  layers[1].widths = {3, 1, 8};
  const Json written = slot_tables_to_json(layers, nullptr);
  EXPECT_FALSE(written["layers"][0].contains("widths"));
  const std::vector<LayerShape> read = slot_tables_from_json(parse_json(written.dump(), "json"), small_config(), "c");
  expect_equal(read[0], layers[0]);
  expect_equal(read[1], layers[1]);
  EXPECT_EQ(read[0].width_of(2, 8), 8);
  EXPECT_EQ(read[1].width_of(0, 8), 3);
  EXPECT_EQ(read[1].width_of_adapter(0, 8), 1);  // of slot 1, whose expert has one unit
  EXPECT_EQ(read[1].width_of_adapter(2, 8), 8);  // of the zero entry
}

TEST(SlotTable, RefusesWhatDoesNotFit) {
  const Json good = slot_tables_to_json(two_layers(), nullptr);
  EXPECT_NO_THROW(slot_tables_from_json(good, small_config(), "c"));
  const auto refused = [&](const char* pointer, const Json& value, const char* message) {
    Json bad = good;
    bad[Json::json_pointer(pointer)] = value;
    try {
      slot_tables_from_json(bad, small_config(), "c");
      ADD_FAILURE() << pointer << " = " << value << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInput);
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
  };
  refused("/format", 2, "format is 2");
  refused("/layers", Json::array(), "has 0 entries, expected 2");
  refused("/layers/1/experts", 5, "expected 0 to 4");
  refused("/layers/1/experts", "3", "expected an integer");
  refused("/layers/1/zero_experts/0", 3, "expected 0 to 2");
  refused("/layers/1/adapters/0", 0, "expected 1 to");
  refused("/layers/1/slots/expert/0", 3, "expected -1 to 2");
  refused("/layers/1/slots/expert/0", -1, "slot 0 points to no expert");
  refused("/layers/1/slots/adapter/2", 0, "adapter 0 belongs to slots of two experts (1 and 2)");
  refused("/layers/0/slots/kind", Json::array({"removed", "removed", "expert", "removed"}),
          "1 slots are not removed, a token chooses 2");
  refused("/layers/1/slots/adapter", Json::array({1}), "slots.adapter 1 entries, expected 4");
  refused("/layers/1/slots", 7, "is missing");
  refused("/layers/1/widths", Json::array({1, 2}), "widths has 2 entries, expected 3");
  refused("/layers/1/widths", Json::array({1, 0, 8}), "widths holds 0, expected 1 to 8");
  refused("/layers/1/widths", Json::array({1, 9, 8}), "widths holds 9, expected 1 to 8");
  refused("/layers/1/widths", Json::array({1, 2, 7}), "widths holds 7, expected 8 to 8");
}

// Layer 0: constants and an expert; layer 1: latents of two projections, and layer 0's expert.
std::vector<LayerShape> every_kind() {
  LayerShape first, second;
  first.slots = {Slot{.expert = 0}, Slot{.kind = SlotKind::kConstant, .constant = 1},
                 Slot{.kind = SlotKind::kConstant, .constant = 0}, Slot{.kind = SlotKind::kRemoved}};
  first.zero_expert = {0};
  first.constants = 2;
  second.slots = {Slot{.kind = SlotKind::kLatent, .latent = 0},
                  Slot{.kind = SlotKind::kLatent, .adapter = 0, .latent = 1}, Slot{.expert = 0}, Slot{.expert = 0}};
  second.zero_expert = {0};
  second.adapter_rank = {2};
  second.borrowed = {{.layer = 0, .entry = 0}};
  second.latent_size = 5, second.projections = 2, second.latent_projection = {1, 0};
  return {first, second};
}

TEST(SlotTable, EveryKindSurvivesTheRoundTrip) {
  OlmoeConfig config = small_config();
  config.hidden_size = 8;
  const std::vector<LayerShape> layers = every_kind();
  const std::vector<LayerShape> read =
      slot_tables_from_json(parse_json(slot_tables_to_json(layers, nullptr).dump(), "json"), config, "config.json");
  for (size_t l = 0; l < 2; ++l) {
    expect_equal(read[l], layers[l]);
    EXPECT_EQ(read[l].constants, layers[l].constants);
    EXPECT_EQ(read[l].latent_size, layers[l].latent_size);
    EXPECT_EQ(read[l].projections, layers[l].projections);
    EXPECT_EQ(read[l].latent_projection, layers[l].latent_projection);
    for (size_t s = 0; s < 4; ++s) {
      EXPECT_EQ(read[l].slots[s].constant, layers[l].slots[s].constant);
      EXPECT_EQ(read[l].slots[s].latent, layers[l].slots[s].latent);
    }
  }
  EXPECT_TRUE(read[0].stores(0));
  EXPECT_FALSE(read[1].stores(0));
}

// Latents that mix projections of low rank, down matrices as factors, and experts narrower than their adapters.
TEST(SlotTable, MixedLatentsAndWideAdaptersSurviveTheRoundTrip) {
  OlmoeConfig config = small_config();
  config.hidden_size = 8;
  std::vector<LayerShape> layers = every_kind();
  layers[1].latent_projection = {-1, -1};
  layers[1].latent_mix = layers[1].latent_down = true, layers[1].projection_rank = 3;
  layers[0].widths = {2}, layers[0].wide_adapters = true;
  layers[1].borrowed.clear();
  const Json good = slot_tables_to_json(layers, nullptr);
  const std::vector<LayerShape> read = slot_tables_from_json(parse_json(good.dump(), "json"), config, "config.json");
  EXPECT_TRUE(read[1].latent_mix && read[1].latent_down && read[0].wide_adapters);
  EXPECT_EQ(read[1].projection_rank, 3);
  EXPECT_EQ(read[1].latent_projection, layers[1].latent_projection);
  EXPECT_EQ(read[0].width_of_adapter(0, 4), 4);
  // M = 5, n = 2, K = 3, D = 8, F = 4: three matrices of 3 rows and [2,3]; factors [4,5] and three rows of coefficients.
  EXPECT_EQ(read[1].projection_parameters(8), 3 * (3 * 8 + 2 * 3));
  EXPECT_EQ(read[1].latent_parameters(8, 4), 3 * 4 * 5 + 3 * 2);
  const auto refused = [&](const char* pointer, const Json& value, const char* message) {
    Json bad = good;
    bad[Json::json_pointer(pointer)] = value;
    EXPECT_TRUE(testing::fails_with(ErrorKind::kInput, {message}, [&] { slot_tables_from_json(bad, config, "c"); }))
        << pointer;
  };
  refused("/layers/1/latents/mix", "tanh", "latents.mix is \"tanh\", expected \"silu\"");
  refused("/layers/1/latents/rank", 5, "expected 1 to 4");
  refused("/layers/1/latents/projection/0", 0, "expected -1 to -1");
  refused("/layers/1/latents/down", 1, "latents.down is 1");
  refused("/layers/0/wide_adapters", "yes", "wide_adapters is \"yes\"");
  Json plain = good;
  plain["layers"][1]["latents"].erase("mix");
  EXPECT_TRUE(testing::fails_with(ErrorKind::kInput, {"latents.rank without latents.mix"},
                                  [&] { slot_tables_from_json(plain, config, "c"); }));
}

TEST(SlotTable, EveryKindIsChecked) {
  OlmoeConfig config = small_config();
  config.hidden_size = 8;
  const Json good = slot_tables_to_json(every_kind(), nullptr);
  const auto refused = [&](const char* pointer, const Json& value, const char* message) {
    Json bad = good;
    bad[Json::json_pointer(pointer)] = value;
    try {
      slot_tables_from_json(bad, config, "c");
      ADD_FAILURE() << pointer << " = " << value << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInput);
      EXPECT_NE(std::string(error.what()).find(message), std::string::npos) << error.what();
    }
  };
  refused("/layers/0/constants", 5, "expected 1 to 4");
  refused("/layers/0/slots/constant/1", 2, "constant holds 2, expected 0 to 1");
  refused("/layers/0/slots/constant", Json::array({0}), "slots.constant has 1 entries");
  refused("/layers/1/latents/size", 9, "expected 1 to 8");
  refused("/layers/1/latents/projection/0", 2, "expected 0 to 1");
  refused("/layers/1/latents/projection", Json::array(), "0 latents");
  refused("/layers/1/slots/latent/0", 2, "expected 0 to 1");
  refused("/layers/1/borrowed/0", Json::array({0, 1, 0}), "borrowed (layer) holds 1");  // itself
  refused("/layers/1/borrowed/0", Json::array({0, 0, 1}), "borrowed (entry there) holds 1");
  refused("/layers/1/borrowed/0", 3, "expected [entry, layer, entry there]");
  refused("/layers/0/slots/kind/0", "latent", "\"latent\" is missing");
  refused("/layers/1/slots/kind/0", "constant", "\"constant\" is missing");
  refused("/layers/1/slots/adapter/2", 0, "slots of two experts");
}

TEST(SlotTable, NamesTensors) {
  EXPECT_EQ(expert_tensor_name(3, 5, ExpertMatrix::kGate), "model.layers.3.mlp.experts.5.gate_proj.weight");
  EXPECT_EQ(bank_tensor_name(0, 11, ExpertMatrix::kDown), "model.layers.0.mlp.bank.11.down_proj.weight");
  EXPECT_EQ(adapter_tensor_name(1, 2, ExpertMatrix::kUp, true), "model.layers.1.mlp.adapters.2.up_b");
}

}  // namespace
}  // namespace lightmoe
