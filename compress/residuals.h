#pragma once
// What an expert differs from its base by, as a low-rank term: B A ~ W_expert - W_base, for the adapters of a plan.
//   plain      best rank-R approximation of the weights (compress/svd.h)
//   whitened   of the outputs: with X the sampled inputs of that matrix on the expert's own tokens (of down: its hidden activations) and
//              L L^T = X^T X + ridge, the rank-R truncation of (W_expert - W_base) L, A taken back by L^{-1}. ridge = 0.01 mean diagonal; an
//              expert without sampled tokens gets the plain one. Each rank's factors are then scaled to equal norms, as those of an SVD are.
// With MethodOptions::align the expert's hidden units stand in the order of the base's first member (compress/merging.h), as in the base.
// The factors of one matrix, one expert and the bases of one layer are kept until another is asked for: tensors are written layer by
// layer, both factors of a matrix one after the other.

#include <map>
#include <optional>

#include "compress/expert_sample.h"
#include "compress/plan.h"
#include "compress/registry.h"
#include "compress/svd.h"

namespace lightmoe {

class Residuals {
 public:
  Residuals(const MethodInput& input, bool whitened) : input_(input), whitened_(whitened) {}
  struct Site {
    int64_t layer;
    int32_t expert;
    ExpertMatrix matrix;
    bool operator==(const Site&) const = default;
  };
  Tensor factor(const Site& site, const BankEntry& base, int64_t rank, bool b);
  // The largest `count` singular values of the difference, whitened or not.
  std::vector<double> singular_values(const Site& site, const BankEntry& base, int64_t count);

 private:
  const ExpertMatrices& base_of(const Site& site, const BankEntry& base);
  const ExpertMatrices& expert_of(const Site& site, const BankEntry& base);
  LowRank factorise(const Site& site, const BankEntry& base, int64_t rank);

  MethodInput input_;
  bool whitened_;
  std::map<std::vector<int32_t>, ExpertMatrices> bases_;  // of one layer
  int64_t bases_layer_ = -1, sample_layer_ = -1;
  LayerSample sample_;
  std::optional<std::pair<int64_t, int32_t>> expert_;  // layer and number of `own_`
  ExpertMatrices own_;
  std::optional<Site> last_;
  LowRank factors_;
};

// Makes every adapter of the plan the residual of its slot's own expert.
void add_residual_adapters(Plan& plan, const MethodInput& input, bool whitened);

}  // namespace lightmoe
