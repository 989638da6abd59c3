#include "compress/exporter.h"

#include <algorithm>
#include <cstring>

#include "compress/latent_weights.h"
#include "compress/record.h"
#include "kernels/gemm.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "model/moe_extension.h"

namespace lightmoe {
namespace {

// A matrix with zero rows (gate, up) or columns (down) for the units that were removed: the same function.
Tensor widened(const Tensor& w, const std::vector<int64_t>& dims) {
  if (w.dim(0) == dims[0] && w.dim(1) == dims[1]) return w;
  const Tensor out = Tensor::zeros(Shape(dims), w.dtype());
  const size_t bytes = static_cast<size_t>(w.dim(1)) * size_of(w.dtype());
  for (int64_t i = 0; i < w.dim(0); ++i) std::memcpy(out.row(i).raw(), w.row(i).raw(), bytes);
  return out;
}

class Densifier {
 public:
  Densifier(const Densifier&) = delete;
  Densifier& operator=(const Densifier&) = delete;
  Densifier(const ExportJob& job)
      : input_(job.model), config_(read_config(job.model)), tensors_(job.dtype, job.allow_nonfinite) {
    const std::string name = (job.model / "config.json").string();
    check(!config_.lightmoe_json.empty(), ErrorKind::kInput,
          "{}: has no \"lightmoe\" object: the directory is a stock model already", name);
    shapes_ = slot_tables_from_json(parse_json(config_.lightmoe_json, name), config_, name);
    for (const LayerShape& shape : shapes_) {
      check(!shape.extension.any() || find_extension(shape.extension.kind).may_be_left, ErrorKind::kInput,
            "{}: the model has the extension {}; a stock model has no place for it, and without it is another function",
            name, shape.extension.text());
    }
    find_live_slots(name);
    for (const ParameterInfo& info : stock_parameters(stock_)) {
      if (info.kind == ParameterKind::kRouter)
        add_router(info);
      else if (info.kind != ParameterKind::kExpert)
        tensors_.add_copy(info.name, info.shape, place_of(input_, info.name, info.shape));
      else if (info.name == expert_tensor_name(info.layer, 0, ExpertMatrix::kGate))
        add_layer(info.layer);
    }
  }

  const StreamedTensors& tensors() const { return tensors_; }
  int64_t original_experts() const { return config_.num_experts; }
  int64_t input_bytes() const { return input_.total_bytes(); }
  OlmoeConfig stock_config(const ExportJob& job) const {
    OlmoeConfig config = stock_;
    if (job.dtype)
      config.torch_dtype = *job.dtype == DType::kBF16 ? "bfloat16" : *job.dtype == DType::kF16 ? "float16" : "float32";
    return config;
  }

 private:
  // Removed slots leave the stock model: its experts are the slots that are left. One num_experts serves all layers, and a
  // router row for nothing cannot be written (it would still take its share of the softmax).
  void find_live_slots(const std::string& name) {
    for (const LayerShape& shape : shapes_) {
      std::vector<int32_t>& live = live_.emplace_back();
      for (size_t s = 0; s < shape.slots.size(); ++s) {
        if (shape.slots[s].kind != SlotKind::kRemoved) live.push_back(static_cast<int32_t>(s));
      }
      check(live.size() == live_.front().size(), ErrorKind::kInput,
            "{}: layer 0 has {} slots that are not removed, layer {} has {}; a stock model has one number of experts "
            "(num_experts) for all layers and cannot express it",
            name, live_.front().size(), live_.size() - 1, live.size());
    }
    stock_ = config_;
    stock_.lightmoe_json.clear();
    stock_.num_experts = static_cast<int64_t>(live_.front().size());
    stock_.intermediate_size = widest();
  }

  // One intermediate_size serves all experts: narrower ones get zero units up to the widest.
  int64_t widest() const {
    int64_t width = 1;
    for (const LayerShape& shape : shapes_) {
      if (shape.widths.empty() || shape.wide_adapters || shape.has_latents()) return config_.intermediate_size;
      width = std::max(width, *std::max_element(shape.widths.begin(), shape.widths.end()));
    }
    return width;
  }

  void add_router(const ParameterInfo& info) {
    const MatrixPlace whole = place_of(input_, info.name, {config_.num_experts, config_.hidden_size});
    if (stock_.num_experts == config_.num_experts) return tensors_.add_copy(info.name, info.shape, whole);
    const std::vector<int32_t>& live = live_[static_cast<size_t>(info.layer)];
    tensors_.add_computed(info.name, info.shape, whole.dtype, [whole, live] {
      const Tensor rows = Tensor::empty({static_cast<int64_t>(live.size()), whole.columns}, whole.dtype);
      for (size_t i = 0; i < live.size(); ++i) {
        whole.read_rows(live[i], rows.slice(static_cast<int64_t>(i), static_cast<int64_t>(i) + 1));
      }
      return rows;
    });
  }

  void add_layer(int64_t layer) {
    for (int64_t expert = 0; expert < stock_.num_experts; ++expert) {
      for (const ExpertMatrix matrix : kExpertMatrices) add_slot(layer, expert, matrix);
    }
  }

