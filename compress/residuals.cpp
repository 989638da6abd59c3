#include "compress/residuals.h"

#include <cmath>
#include <memory>

#include "compress/expert_sample.h"
#include "compress/linear_algebra.h"
#include "compress/merging.h"
#include "compress/weights.h"

namespace lightmoe {
namespace {

constexpr double kRidge = 1e-2;

const Tensor& matrix_of(const ExpertMatrices& expert, ExpertMatrix matrix) {
  return matrix == ExpertMatrix::kGate ? expert.gate : matrix == ExpertMatrix::kUp ? expert.up : expert.down;
}

// Each rank's factors of equal length, as those of a plain SVD are: B takes over the size of X otherwise, and a step of training that moves
// every number alike then moves the product by as much more through A.
void balance(const LowRank& factors) {
  const int64_t m = factors.b.dim(0), rank = factors.b.dim(1), n = factors.a.dim(1);
  for (int64_t r = 0; r < rank; ++r) {
    double *b = factors.b.data<double>() + r, *a = factors.a.data<double>() + r * n, bb = 0, aa = 0;
    for (int64_t i = 0; i < m; ++i) bb += b[i * rank] * b[i * rank];
    for (int64_t i = 0; i < n; ++i) aa += a[i] * a[i];
    if (aa == 0 || bb == 0) continue;
    const double scale = std::sqrt(std::sqrt(aa / bb));
    for (int64_t i = 0; i < m; ++i) b[i * rank] *= scale;
    for (int64_t i = 0; i < n; ++i) a[i] /= scale;
  }
}

}  // namespace

const ExpertMatrices& Residuals::base_of(const Site& site, const BankEntry& base) {
  if (site.layer != bases_layer_) bases_.clear(), bases_layer_ = site.layer;
  const auto [place, is_new] = bases_.try_emplace(base.experts);
  if (!is_new) return place->second;
  if (!base.is_zero()) return place->second = merged_expert(input_, site.layer, base, {.align = input_.options.align});
  const int64_t d = input_.config.hidden_size, f = input_.config.intermediate_size;
  const auto zeros = [](int64_t m, int64_t n) { return Tensor::zeros({m, n}, DType::kF64); };
  return place->second = {.gate = zeros(f, d), .up = zeros(f, d), .down = zeros(d, f)};
}

const ExpertMatrices& Residuals::expert_of(const Site& site, const BankEntry& base) {
  if (expert_ == std::pair(site.layer, site.expert)) return own_;
  own_ = read_expert(*input_.experts, site.layer, site.expert, DType::kF64);
  if (input_.options.align && base.experts.size() > 1 && base.experts[0] != site.expert) {
    const ExpertMatrices first = read_expert(*input_.experts, site.layer, base.experts[0], DType::kF64);
    own_ = with_units(own_, aligned_units(first, own_));
  }
  expert_ = {site.layer, site.expert};
  return own_;
}

LowRank Residuals::factorise(const Site& site, const BankEntry& base, int64_t rank) {
  const ExpertMatrices& own = expert_of(site, base);
  const Tensor delta = matrix_of(own, site.matrix).clone();
  const Tensor& mean = matrix_of(base_of(site, base), site.matrix);
  for (int64_t k = 0; k < delta.numel(); ++k) delta.data<double>()[k] -= mean.data<double>()[k];
  if (!whitened_) return best_low_rank(delta, rank, input_.options.seed);
  if (sample_layer_ != site.layer) sample_ = layer_sample(input_, site.layer), sample_layer_ = site.layer;
  Tensor x = routed_rows(sample_, {site.expert}).to(DType::kF64);
  if (site.matrix == ExpertMatrix::kDown) x = expert_hidden(own, x);
  const Tensor l = cholesky(with_ridge(product(x, true, x, false), kRidge));
  LowRank best = best_low_rank(product(delta, false, l, false), rank, input_.options.seed);
  best.a = solve_right(l, best.a, true);
  balance(best);
  return best;
}

Tensor Residuals::factor(const Site& site, const BankEntry& base, int64_t rank, bool b) {
  if (last_ != site) factors_ = factorise(site, base, rank), last_ = site;
  return b ? factors_.b : factors_.a;
}

std::vector<double> Residuals::singular_values(const Site& site, const BankEntry& base, int64_t count) {
  last_.reset();
  return factorise(site, base, count).singular_values;
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
