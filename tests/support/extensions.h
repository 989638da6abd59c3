#pragma once
// Small models with extensions (model/moe_extension.h) and the plain mathematics that tests hold them against, in double.

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model/extend.h"
#include "model/moe_op.h"
#include "model/routing.h"
#include "tests/support/testing.h"

namespace lightmoe::testing::extensions {

constexpr int64_t kHidden = 12, kWidth = 10, kSlots = 6, kTopK = 3, kTokens = 5;
// Two layers of six experts of width 10, hidden 12, three a token.
OlmoeConfig tiny_config();
// Of that shape, random; the extension's tensors random too, so that no zero start hides anything, unless as_started.
std::unique_ptr<Olmoe> extended(const std::string& text, DType dtype, bool as_started = false);
// Two rows of nine tokens, the last two of them padding.
Batch some_batch();

using Vector = std::vector<double>;
using Tensors = std::map<std::string, Tensor>;
Tensors tensors_of(const MoeExtension& extension);  // by name
// Rows [first, first + rows) of w (rows -1: all) times x.
Vector times(const Tensor& w, const Vector& x, int64_t first = 0, int64_t rows = -1);
Vector softmax_of_largest(const Vector& z, int64_t k);
Vector mapped(Vector v, double (*f)(double));

// One block of an extended model, and what it is called with.
struct BlockCase {
  std::unique_ptr<Olmoe> model;
  Var x = Tape::variable(random_tensor({kTokens, kHidden}, DType::kF64, 21)),
      gates = Tape::variable(random_tensor({kTokens, kTopK}, DType::kF64, 22, .3));
  Tensor slots = Tensor::from<int32_t>({0, 1, 2, 0, 4, 5, 0, 3, 2, 0, 5, 1, 0, 2, 4}, {kTokens, kTopK});
  explicit BlockCase(const std::string& text) : model(extended(text, DType::kF64)) {}
  const MoeLayer& layer() const { return model->blocks[0].moe; }
  MoeResult run(Tape& tape, const RoutingOptions* routing = nullptr) const {
    return run_moe(tape, {.x = x, .layer = layer(), .slots = slots, .gates = gates, .routing = routing});
  }
  Tensor experts() const {
    Tape tape(false);
    return moe_experts(tape, x, layer(), slots, gates, GemmCompute::kF32).value;
  }
  std::vector<ParameterPtr> parameters() const {
    std::vector<ParameterPtr> all = layer().parameters();
    all.erase(all.begin());  // the router takes no part
    return all;
  }
};

}  // namespace lightmoe::testing::extensions
