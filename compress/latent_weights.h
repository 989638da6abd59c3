#pragma once
// The matrices that a latent slot stands for, written out, read from a compressed directory (struct Latent in model/moe.h):
//   W = A P [F,D], of down its transpose [D,F];  P = B_j, or silu(sum_j mix_j B_j)
// What the latents of one layer share stays in memory, as stored, until another layer is asked for. f32.

#include <map>

#include "compress/weights.h"

namespace lightmoe {

class LatentWeights {
 public:
  LatentWeights(const Checkpoint& input, const OlmoeConfig& config, const std::vector<LayerShape>& shapes)
      : input_(input), config_(config), shapes_(shapes) {}
  bool is_factored(int64_t layer, ExpertMatrix matrix) const {
    return matrix != ExpertMatrix::kDown || shape(layer).latent_down;
  }
  // The latent's own tensor: A [F,M], or the whole down matrix [D,F].
  MatrixPlace own(int64_t layer, int32_t latent, ExpertMatrix matrix) const;
  Tensor matrix(int64_t layer, int32_t latent, ExpertMatrix matrix);

 private:
  struct Shared {
    Tensor values, left;  // left undefined: stored as it is
  };
  const LayerShape& shape(int64_t layer) const { return shapes_[static_cast<size_t>(layer)]; }
  const Shared& shared(int64_t layer, int64_t projection, ExpertMatrix matrix);
  Tensor basis(int64_t layer, int64_t projection, ExpertMatrix matrix);  // [M,D]
  Tensor projection(int64_t layer, int32_t latent, ExpertMatrix matrix);

  const Checkpoint& input_;
  const OlmoeConfig& config_;
  const std::vector<LayerShape>& shapes_;
  int64_t layer_ = -1;
  std::map<std::pair<int64_t, ExpertMatrix>, Shared> shared_;  // of that layer
};

}  // namespace lightmoe
