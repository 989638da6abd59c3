#include "compress/weight_blend.h"

#include <algorithm>
#include <cmath>

#include "model/eval.h"
#include "runtime/error.h"
#include "runtime/parallel.h"

namespace lightmoe {

WeightBlend::WeightBlend(const std::filesystem::path& base, const std::vector<std::filesystem::path>& models)
    : base_(load_model(base, DType::kF32)), blend_(load_model(base, DType::kF32)) {
  check(!models.empty(), ErrorKind::kUsage, "no model to blend");
  const std::vector<ParameterPtr> expected = base_->parameters();
  for (const std::filesystem::path& path : models) {
    const Olmoe& model = *models_.emplace_back(load_model(path, DType::kF32));
    const std::vector<ParameterPtr> parameters = model.parameters();
    check(parameters.size() == expected.size(), ErrorKind::kInput, "{}: {} weights, the base has {}", path.string(),
          parameters.size(), expected.size());
    for (size_t i = 0; i < expected.size(); ++i) {
      check(parameters[i]->name == expected[i]->name && parameters[i]->value.shape() == expected[i]->value.shape(),
            ErrorKind::kInput, "{}: \"{}\" is {}, the base has \"{}\" {}", path.string(), parameters[i]->name,
            parameters[i]->value.shape(), expected[i]->name, expected[i]->value.shape());
    }
  }
}

void WeightBlend::set(const std::vector<double>& weights) {
  check(weights.size() == models_.size(), ErrorKind::kUsage, "{} weights for {} models", weights.size(),
        models_.size());
  const std::vector<ParameterPtr> to = blend_->parameters(), start = base_->parameters();
  std::vector<std::vector<ParameterPtr>> from;
  for (const auto& model : models_) from.push_back(model->parameters());
  for (size_t i = 0; i < to.size(); ++i) {
    const float* w0 = start[i]->value.data<float>();
    float* out = to[i]->value.data<float>();
    parallel_for(0, to[i]->value.numel(), 1 << 14, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        double sum = w0[j];
        for (size_t m = 0; m < from.size(); ++m)
          sum += weights[m] * (double{from[m][i]->value.data<float>()[j]} - w0[j]);
        out[j] = static_cast<float>(sum);
      }
    });
  }
}

std::vector<double> WeightBlend::weights_for(const std::vector<int32_t>& prompt, double temperature) const {
  check(temperature > 0 && std::isfinite(temperature), ErrorKind::kUsage, "--temperature {:g}: expected a number > 0",
        temperature);
  std::vector<double> w(models_.size(), 1 / static_cast<double>(models_.size()));
  if (prompt.size() < 2) return w;
  const Document document{.ids = prompt, .loss = std::vector<uint8_t>(prompt.size(), 1)};
  for (size_t i = 0; i < w.size(); ++i)
    w[i] = -evaluate_documents(*models_[i], {document}, {}).value("loss") / temperature;
  const double largest = *std::max_element(w.begin(), w.end());
  double sum = 0;
  for (double& v : w) v = std::exp(v - largest), sum += v;
  for (double& v : w) v /= sum;
  return w;
}

}  // namespace lightmoe
