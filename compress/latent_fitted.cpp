#include "compress/latent_fitted.h"

#include "compress/linear_algebra.h"
#include "compress/weights.h"
#include "model/latent_projections.h"

namespace lightmoe {

Tensor stacked_experts(const MethodInput& input, int64_t layer, ExpertMatrix matrix) {
  const int64_t experts = input.config.num_experts, f = input.config.intermediate_size, d = input.config.hidden_size;
  const Tensor all = Tensor::empty({experts * f, d}, DType::kF32);
  for (int64_t e = 0; e < experts; ++e) {
    const MatrixPlace place = input.experts->place(layer, e, matrix);
    const Tensor to = all.slice(e * f, (e + 1) * f);
    if (matrix == ExpertMatrix::kDown)
      to.copy_from(transpose(place.read(DType::kF64)));
    else
      place.read_rows(0, to);
  }
  return all;
}

int64_t fit_bytes(const MethodInput& input, const LatentForm& form) {
  const int64_t weights = input.config.num_experts * input.config.intermediate_size;
  const LayerShape shape = latent_shape(input.config.num_experts, form);
  const int64_t shared = form.projections * shape.projection_parameters(input.config.hidden_size);
  const int64_t results = shape.latent_matrices() * weights * form.size + shared;  // of all matrices, kept
  const int64_t at_work = (weights * form.size + shared / shape.latent_matrices()) * 5;
  return (results + at_work + 3 * weights * input.config.hidden_size) * 4 + 5 * kProjectionBlockBytes;
}

const LatentFit& FittedLatents::fit(ExpertMatrix matrix) {
  std::unique_ptr<LatentFit>& made = fits_[static_cast<size_t>(matrix)];
  if (made != nullptr) return *made;
  made = std::make_unique<LatentFit>(LatentFitSizes{.latents = input_.config.num_experts,
                                                    .width = input_.config.intermediate_size,
                                                    .hidden = input_.config.hidden_size,
                                                    .size = form_.size,
                                                    .bases = form_.projections,
                                                    .rank = form_.rank});
  const Tensor w = stacked_experts(input_, layer_, matrix);
  start_(*made, w);
  made->fit(w, options_);
  return *made;
}

Tensor FittedLatents::factor(int64_t latent, ExpertMatrix matrix) {
  const int64_t f = input_.config.intermediate_size;
  return fit(matrix).a().slice(latent * f, (latent + 1) * f);
}

Tensor FittedLatents::down(int64_t latent) {
  return input_.experts->place(layer_, latent, ExpertMatrix::kDown).read(DType::kF32);
}

Tensor FittedLatents::mix(int64_t latent) {
  const int64_t matrices = form_.down ? 3 : 2;
  const Tensor rows = Tensor::empty({matrices, form_.projections}, DType::kF32);
  for (int64_t m = 0; m < matrices; ++m) {
    rows.row(m).copy_from(fit(static_cast<ExpertMatrix>(m)).mix().row(latent));
  }
  if (latent + 1 == input_.config.num_experts) fits_ = {};  // written last
  return rows;
}

}  // namespace lightmoe
