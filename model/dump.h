#pragma once
// Everything a model computes on given ids, by name, for checks from outside: the names of tests/golden/*/golden.safetensors.
//   logits [B,S,V], hidden_states.i [B,S,D] (input of layer i; i = L: after the final norm), router_logits.l [B,S,E],
//   selected_experts.l i64 [B,S,K] (descending), routing_weights.l [B,S,K], loss_aux f64 [1]; with labels loss_ce and
//   loss_total = CE + router_aux_loss_coef * aux; with gradients grad.<name> of loss_total for every tensor a checkpoint holds.

#include <string>
#include <utility>
#include <vector>

#include "model/olmoe.h"

namespace lightmoe {

struct DumpInput {
  int64_t rows = 0, length = 0;
  std::vector<int32_t> ids, labels;  // labels as in Hugging Face (not shifted); may be empty
  std::vector<uint8_t> mask;         // may be empty
};
// input_ids [B,S] and, if there, labels and attention_mask. Error(kInput) for shapes, ids outside the vocabulary, other labels.
DumpInput read_dump_input(const std::filesystem::path& file, const OlmoeConfig& config);

// Gradients need labels. All weights train, whatever they were set to.
std::vector<std::pair<std::string, Tensor>> dump_model(Olmoe& model, const DumpInput& input, bool gradients);

}  // namespace lightmoe
