#include "tests/support/bigram.h"

#include <algorithm>
#include <cmath>

#include "runtime/philox.h"

namespace lightmoe::testing {
namespace {

ParameterPtr parameter(const std::string& name, const Shape& shape, uint64_t seed) {
  auto p = std::make_shared<Parameter>();
  p->name = name;
  const MemoryScope scope(MemoryCategory::kWeights);
  p->value = Tensor::zeros(shape, DType::kF32);
  fill_normal(p->value.data<float>(), p->value.numel(), 0.5f, seed, p->value.numel());
  return p;
}

}  // namespace

Bigram::Bigram(int64_t vocab, uint64_t seed)
    : table(parameter("table", {vocab, vocab}, seed)),
      bias(parameter("bias", {vocab}, seed)),
      scale(parameter("scale", {1}, seed)) {
  scale->value.data<float>()[0] = 1.25f;
  scale->trainable = false;
}

TrainLosses Bigram::forward_backward(const Batch& batch, const TrainOptions& options) {
  ++calls;
  if (during) during();
  const int64_t vocab = bias->value.dim(0);
  const float *w = table->value.data<float>(), *b = bias->value.data<float>();
  float *dw = table->ensure_grad().data<float>(), *db = bias->ensure_grad().data<float>();
  const double s = scale->value.data<float>()[0];
  const int32_t *ids = batch.ids.data<int32_t>(), *labels = batch.labels.data<int32_t>();
  TrainLosses losses;
  std::vector<double> p(static_cast<size_t>(vocab));
  for (int64_t t = 0; t < batch.tokens(); ++t) {
    if (labels[t] < 0) continue;
    double sum = 0;
    for (int64_t j = 0; j < vocab; ++j) sum += p[j] = std::exp(s * (w[ids[t] * vocab + j] + b[j]));
    losses.ce_sum -= std::log(p[labels[t]] / sum);
    ++losses.labels;
    for (int64_t j = 0; j < vocab; ++j) {
      const double g = options.loss_scale * s * (p[j] / sum - (j == labels[t] ? 1 : 0));
      dw[ids[t] * vocab + j] += static_cast<float>(g);
      db[j] += static_cast<float>(g);
    }
  }
  for (int64_t j = 0; j < vocab; ++j) {
    losses.aux += static_cast<double>(b[j]) * b[j];
    db[j] += static_cast<float>(options.aux_coef * options.aux_scale * 2 * b[j]);
  }
  if (after_backward) after_backward(*this, losses);
  return losses;
}

std::vector<Document> uneven_documents(int64_t count, int64_t max_length, int64_t vocab, uint64_t seed) {
  Philox random(seed);
  std::vector<Document> documents;
  for (int64_t i = 0; i < count; ++i) {
    Document document;
    const auto length = 2 + random.below(static_cast<uint64_t>(max_length - 1));
    const auto answer = 1 + random.below(length - 1);
    for (uint64_t t = 0; t < length; ++t) {
      document.ids.push_back(static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab))));
      document.loss.push_back(t >= answer);
    }
    documents.push_back(std::move(document));
  }
  return documents;
}

}  // namespace lightmoe::testing
