#include "compress/latent_fit.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "autograd/optimizer.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "model/latent_projections.h"

namespace lightmoe {
namespace {

constexpr int64_t kDownRow = 2;  // of a latent's mix
constexpr int64_t kChecks = 20;  // times the error is looked at for the best values

ParameterPtr zeros(const Shape& shape) {
  auto p = std::make_shared<Parameter>();
  p->value = Tensor::zeros(shape, DType::kF32);
  return p;
}

double squares(const Tensor& x) {
  double sum = 0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    const auto v = static_cast<double>(x.data<float>()[i]);
    sum += v * v;
  }
  return sum;
}

double deviation(const Tensor& x) {
  double sum = 0;
  for (int64_t i = 0; i < x.numel(); ++i) sum += static_cast<double>(x.data<float>()[i]);
  const auto n = static_cast<double>(x.numel());
  return std::sqrt(std::max(0.0, squares(x) / n - sum / n * (sum / n)));
}

}  // namespace

LatentFit::LatentFit(const LatentFitSizes& s)
    : sizes_(s), a_(zeros({s.latents * s.width, s.size})), logits_(zeros({s.latents, s.bases})) {
  std::vector<int32_t> offsets = {0};
  for (int64_t i = 0; i < s.latents; ++i) {
    offsets.push_back(static_cast<int32_t>((i + 1) * s.width));
    auto a = std::make_shared<Parameter>();
    a->value = a_->value.slice(i * s.width, (i + 1) * s.width);
    layer_.latents.push_back({.a_gate = a, .a_up = a, .a_down = a, .mix = zeros({3, s.bases})});
  }
  const int64_t rows = s.rank > 0 ? s.rank : s.size;
  for (int64_t j = 0; j < s.bases; ++j) {
    layer_.projections.push_back(
        {.down = zeros({rows, s.hidden}), .left_down = rows < s.size ? zeros({s.size - rows, rows}) : nullptr});
  }
  offsets_ = Tensor::from(offsets, {s.latents + 1});
}

Tensor LatentFit::mix() const {
  const Tensor mix = logits().clone();
  for (int64_t i = 0; i < sizes_.latents; ++i) {
    float* row = mix.row(i).data<float>();
    const float top = *std::max_element(row, row + sizes_.bases);
    double sum = 0;
    for (int64_t j = 0; j < sizes_.bases; ++j) sum += static_cast<double>(row[j] = std::exp(row[j] - top));
    for (int64_t j = 0; j < sizes_.bases; ++j) row[j] = static_cast<float>(static_cast<double>(row[j]) / sum);
  }
  return mix;
}

std::vector<ParameterPtr> LatentFit::parameters() const {
  std::vector<ParameterPtr> all = {a_, logits_};
  for (const Projection& p : layer_.projections) {
    all.push_back(p.down);
    if (p.left_down != nullptr) all.push_back(p.left_down);
  }
  return all;
}

double LatentFit::residual(const Tensor& w, const Tensor& r) {
  const Tensor weights = mix();
  for (int64_t i = 0; i < sizes_.latents; ++i) {
    layer_.latents[static_cast<size_t>(i)].mix->value.row(kDownRow).copy_from(weights.row(i));
  }
  run(Scale{.alpha = -1, .x = w, .y = r});
  LatentProjections(layer_).use(
      ExpertHalf::kDown, {.group_offsets = offsets_}, DType::kF32, false, [&](const LatentProjections::Block& block) {
        run(GroupedGemmM{.a = a(), .offsets = offsets_, .b = block.p, .c = r, .beta = 1, .a_column = block.first});
      });
  return squares(r);
}

// Of the mean of the squared residuals.
void LatentFit::gradients(const Tensor& r) {
  const double scale = 2 / static_cast<double>(r.numel());
  LatentProjections(layer_).use(
      ExpertHalf::kDown, {.group_offsets = offsets_}, DType::kF32, true, [&](const LatentProjections::Block& block) {
        run(GroupedGemmM{.a = r,
                         .offsets = offsets_,
                         .b = block.p,
                         .c = a_->ensure_grad(),
                         .trans_b = true,
                         .alpha = scale,
                         .c_column = block.first});
        run(GroupedGemmK{
            .a = a(), .b = r, .offsets = offsets_, .c = block.dp, .alpha = scale, .a_column = block.first});
      });
  add_logit_gradient();
}

// dz_ij = w_ij (dw_ij - sum_k w_ik dw_ik)
void LatentFit::add_logit_gradient() {
  const Tensor weights = mix(), to = logits_->ensure_grad();
  for (int64_t i = 0; i < sizes_.latents; ++i) {
    const ParameterPtr& mix = layer_.latents[static_cast<size_t>(i)].mix;
    const float *w = weights.row(i).data<float>(), *dw = mix->ensure_grad().row(kDownRow).data<float>();
    double mean = 0;
    for (int64_t j = 0; j < sizes_.bases; ++j) mean += static_cast<double>(w[j]) * static_cast<double>(dw[j]);
    for (int64_t j = 0; j < sizes_.bases; ++j) to.row(i).data<float>()[j] = w[j] * (dw[j] - static_cast<float>(mean));
    mix->zero_grad();
  }
}

LatentFit::Errors LatentFit::fit(const Tensor& w, const LatentFitOptions& options) {
  const double sigma = deviation(w), scale = sigma > 0 ? 1 / sigma : 1;
  const Tensor target = Tensor::empty(w.shape(), DType::kF32), r = Tensor::empty(w.shape(), DType::kF32);
  run(Scale{.alpha = scale, .x = w, .y = target});
  run(Scale{.alpha = scale, .x = a(), .y = a()});
  const double whole = std::max(squares(target), 1e-300);
  const std::vector<ParameterPtr> all = parameters();
  Optimizer optimizer(
      all, {.beta2 = 0.999, .weight_decay = options.weight_decay, .clip_norm = 0, .rule = [&](const Parameter& p) {
              const bool own = &p == a_.get() || &p == logits_.get();
              return ParameterRule{.lr_scale = own ? 1 : options.basis_lr_scale};
            }});
  Errors errors;
  double best = residual(target, r);
  errors.before = best / whole;
  std::vector<Tensor> kept;
  const auto keep = [&] {
    kept.clear();
    for (const ParameterPtr& p : all) kept.push_back(p->value.clone());
  };
  keep();
  for (int64_t step = 1; step <= options.steps; ++step) {
    optimizer.zero_grad();
    gradients(r);
    const double part = static_cast<double>(step - 1) / static_cast<double>(options.steps);
    const double lr = options.last_lr + (options.lr - options.last_lr) * (1 + std::cos(std::numbers::pi * part)) / 2;
    optimizer.step(lr, 0);
    const double error = residual(target, r);
    const bool looks = step % std::max<int64_t>(1, options.steps / kChecks) == 0 || step == options.steps;
    if (looks && error < best) best = error, keep();
  }
  for (size_t i = 0; i < all.size(); ++i) all[i]->value.copy_from(kept[i]), all[i]->grad.reset();
  run(Scale{.alpha = 1 / scale, .x = a(), .y = a()});
  errors.after = best / whole;
  return errors;
}

}  // namespace lightmoe
