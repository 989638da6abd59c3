#pragma once
// Router KD (arXiv 2603.02217, calibration of routers after compression): whatever a method did to the experts, the routers alone train
// towards the original model's next tokens:
//   loss = tau^2 KL(softmax(t / tau) || softmax(z / tau)), a mean over labelled tokens;  t, z the logits of the original and of the model
// Published: every token of 3000 sequences of C4, one epoch, 8 sequences a step, rate 5e-5, tau = 1. Ours: the tokens that the data marks
// (all of them in plain text, answers else), any schedule. Rows of masked slots get no gradient, so that removing slots leaves fewer
// rows to train; nothing annealed, no adapter added. Cost: a forward pass of the original and its weights in memory.

#include <filesystem>
#include <memory>

#include "compress/record.h"
#include "model/olmoe.h"

namespace lightmoe {

// The whole original, frozen. Error(kInput) when `base` is not the model that was compressed.
std::unique_ptr<Olmoe> load_teacher(const std::filesystem::path& base, const CompressionRecord& record, DType dtype);
// Routers train, all else is frozen. Works on declared parameters as well.
void train_routers_alone(const Olmoe& model);
// What then trains: a row of D for every slot that is not masked.
int64_t live_router_parameters(const std::vector<LayerShape>& layers, int64_t hidden);

}  // namespace lightmoe
