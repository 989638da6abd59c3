#pragma once
// The parameters of a model as a structure, and the same as the tensors a checkpoint holds. In memory gate and up of an expert are
// one matrix; on disk they are two: a stored tensor is a range of rows of a parameter.
// Names of parameters: the Hugging Face name where one stored tensor is one parameter, else model.layers.L.mlp.experts.J.
// gate_up_proj.weight (stock), model.layers.L.mlp.bank.J.gate_up_proj.weight, model.layers.L.mlp.adapters.J.gate_up_a (compressed).

#include <memory>
#include <string>
#include <vector>

#include "model/olmoe.h"
#include "model/slot_table.h"

namespace lightmoe {

struct StoredTensor {
  std::string name;
  ParameterPtr parameter;
  int64_t first_row = 0, rows = 0;
  const char* config_keys = "";  // what its shape comes from, for messages
  // These rows of the parameter's value or gradient.
  Tensor view(const Tensor& whole) const { return whole.slice(first_row, first_row + rows); }
  std::vector<int64_t> shape() const;
};
// The slot tables, with experts that lie in several banks owned by the lowest layer.
std::vector<LayerShape> shapes_of(const Olmoe& model);
// Whether every layer is stock and the config has no "lightmoe" object. Else all layers of the checkpoint have bank names.
bool is_plain(const Olmoe& model);
// In a fixed order, that of Olmoe::parameters(). A tied head is not stored.
std::vector<StoredTensor> stored_tensors(const Olmoe& model);

// All parameters with their shapes and names, without memory (value.raw() is null): to check a file against.
std::unique_ptr<Olmoe> declare_model(const OlmoeConfig& config, const std::vector<LayerShape>& layers);
// Gives every parameter uninitialised memory (category weights).
void allocate_weights(Olmoe& model, DType dtype);
// One more parameter with memory, for code that builds layers: bases, adapters.
ParameterPtr make_parameter(const std::string& name, const Shape& shape, DType dtype);
// Names by structure, as above; to be called after slots, bank or adapters changed.
void name_parameters(Olmoe& model);

}  // namespace lightmoe
