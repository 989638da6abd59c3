#pragma once
// The output of `compress` and `export` as a list of tensors, each with the recipe that makes it from the input's files piece by
// piece. The list is known before any data (the safetensors header needs it), the data flow in its order.

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "compress/weights.h"
#include "model/parameter_table.h"

namespace lightmoe {

struct WeightedMatrix {
  MatrixPlace place;
  double weight = 1;
};

class StreamedTensors {
 public:
  using Sink = std::function<void(const void* bytes, size_t count)>;
  using Recipe = std::function<void(const Sink&)>;

  // dtype: of the output; absent: as the source.
  StreamedTensors(std::optional<DType> dtype, bool allow_nonfinite)
      : dtype_(dtype), allow_nonfinite_(allow_nonfinite) {}
  StreamedTensors(const StreamedTensors&) = delete;  // recipes point to it
  StreamedTensors& operator=(const StreamedTensors&) = delete;

  void add_copy(const std::string& name, const std::vector<int64_t>& shape, const MatrixPlace& place);
  // sum_i weight_i W_i in f64, rounded once; the first source's dtype unless told.
  void add_mix(const std::string& name, const std::vector<int64_t>& shape, const std::vector<WeightedMatrix>& sources);
  // Computed whole when its turn comes.
  void add_computed(const std::string& name, const std::vector<int64_t>& shape, DType source_dtype,
                    std::function<Tensor()> compute);

  DType output_dtype(DType source) const { return dtype_.value_or(source); }
  const std::vector<TensorSpec>& specs() const { return specs_; }
  int64_t total_bytes() const;
  // Runs every recipe. Returns the number of non-finite values copied (0 unless they are allowed).
  int64_t write(SafetensorsWriter& writer, const std::function<void(size_t done, size_t all)>& progress) const;

  // The most tensor memory a copy or a mix takes.
  static int64_t working_bytes();

 private:
  void add(const std::string& name, const std::vector<int64_t>& shape, DType dtype, Recipe recipe);
  std::optional<DType> dtype_;
  bool allow_nonfinite_;
  std::vector<TensorSpec> specs_;
  std::vector<Recipe> recipes_;
  mutable int64_t non_finite_ = 0;
};

// The mix itself, whole: sum_i weight_i W_i as f64 rounded to `dtype`. For adapters that need the base.
Tensor mixed(const std::vector<WeightedMatrix>& sources, DType dtype);

}  // namespace lightmoe
