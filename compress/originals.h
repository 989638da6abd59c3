#pragma once
// What recovery keeps of the model that was compressed (compress/recover.h): the experts that fade, and the whole as a teacher.

#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

#include "compress/record.h"
#include "compress/weights.h"
#include "model/olmoe.h"

namespace lightmoe {

struct AdapterPart {
  ExpertMatrix matrix;
  Tensor a, b;  // views of the adapter's parameters
};
// The three factor pairs of an adapter, gate, up, down; A of gate and up are rows of one parameter.
std::vector<AdapterPart> parts_of(const Adapter& adapter);
// The matrix as rows of an expert's parameters.
Tensor matrix_of(const Expert& expert, ExpertMatrix matrix);
bool is_zero(const Tensor& t);
// w += scale B A, computed in f32 and rounded once to w's type.
void add_product(const Tensor& w, const Tensor& b, const Tensor& a, double scale);
Adapter make_adapter(int64_t hidden, int64_t width, int64_t rank);  // f32, not initialised

// The experts that fade, from the base model's files. Adapters that start with an effect keep a copy of their start until the
// originals are loaded, which happens at the first step that needs them (a run resumed after the annealing never does).
class Originals {
 public:
  // Error(kInput) when `base` is not the model that was compressed.
  Originals(const std::filesystem::path& base, const Olmoe& model, const CompressionRecord& record, DType dtype);
  void load(Olmoe& model);
  // The original model out of the student's frozen parts and the originals in it; no weight is copied. Every slot of the student must be
  // an expert of its own or fade.
  std::unique_ptr<Olmoe> teacher(const Olmoe& student) const;

  bool loaded = false;

 private:
  struct Start {
    int32_t slot = -1;
    int32_t align_to = -1;           // whose hidden units' order it takes, -1: its own
    std::vector<AdapterPart> parts;  // with B0 other than zero
  };
  AnnealedSlot load_slot(int64_t layer, const Start& start) const;
  Adapter frozen_adapter(const Start& start) const;  // B0 A0, which the originals in memory lack

  Checkpoint checkpoint_;
  OlmoeConfig config_;
  ExpertSource source_;
  DType dtype_;
  std::vector<std::vector<Start>> starts_;
  std::vector<std::vector<std::pair<int32_t, Adapter>>> start_adapters_;  // per layer: slot, what it starts with
};

}  // namespace lightmoe
