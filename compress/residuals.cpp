#include "compress/residuals.h"

#include <memory>

#include "compress/expert_sample.h"
#include "compress/linear_algebra.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

constexpr double kRidge = 1e-2;

}  // namespace

const Tensor& Residuals::base_matrix(const Site& site, const BankEntry& base) {
  const auto [place, is_new] = bases_.try_emplace({base.experts, site.matrix});
  if (!is_new) return place->second;
  const std::vector<int64_t> shape = expert_matrix_shape(input_.config, site.matrix);
  place->second = Tensor::zeros({shape[0], shape[1]}, DType::kF64);
  for (size_t i = 0; i < base.experts.size(); ++i) {
    const Tensor w = input_.experts->place(site.layer, base.experts[i], site.matrix).read(DType::kF64);
    for (int64_t k = 0; k < w.numel(); ++k) {
      place->second.data<double>()[k] += base.weights[i] * w.data<double>()[k];
    }
  }
  return place->second;
}

LowRank Residuals::factorise(const Site& site, const BankEntry& base, int64_t rank) {
  const Tensor delta = input_.experts->place(site.layer, site.expert, site.matrix).read(DType::kF64);
  const Tensor& mean = base_matrix(site, base);
  for (int64_t k = 0; k < delta.numel(); ++k) delta.data<double>()[k] -= mean.data<double>()[k];
  if (!whitened_) return best_low_rank(delta, rank, input_.options.seed);
  Tensor x = routed_rows(layer_sample(input_, site.layer), {site.expert}).to(DType::kF64);
  if (site.matrix == ExpertMatrix::kDown) {
    x = expert_hidden(read_expert(*input_.experts, site.layer, site.expert, DType::kF64), x);
  }
  const Tensor l = cholesky(with_ridge(product(x, true, x, false), kRidge));
  LowRank best = best_low_rank(product(delta, false, l, false), rank, input_.options.seed);
  best.a = solve_right(l, best.a, true);
  return best;
}

Tensor Residuals::factor(const Site& site, const BankEntry& base, int64_t rank, bool b) {
  if (site.layer != last_.layer) bases_.clear();
  if (!(site == last_)) factors_ = factorise(site, base, rank), last_ = site;
  return b ? factors_.b : factors_.a;
}

void add_residual_adapters(Plan& plan, const MethodInput& input, bool whitened) {
  const auto residuals = std::make_shared<Residuals>(input, whitened);
  for (size_t l = 0; l < plan.layers.size(); ++l) {
    const LayerPlan& made = plan.layers[l];
    for (size_t a = 0; a < made.adapter_slot.size(); ++a) {
      const int32_t slot = made.adapter_slot[a];
      const BankEntry base = made.bank[static_cast<size_t>(made.shape.slots[static_cast<size_t>(slot)].expert)];
      const int64_t rank = made.shape.adapter_rank[a];
      for (const ExpertMatrix matrix : kExpertMatrices) {
        const Residuals::Site site{static_cast<int64_t>(l), slot, matrix};
        for (const bool b : {false, true}) {
          plan.computed[adapter_tensor_name(site.layer, static_cast<int64_t>(a), matrix, b)] = [=] {
            return residuals->factor(site, base, rank, b);
          };
        }
      }
    }
  }
}

}  // namespace lightmoe
