#include "compress/latent_weights.h"

#include "kernels/elementwise.h"
#include "kernels/gemm.h"

namespace lightmoe {

MatrixPlace LatentWeights::own(int64_t layer, int32_t latent, ExpertMatrix matrix) const {
  const std::vector<int64_t> whole = expert_matrix_shape(config_, matrix);
  const std::vector<int64_t> factor = {config_.intermediate_size, shape(layer).latent_size};
  return place_of(input_, latent_tensor_name(layer, latent, matrix), is_factored(layer, matrix) ? factor : whole);
}

const LatentWeights::Shared& LatentWeights::shared(int64_t layer, int64_t projection, ExpertMatrix matrix) {
  if (layer != layer_) shared_.clear(), layer_ = layer;
  const auto [entry, is_new] = shared_.try_emplace({projection, matrix});
  if (!is_new) return entry->second;
  const LayerShape& s = shape(layer);
  const int64_t rows = s.projection_rows(), below = s.latent_size - rows;
  const auto read = [this](const std::string& name, const std::vector<int64_t>& dims) {
    const MatrixPlace place = place_of(input_, name, dims);
    return place.read(place.dtype);
  };
  entry->second.values = read(projection_tensor_name(layer, projection, matrix), {rows, config_.hidden_size});
  if (below > 0) entry->second.left = read(left_tensor_name(layer, projection, matrix), {below, rows});
  return entry->second;
}

Tensor LatentWeights::basis(int64_t layer, int64_t projection, ExpertMatrix matrix) {
  const Shared& stored = shared(layer, projection, matrix);
  if (!stored.left.defined()) return stored.values.to(DType::kF32);
  const int64_t m = shape(layer).latent_size, rows = stored.values.dim(0);
  const Tensor b = Tensor::empty({m, config_.hidden_size}, DType::kF32);
  b.slice(0, rows).copy_from(stored.values);
  run(Gemm{.a = stored.left.to(DType::kF32), .b = b.slice(0, rows), .c = b.slice(rows, m)});
  return b;
}

Tensor LatentWeights::projection(int64_t layer, int32_t latent, ExpertMatrix matrix) {
  const LayerShape& s = shape(layer);
  if (!s.latent_mix) return basis(layer, s.latent_projection[static_cast<size_t>(latent)], matrix);
  const Tensor mix =
      place_of(input_, mix_tensor_name(layer, latent), {s.latent_matrices(), s.projections}).read(DType::kF32);
  const Tensor p = Tensor::zeros({s.latent_size, config_.hidden_size}, DType::kF32);
  const float* coefficients = mix.row(static_cast<int64_t>(matrix)).data<float>();
  for (int64_t j = 0; j < s.projections; ++j) {
    run(Axpy{.alpha = static_cast<double>(coefficients[j]), .x = basis(layer, j, matrix), .y = p});
  }
  run(Silu{.x = p, .y = p});
  return p;
}

Tensor LatentWeights::matrix(int64_t layer, int32_t latent, ExpertMatrix matrix) {
  const Tensor a = own(layer, latent, matrix).read(DType::kF32);
  if (!is_factored(layer, matrix)) return a;
  const Tensor p = projection(layer, latent, matrix);
  const std::vector<int64_t> dims = expert_matrix_shape(config_, matrix);
  const Tensor w = Tensor::empty(Shape(dims), DType::kF32);
  if (matrix == ExpertMatrix::kDown)
    run(Gemm{.a = p, .b = a, .c = w, .trans_a = true, .trans_b = true});
  else
    run(Gemm{.a = a, .b = p, .c = w});
  return w;
}

}  // namespace lightmoe
