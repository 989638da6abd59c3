#pragma once
// The latents of one layer whose projections are mixed and fitted to the weights (compress/latent_fit.h): one fit per kind of matrix,
// made when the first of its tensors is asked for and kept until the layer's last one is written.

#include <array>

#include "compress/latent_fit.h"
#include "compress/latent_plan.h"

namespace lightmoe {

// Gives a fit its first values; w [E*F,D] is what it will be fitted to, experts one below the other (of down the transposes).
using StartFit = std::function<void(const LatentFit& fit, const Tensor& w)>;

class FittedLatents : public LatentSource {
 public:
  FittedLatents(const MethodInput& input, int64_t layer, const LatentForm& form, const LatentFitOptions& options,
                StartFit start)
      : input_(input), layer_(layer), form_(form), options_(options), start_(std::move(start)) {}
  Tensor projection(int64_t projection, ExpertMatrix matrix) override { return fit(matrix).basis(projection); }
  Tensor left(int64_t projection, ExpertMatrix matrix) override { return fit(matrix).left(projection); }
  Tensor factor(int64_t latent, ExpertMatrix matrix) override;
  Tensor down(int64_t latent) override;
  Tensor mix(int64_t latent) override;

 private:
  const LatentFit& fit(ExpertMatrix matrix);

  MethodInput input_;
  int64_t layer_;
  LatentForm form_;
  LatentFitOptions options_;
  StartFit start_;
  std::array<std::unique_ptr<LatentFit>, 3> fits_;
};

// One kind of matrix of a layer's experts, [E*F,D] f32, of down the transposes.
Tensor stacked_experts(const MethodInput& input, int64_t layer, ExpertMatrix matrix);
// What a fit of this form takes in memory: its numbers with gradients and moments, the weights twice, the blocks of a step.
int64_t fit_bytes(const MethodInput& input, const LatentForm& form);
inline constexpr int64_t kFitSteps = 2000;  // unless asked otherwise

}  // namespace lightmoe
