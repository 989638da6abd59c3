#pragma once
// Matrices of a checkpoint that are read piece by piece, so that a model larger than memory can be compressed or exported.

#include <cstdint>
#include <string>
#include <vector>

#include "loaders/safetensors.h"
#include "model/config.h"
#include "model/slot_table.h"

namespace lightmoe {

// A [rows, columns] matrix somewhere in a file: a tensor of its own, or a part of a fused one.
struct MatrixPlace {
  const SafetensorsFile* file = nullptr;
  const TensorInfo* info = nullptr;
  uint64_t offset = 0;  // bytes from the tensor's start
  int64_t rows = 0, columns = 0;
  DType dtype = DType::kF32;

  uint64_t bytes() const { return static_cast<uint64_t>(rows * columns) * size_of(dtype); }
  void read_rows(int64_t first, const Tensor& out) const;  // out [n, columns] of any floating dtype
  Tensor read(DType as) const;
};
// A whole tensor as rows (a vector is one row). Error(kInput) when the shape is not the expected one or not floating.
MatrixPlace place_of(const Checkpoint& checkpoint, const std::string& name, const std::vector<int64_t>& shape);

// Shapes of one expert's matrices: gate and up [F,D], down [D,F].
std::vector<int64_t> expert_matrix_shape(const OlmoeConfig& config, ExpertMatrix matrix);

// The original experts of a stock checkpoint, stored one by one or fused (mlp.experts.gate_up_proj [E,2F,D], .down_proj [E,D,F]).
class ExpertSource {
 public:
  ExpertSource(const Checkpoint& checkpoint, const OlmoeConfig& config);
  MatrixPlace place(int64_t layer, int64_t expert, ExpertMatrix matrix) const;
  MatrixPlace router(int64_t layer) const;                   // [E,D]
  std::vector<std::string> tensors_of(int64_t layer) const;  // names in the file
  bool fused() const { return fused_; }

 private:
  const Checkpoint& checkpoint_;
  OlmoeConfig config_;
  bool fused_ = false;
};

// Counts non-finite values of one tensor as its pieces pass.
class FiniteCheck {
 public:
  FiniteCheck(const MatrixPlace& place, bool allowed) : place_(place), allowed_(allowed) {}
  void scan(const void* data, DType dtype, int64_t count);
  // Error(kNumeric) with count and first index, unless allowed. Returns the count.
  int64_t finish() const;

 private:
  MatrixPlace place_;
  bool allowed_;
  int64_t seen_ = 0, bad_ = 0, first_ = -1;
};

// XXH3-128 over names, shapes, dtypes and contents of all tensors, the same whether sharded or not. Of tensors over 64 KiB sixteen
// evenly spaced blocks of 4 KiB are read: it tells models apart, it does not prove them equal.
std::string model_fingerprint(const Checkpoint& checkpoint);
// XXH3-128 of bytes, 32 hex digits.
std::string hash_bytes(const void* data, size_t bytes);

}  // namespace lightmoe
