#pragma once
// A one- or two-layer model whose experts a test writes by hand, on disk, as methods read it.

#include <filesystem>
#include <functional>
#include <memory>

#include "compress/registry.h"
#include "compress/weights.h"
#include "model/olmoe.h"
#include "tests/support/files.h"

namespace lightmoe::testing {

class TinyModel {
 public:
  // 4 experts, top 2, D 4, F 2. `fill` gives every weight: (layer, expert, matrix, row, column).
  using Fill = std::function<float(int64_t layer, int64_t expert, ExpertMatrix matrix, int64_t row, int64_t column)>;
  TinyModel(int64_t layers, const Fill& fill) {
    config.vocab_size = 11, config.hidden_size = 4, config.intermediate_size = 2, config.num_layers = layers;
    config.num_heads = config.num_kv_heads = 1, config.num_experts = 4, config.num_experts_per_token = 2;
    const auto model = random_model(config, DType::kF32, 5);
    for (int64_t l = 0; l < layers; ++l) {
      for (int64_t e = 0; e < 4; ++e) {
        const Expert& expert = model->blocks[static_cast<size_t>(l)].moe.experts[static_cast<size_t>(e)];
        for (int64_t r = 0; r < 4; ++r) {
          for (int64_t c = 0; c < 4; ++c) {
            expert.gate_up->value.data<float>()[r * 4 + c] =
                fill(l, e, r < 2 ? ExpertMatrix::kGate : ExpertMatrix::kUp, r % 2, c);
          }
          for (int64_t c = 0; c < 2; ++c) {
            expert.down->value.data<float>()[r * 2 + c] = fill(l, e, ExpertMatrix::kDown, r, c);
          }
        }
      }
    }
    std::filesystem::create_directories(directory / "model");
    save_model(*model, directory / "model", DType::kF32, int64_t{1} << 30);
    checkpoint = std::make_unique<Checkpoint>(directory / "model");
    experts = std::make_unique<ExpertSource>(*checkpoint, config);
    statistics = empty_statistics(layers, 4, 4, true);
    statistics.tokens = 10;
    options.budget = {BudgetKind::kExpertsPerLayer, 2};
  }

  MethodInput input() const {
    return {.config = config, .statistics = statistics, .options = options, .experts = experts.get()};
  }
  Plan plan(const char* method) const { return find_method(method).plan(input()); }

  OlmoeConfig config;
  TempDir directory;
  std::unique_ptr<Checkpoint> checkpoint;
  std::unique_ptr<ExpertSource> experts;
  Statistics statistics;
  MethodOptions options;
};

}  // namespace lightmoe::testing
