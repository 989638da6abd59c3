#include "compress/extension_clusters.h"

#include <algorithm>
#include <cmath>

#include "compress/clustering.h"
#include "model/extend.h"

namespace lightmoe {
namespace {

double length_of(const double* row, size_t width) {
  double sum = 0;
  for (size_t j = 0; j < width; ++j) sum += row[j] * row[j];
  return std::sqrt(sum);
}

void start_layer(const LayerStatistics& layer, const Tensor& value, uint64_t seed) {
  const Tensor clusters = Tensor::empty(value.shape(), value.dtype(), DeviceKind::kCpu);
  const auto width = static_cast<size_t>(clusters.dim(1)), n = layer.sample_inputs.size() / width;
  const std::vector<double> rows(layer.sample_inputs.begin(), layer.sample_inputs.end());
  double mean_length = 0;
  for (size_t i = 0; i < n; ++i) mean_length += length_of(&rows[i * width], width) / static_cast<double>(n);
  const Clusters found = cosine_kmeans(rows, static_cast<int64_t>(n), clusters.dim(0), seed);
  for (size_t c = 0; c < found.size(); ++c) {
    std::vector<double> mean(width, 0.0);
    for (const int32_t i : found[c]) {
      for (size_t j = 0; j < width; ++j) mean[j] += rows[static_cast<size_t>(i) * width + j];
    }
    const double length = length_of(mean.data(), width);
    for (size_t j = 0; j < width; ++j)
      clusters.data<float>()[c * width + j] = static_cast<float>(length > 0 ? mean[j] * mean_length / length : 0);
  }
  value.copy_from(clusters);
}

}  // namespace

void start_clusters(Olmoe& model, const Statistics& s, uint64_t seed) {
  const OlmoeConfig& c = model.config;
  check(s.num_layers == c.num_layers && s.hidden == c.hidden_size, ErrorKind::kInput,
        "clusters: statistics of {} layers of width {}, the model has {} of {}", s.num_layers, s.hidden, c.num_layers,
        c.hidden_size);
  for (size_t l = 0; l < model.blocks.size(); ++l) {
    const ParameterPtr clusters = extension_parameter(model.blocks[l].moe, "clusters");
    check(clusters != nullptr, ErrorKind::kUsage, "--extend-clusters: the extension has no clusters (mor1e has)");
    const auto sampled = static_cast<int64_t>(s.layers[l].sample_inputs.size()) / c.hidden_size;
    check(sampled >= clusters->value.dim(0), ErrorKind::kInput,
          "clusters: the statistics have {} sampled inputs, expected at least {}; calibrate with --sample-inputs",
          sampled, clusters->value.dim(0));
    start_layer(s.layers[l], clusters->value, seed);
  }
}

}  // namespace lightmoe
