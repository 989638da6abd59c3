// What compression is measured against: the model as it is, all of it trained, and LoRA on every expert with as many trainable
// parameters as LightMoE has.

#include "compress/registry.h"

namespace lightmoe {
namespace {

Plan plan_nothing(const MethodInput& input) { return plain_plan(model_size(input.config)); }
int64_t lora_rank(const MethodInput& input) { return matched_rank(input, 0); }

const RegisterMethod original{
    {.name = "original", .summary = "the model as it is, not trained", .plan = &plan_nothing}};
const RegisterMethod full{{.name = "full",
                           .summary = "full fine-tuning, nothing compressed",
                           .plan = &plan_nothing,
                           .trainable = Trainable::kEverything}};
const RegisterMethod lora{{.name = "lora",
                           .summary = "LoRA on all experts at LightMoE's number of trainable parameters",
                           .plan = &plan_nothing,
                           .rank = &lora_rank,
                           .trainable = Trainable::kAdapters}};

}  // namespace
}  // namespace lightmoe
