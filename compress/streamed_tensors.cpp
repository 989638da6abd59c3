#include "compress/streamed_tensors.h"

#include <algorithm>

namespace lightmoe {
namespace {

constexpr int64_t kPieceElements = int64_t{1} << 19;

int64_t rows_per_piece(int64_t columns) { return std::max<int64_t>(1, kPieceElements / std::max<int64_t>(1, columns)); }

// Calls f(first_row, rows) over the whole matrix.
template <class F>
void for_pieces(int64_t rows, int64_t columns, F&& f) {
  const int64_t step = rows_per_piece(columns);
  for (int64_t first = 0; first < rows; first += step) f(first, std::min(step, rows - first));
}

// out [n, columns] f64 = sum_i weight_i rows [first, first + n) of source i.
void mix_rows(const std::vector<WeightedMatrix>& sources, int64_t first, const Tensor& out,
              std::vector<FiniteCheck>* scans) {
  const Tensor rows = Tensor::empty(out.shape(), DType::kF64);
  double* sum = out.data<double>();
  std::fill(sum, sum + out.numel(), 0.0);
  for (size_t s = 0; s < sources.size(); ++s) {
    sources[s].place.read_rows(first, rows);
    if (scans != nullptr) (*scans)[s].scan(rows.raw(), DType::kF64, rows.numel());
    const double weight = sources[s].weight, *value = rows.data<double>();
    for (int64_t i = 0; i < out.numel(); ++i) sum[i] += weight * value[i];
  }
}

void emit(const Tensor& rows, DType dtype, const StreamedTensors::Sink& sink) {
  if (rows.dtype() == dtype) return sink(rows.raw(), static_cast<size_t>(rows.bytes()));
  const Tensor converted = rows.to(dtype);
  sink(converted.raw(), static_cast<size_t>(converted.bytes()));
}

}  // namespace

void StreamedTensors::add(const std::string& name, const std::vector<int64_t>& shape, DType dtype, Recipe recipe) {
  specs_.push_back({.name = name, .dtype = dtype, .shape = shape});
  recipes_.push_back(std::move(recipe));
}

void StreamedTensors::add_copy(const std::string& name, const std::vector<int64_t>& shape, const MatrixPlace& place) {
  const DType dtype = output_dtype(place.dtype);
  add(name, shape, dtype, [this, place, dtype](const Sink& sink) {
    FiniteCheck scan(place, allow_nonfinite_);
    for_pieces(place.rows, place.columns, [&](int64_t first, int64_t count) {
      const Tensor rows = Tensor::empty({count, place.columns}, place.dtype);
      place.read_rows(first, rows);
      scan.scan(rows.raw(), place.dtype, rows.numel());
      emit(rows, dtype, sink);
    });
    non_finite_ += scan.finish();
  });
}

void StreamedTensors::add_mix(const std::string& name, const std::vector<int64_t>& shape,
                              const std::vector<WeightedMatrix>& sources) {
  require(!sources.empty(), "add_mix: {} has no sources", name);
  const DType dtype = output_dtype(sources.front().place.dtype);
  add(name, shape, dtype, [this, sources, dtype](const Sink& sink) {
    std::vector<FiniteCheck> scans;
    for (const WeightedMatrix& source : sources) scans.emplace_back(source.place, allow_nonfinite_);
    const MatrixPlace& like = sources.front().place;
    for_pieces(like.rows, like.columns, [&](int64_t first, int64_t count) {
      const Tensor sum = Tensor::empty({count, like.columns}, DType::kF64);
      mix_rows(sources, first, sum, &scans);
      emit(sum, dtype, sink);
    });
    for (const FiniteCheck& scan : scans) non_finite_ += scan.finish();
  });
}

void StreamedTensors::add_computed(const std::string& name, const std::vector<int64_t>& shape, DType source_dtype,
                                   std::function<Tensor()> compute) {
  const DType dtype = output_dtype(source_dtype);
  add(name, shape, dtype, [compute = std::move(compute), dtype](const Sink& sink) { emit(compute(), dtype, sink); });
}

int64_t StreamedTensors::total_bytes() const {
  int64_t sum = 0;
  for (const TensorSpec& spec : specs_) {
    int64_t bytes = static_cast<int64_t>(size_of(spec.dtype));
    for (const int64_t dim : spec.shape) bytes *= dim;
    sum += bytes;
  }
  return sum;
}

int64_t StreamedTensors::write(SafetensorsWriter& writer, const std::function<void(size_t, size_t)>& progress) const {
  non_finite_ = 0;
  const Sink sink = [&](const void* bytes, size_t count) { writer.append_raw(bytes, count); };
  for (size_t i = 0; i < recipes_.size(); ++i) {
    recipes_[i](sink);
    if (progress) progress(i + 1, recipes_.size());
  }
  writer.finish();
  return non_finite_;
}

int64_t StreamedTensors::working_bytes() { return kPieceElements * (8 + 8 + 8); }

Tensor mixed(const std::vector<WeightedMatrix>& sources, DType dtype) {
  const MatrixPlace& like = sources.front().place;
  const Tensor out = Tensor::empty({like.rows, like.columns}, dtype);
  for_pieces(like.rows, like.columns, [&](int64_t first, int64_t count) {
    const Tensor sum = Tensor::empty({count, like.columns}, DType::kF64);
    mix_rows(sources, first, sum, nullptr);
    out.slice(first, first + count).copy_from(sum);
  });
  return out;
}

}  // namespace lightmoe
