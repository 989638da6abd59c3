#include "tests/support/extensions.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "runtime/philox.h"

namespace lightmoe::testing::extensions {

OlmoeConfig tiny_config() {
  OlmoeConfig c;
  c.vocab_size = 23, c.hidden_size = kHidden, c.intermediate_size = kWidth, c.num_layers = 2, c.num_heads = 2;
  c.num_kv_heads = 1, c.num_experts = kSlots, c.num_experts_per_token = kTopK, c.max_position_embeddings = 64;
  c.rms_norm_eps = 1e-5, c.initializer_range = .4, c.eos_token_ids = {0}, c.pad_token_id = 1;
  return c;
}

Batch some_batch() {
  std::vector<int32_t> ids, labels;
  Philox random(9);
  for (int i = 0; i < 18; ++i) {
    ids.push_back(static_cast<int32_t>(random.below(23)));
    labels.push_back(i % 5 == 2 ? -100 : ids.back());
  }
  std::vector<uint8_t> mask(18, 1);
  mask[17] = mask[16] = 0;
  return make_batch(ids, 2, 9, labels, mask);
}

std::unique_ptr<Olmoe> extended(const std::string& text, DType dtype, bool as_started) {
  std::unique_ptr<Olmoe> model = random_model(tiny_config(), dtype, 3);
  extend_model(*model, parse_extension(text), 7);
  uint64_t seed = 100;
  for (const Block& block : model->blocks) {
    for (const ExtensionTensor& t : block.moe.extension->tensors()) {
      if (!as_started) t.parameter->value.copy_from(random_tensor(t.parameter->value.shape(), dtype, seed++, .7));
    }
  }
  return model;
}

Tensors tensors_of(const MoeExtension& extension) {
  Tensors all;
  for (const ExtensionTensor& t : extension.tensors()) all[t.name] = t.parameter->value;
  return all;
}
Vector times(const Tensor& w, const Vector& x, int64_t first, int64_t rows) {
  Vector y(static_cast<size_t>(rows < 0 ? w.dim(0) : rows), 0.0);
  for (size_t i = 0; i < y.size(); ++i) {
    for (size_t j = 0; j < x.size(); ++j)
      y[i] += w.data<double>()[(first + static_cast<int64_t>(i)) * w.dim(1) + static_cast<int64_t>(j)] * x[j];
  }
  return y;
}
Vector softmax_of_largest(const Vector& z, int64_t k) {
  std::vector<size_t> order(z.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return z[a] > z[b]; });
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += std::exp(z[order[static_cast<size_t>(i)]]);
  Vector p(z.size(), 0.0);
  for (int64_t i = 0; i < k; ++i) p[order[static_cast<size_t>(i)]] = std::exp(z[order[static_cast<size_t>(i)]]) / sum;
  return p;
}

Vector mapped(Vector v, double (*f)(double)) {
  for (double& x : v) x = f(x);
  return v;
}

}  // namespace lightmoe::testing::extensions
