#include "compress/exporter.h"

#include "compress/record.h"
#include "kernels/gemm.h"
#include "loaders/json.h"
#include "loaders/output.h"

namespace lightmoe {
namespace {

class Densifier {
 public:
  Densifier(const ExportJob& job)
      : input_(job.model), config_(read_config(job.model)), tensors_(job.dtype, job.allow_nonfinite) {
    const std::string name = (job.model / "config.json").string();
    check(!config_.lightmoe_json.empty(), ErrorKind::kInput,
          "{}: has no \"lightmoe\" object: the directory is a stock model already", name);
    shapes_ = slot_tables_from_json(parse_json(config_.lightmoe_json, name), config_, name);
    for (const ParameterInfo& info : stock_parameters(config_)) {
      if (info.kind != ParameterKind::kExpert)
        tensors_.add_copy(info.name, info.shape, place_of(input_, info.name, info.shape));
      else if (info.name == expert_tensor_name(info.layer, 0, ExpertMatrix::kGate))
        add_layer(info.layer);
    }
  }

  const StreamedTensors& tensors() const { return tensors_; }
  int64_t input_bytes() const { return input_.total_bytes(); }
  OlmoeConfig stock_config(const ExportJob& job) const {
    OlmoeConfig config = config_;
    config.lightmoe_json.clear();
    if (job.dtype)
      config.torch_dtype = *job.dtype == DType::kBF16 ? "bfloat16" : *job.dtype == DType::kF16 ? "float16" : "float32";
    return config;
  }

 private:
  void add_layer(int64_t layer) {
    for (int64_t slot = 0; slot < config_.num_experts; ++slot) {
      for (const ExpertMatrix matrix : kExpertMatrices) add_slot(layer, slot, matrix);
    }
  }

  void add_slot(int64_t layer, int64_t slot, ExpertMatrix matrix) {
    const LayerShape& shape = shapes_[static_cast<size_t>(layer)];
    const Slot& entry = shape.slots[static_cast<size_t>(slot)];
    check(entry.kind == SlotKind::kExpert, ErrorKind::kInput,
          "layer {}, slot {}: not of kind expert; a stock model cannot express it", layer, slot);
    const std::string name = expert_tensor_name(layer, slot, matrix);
    const std::vector<int64_t> dims = expert_matrix_shape(config_, matrix);
    const bool zero = shape.zero_expert[static_cast<size_t>(entry.expert)] != 0;
    std::optional<MatrixPlace> bank;
    if (!zero) bank = place_of(input_, bank_tensor_name(layer, entry.expert, matrix), dims);
    if (entry.adapter < 0) {
      if (bank) return tensors_.add_copy(name, dims, *bank);
      const DType dtype = place_of(input_, "model.norm.weight", {config_.hidden_size}).dtype;
      return tensors_.add_computed(name, dims, dtype, [dims] { return Tensor::zeros(Shape(dims), DType::kF32); });
    }
    const int64_t rank = shape.adapter_rank[static_cast<size_t>(entry.adapter)];
    const MatrixPlace a = place_of(input_, adapter_tensor_name(layer, entry.adapter, matrix, false), {rank, dims[1]});
    const MatrixPlace b = place_of(input_, adapter_tensor_name(layer, entry.adapter, matrix, true), {dims[0], rank});
    tensors_.add_computed(name, dims, a.dtype, [bank, a, b, dims] {
      const Tensor w = bank ? bank->read(DType::kF32) : Tensor::zeros(Shape(dims), DType::kF32);
      run(Gemm{.a = b.read(DType::kF32), .b = a.read(DType::kF32), .c = w, .beta = 1});
      return w;
    });
  }

  Checkpoint input_;
  OlmoeConfig config_;
  std::vector<LayerShape> shapes_;
  StreamedTensors tensors_;
};

}  // namespace

ExportReport export_to_hugging_face(const ExportJob& job) {
  OutputDirectory output(job.output, job.force, {job.model});
  const Densifier densifier(job);
  write_file_atomically(output.path() / "config.json", config_to_json(densifier.stock_config(job)));
  SafetensorsWriter writer(output.path(), densifier.tensors().specs(), {.max_shard_bytes = job.max_shard_bytes});
  densifier.tensors().write(writer, [&](size_t done, size_t all) {
    if (job.say && all >= 1000 && done % (all / 10) == 0) job.say(fmt::format("{} of {} tensors", done, all));
  });
  copy_side_files(job.model, output.path());
  output.commit();
  return {.compressed_bytes = densifier.input_bytes(), .written_bytes = densifier.tensors().total_bytes()};
}

}  // namespace lightmoe
