#pragma once
// What an MoE block may have beside its slot table: one extension, which runs where the experts would and calls them as it needs.
//   beside them   y = experts(x) + side(x), nothing at the start of training        pesc, smore, mor1e, mode
//   instead       the chosen experts run otherwise                                  compressed-experts, moefication, dsmoe
// A kind is one file model/extension_*.cpp and one line  const RegisterExtension kind{{.name = ...}};  nothing else knows it by name.
// On disk: "extension": {"kind": "pesc", "experts": 8, ..} in a layer's object of config.json (model/slot_table.h), the tensors are
// model.layers.L.mlp.KIND.NAME. Settings are whole numbers. As a text: "pesc" or "pesc:experts=4,rank=2".

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "autograd/ops.h"
#include "model/extension_shape.h"
#include "model/moe.h"

namespace lightmoe {

struct DispatchPlan;
struct RoutingOptions;

struct MoeCall {
  const Var& x;  // [T,D] what the router saw
  const MoeLayer& layer;
  Tensor slots;  // i32 [T,K]
  Var gates;     // [T,K]
  GemmCompute compute = GemmCompute::kF32;
  const RoutingOptions* routing = nullptr;  // of inference
  const DispatchPlan* plan = nullptr;       // of these slots, where the router made it (model/moe_op.h)
};
struct MoeResult {
  Var y;  // [T,D]
  Var open;  // [T*K,N] how open a choice's blocks of units are, 0 to 1, for a loss that closes them; undefined in most kinds
};

// How a tensor starts: normal with variance 1 / (its last dimension), drawn from (seed, its name).
enum class ExtensionStart : uint8_t { kZero, kOne, kNormal };
struct ExtensionTensor {
  std::string name;
  ParameterPtr parameter;
  ExtensionStart start = ExtensionStart::kNormal;
};

class MoeExtension {
 public:
  virtual ~MoeExtension() = default;
  virtual std::vector<ExtensionTensor> tensors() const = 0;  // the same ones in the same order, always
  virtual MoeResult run(Tape& tape, const MoeCall& call) const = 0;
  const ExtensionShape& shape() const { return shape_; }

 private:
  friend std::shared_ptr<MoeExtension> declare_extension(const ExtensionShape& shape, const MoeDims& dims);
  ExtensionShape shape_;
};

struct ExtensionSetting {
  std::string name;
  int64_t value = 0;  // unless given
  int64_t low = 1, high = 1 << 16;
};
struct ExtensionKind {
  std::string name, summary;
  std::string paper;  // arXiv id
  std::vector<ExtensionSetting> settings;
  std::shared_ptr<MoeExtension> (*declare)(const MoeDims&, const ExtensionSettings&);  // parameters without memory
  // What beyond the ranges is wrong with settings for a model, "" = nothing. May be null.
  std::string (*problem)(const OlmoeConfig&, const ExtensionSettings&) = nullptr;
  bool own_experts = false;  // only where every slot has an expert of its own, all of one width (owns_its_experts)
  bool runs_blocks = false;  // runs part of the chosen experts' units, and counts them (RoutingCounts)
  bool may_be_left = false;  // without it, and as it runs by default, the model is the same function
};
struct RegisterExtension {
  explicit RegisterExtension(ExtensionKind kind);
};
const std::vector<ExtensionKind>& extension_kinds();         // sorted by name
const ExtensionKind& find_extension(std::string_view name);  // Error(kUsage) with the names and the nearest
std::shared_ptr<MoeExtension> declare_extension(const ExtensionShape& shape, const MoeDims& dims);
std::string extension_tensor_name(int64_t layer, const std::string& kind, const std::string& name);
// Fills allocated f32 or f64 tensors as they start.
void start_extension(const MoeExtension& extension, int64_t layer, uint64_t seed);

// A parameter of an extension before it has memory.
ParameterPtr declared_parameter(const Shape& shape);
// y = experts(x) + side.
Var beside_experts(Tape& tape, const MoeCall& call, const Var& side);
// What a block computes: the extension if there is one, else the experts.
MoeResult run_moe(Tape& tape, const MoeCall& call);

}  // namespace lightmoe