  void add_slot(int64_t layer, int64_t expert, ExpertMatrix matrix) {
    const LayerShape& shape = shapes_[static_cast<size_t>(layer)];
    const int32_t slot = live_[static_cast<size_t>(layer)][static_cast<size_t>(expert)];
    const Slot& entry = shape.slots[static_cast<size_t>(slot)];
    check(entry.kind != SlotKind::kConstant, ErrorKind::kInput,
          "layer {}, slot {}: a constant; a stock expert is zero at x = 0 and cannot express it", layer, slot);
    const std::string name = expert_tensor_name(layer, expert, matrix);
    const std::vector<int64_t> dims = expert_matrix_shape(stock_, matrix);
    if (entry.kind == SlotKind::kLatent) return add_latent(name, layer, entry, matrix);
    const auto index = static_cast<size_t>(entry.expert);
    const bool zero = shape.zero_expert[index] != 0;
    const std::vector<int64_t> own =
        expert_matrix_shape(config_.hidden_size,
                            zero ? stock_.intermediate_size : shape.width_of(index, config_.intermediate_size), matrix);
    std::optional<MatrixPlace> bank;
    if (!zero) bank = place_of(input_, stored_name(layer, entry.expert, matrix), own);
    if (entry.adapter < 0) {
      if (bank && own == dims) return tensors_.add_copy(name, dims, *bank);
      if (bank)
        return tensors_.add_computed(name, dims, bank->dtype,
                                     [bank, dims] { return widened(bank->read(bank->dtype), dims); });
      const DType dtype = place_of(input_, "model.norm.weight", {config_.hidden_size}).dtype;
      return tensors_.add_computed(name, dims, dtype, [dims] { return Tensor::zeros(Shape(dims), DType::kF32); });
    }
    const Product adapter = adapter_of(layer, shape, entry, matrix);
    tensors_.add_computed(name, dims, adapter.a.dtype, [bank, adapter, own, dims] {
      const Tensor stored = bank ? bank->read(DType::kF32) : Tensor::zeros(Shape(own), DType::kF32);
      const Tensor w = widened(stored, {adapter.b.rows, adapter.a.columns});  // an adapter may have more units
      adapter.add_to(w);
      return widened(w, dims);
    });
  }

  struct Product {
    MatrixPlace b, a;  // w += b a
    void add_to(const Tensor& w) const {
      run(Gemm{.a = b.read(DType::kF32), .b = a.read(DType::kF32), .c = w, .beta = 1});
    }
  };
  Product adapter_of(int64_t layer, const LayerShape& shape, const Slot& slot, ExpertMatrix matrix) const {
    const auto index = static_cast<size_t>(slot.adapter);
    const int64_t rank = shape.adapter_rank[index];
    const std::vector<int64_t> dims =
        expert_matrix_shape(config_.hidden_size, shape.width_of_adapter(index, config_.intermediate_size), matrix);
    return {.b = place_of(input_, adapter_tensor_name(layer, slot.adapter, matrix, true), {dims[0], rank}),
            .a = place_of(input_, adapter_tensor_name(layer, slot.adapter, matrix, false), {rank, dims[1]})};
  }
  // Where a bank entry is stored: here or by a lower layer.
  std::string stored_name(int64_t layer, int64_t entry, ExpertMatrix matrix) const {
    const LayerShape& shape = shapes_[static_cast<size_t>(layer)];
    if (!shape.borrowed.empty()) {
      const BankRef& from = shape.borrowed[static_cast<size_t>(entry)];
      if (from.layer >= 0) return bank_tensor_name(from.layer, from.entry, matrix);
    }
    return bank_tensor_name(layer, entry, matrix);
  }

  void add_latent(const std::string& name, int64_t layer, const Slot& slot, ExpertMatrix matrix) {
    const std::vector<int64_t> dims = expert_matrix_shape(config_, matrix);
    const MatrixPlace own = latents_.own(layer, slot.latent, matrix);
    if (!latents_.is_factored(layer, matrix) && slot.adapter < 0) return tensors_.add_copy(name, dims, own);
    std::optional<Product> adapter;
    if (slot.adapter >= 0) adapter = adapter_of(layer, shapes_[static_cast<size_t>(layer)], slot, matrix);
    tensors_.add_computed(name, dims, own.dtype, [=, this, latent = slot.latent] {
      const Tensor w = latents_.matrix(layer, latent, matrix);
      if (adapter) adapter->add_to(w);
      return w;
    });
  }

  Checkpoint input_;
  OlmoeConfig config_, stock_;
  std::vector<LayerShape> shapes_;
  LatentWeights latents_{input_, config_, shapes_};
  std::vector<std::vector<int32_t>> live_;  // per layer, the slots that are not removed
  StreamedTensors tensors_;
};

}  // namespace

ExportReport export_to_hugging_face(const ExportJob& job) {
  const DeviceScope host(DeviceKind::kCpu);  // whatever --device says: this works on files
  OutputDirectory output(job.output, job.force, {job.model});
  const Densifier densifier(job);
  write_file_atomically(output.path() / "config.json", config_to_json(densifier.stock_config(job)));
  SafetensorsWriter writer(output.path(), densifier.tensors().specs(), {.max_shard_bytes = job.max_shard_bytes});
  densifier.tensors().write(writer, [&](size_t done, size_t all) {
    if (job.say && all >= 1000 && done % (all / 10) == 0) job.say(fmt::format("{} of {} tensors", done, all));
  });
  copy_side_files(job.model, output.path());
  output.commit();
  return {.num_experts = densifier.stock_config(job).num_experts,
          .original_experts = densifier.original_experts(),
          .compressed_bytes = densifier.input_bytes(),
          .written_bytes = densifier.tensors().total_bytes()};
}

}  // namespace lightmoe
