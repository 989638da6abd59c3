#pragma once
// The smallest trainable model, for tests of the training loop: logits of the next token = scale[0] * (table[id] + bias), cross
// entropy, and aux = sum of bias^2. Everything in double inside; `scale` is frozen.

#include <functional>

#include "model/trainer.h"

namespace lightmoe::testing {

class Bigram : public TrainableModel {
 public:
  explicit Bigram(int64_t vocab, uint64_t seed = 1);
  std::vector<ParameterPtr> parameters() const override { return {table, bias, scale}; }
  TrainLosses forward_backward(const Batch& batch, const TrainOptions& options) override;

  ParameterPtr table, bias, scale;  // [V,V] [V] [1]
  int64_t calls = 0;
  std::function<void(Bigram&, TrainLosses&)> after_backward;  // to poison losses or gradients
  std::function<void()> during;                               // to send signals or take time
};

// Documents of 2 to max_length tokens; the loss falls on a prefix-dependent part, so micro-batches have different label counts.
std::vector<Document> uneven_documents(int64_t count, int64_t max_length, int64_t vocab, uint64_t seed);

}  // namespace lightmoe::testing
