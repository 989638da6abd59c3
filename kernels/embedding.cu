#include "kernels/embedding.h"

#include "kernels/device/rows.h"
#include "kernels/device/stable_order.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kGradientThreads = 64;  // few columns a block, so that a frequent token's rows are read by many blocks

// NOTE: the host does not see the ids; one outside the vocabulary stops the kernel.
DEVICE_FN int64_t checked(int id, int vocabulary) {
  if (id < 0 || id >= vocabulary) trap();
  return id;
}

template <class In, class Out>
__global__ void __launch_bounds__(kMaxRowThreads)
    embedding_kernel(const int* ids, const In* table, Out* y, int vocabulary, int n, bool aligned) {
  constexpr int kV = kVectorOf<In, Out>;
  const In* from = table + checked(ids[blockIdx.x], vocabulary) * n;
  Out* to = y + static_cast<int64_t>(blockIdx.x) * n;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    store_floats(to, i, n, aligned, load_floats<kV>(from, i, n, aligned));
  }
}

// The block at the first row of an id, in the order of ids, adds up all rows of this id.
template <class In, class Out>
__global__ void __launch_bounds__(kGradientThreads)
    embedding_gradient_kernel(const int* ids, const int* order, const In* dy, Out* dtable, int rows, int vocabulary,
                              int n, bool aligned) {
  constexpr int kV = kVectorOf<In, Out>;
  int at = static_cast<int>(blockIdx.x);
  const int id = ids[order[at]];
  if (at > 0 && ids[order[at - 1]] == id) return;
  const int i = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x) * kV;
  if (i >= n) return;
  Out* to = dtable + checked(id, vocabulary) * n;
  auto sum = load_floats<kV>(to, i, n, aligned);
  const auto row = [&](int64_t j) { return ids[order[j]] == id ? order[j] : -1; };
  const auto weight = [](int64_t) { return 1.0f; };
  for (; at < rows && ids[order[at]] == id; at += kAhead) {
    add_rows(sum, dy, at, std::min(at + kAhead, rows), row, weight, i, n, aligned);
  }
  store_floats(to, i, n, aligned, sum);
}

template <class In, class Out>
void forward(const Embedding& op) {
  const int n = static_cast<int>(op.table.dim(1));
  const In* table = op.table.data<In>();
  Out* y = op.y.data<Out>();
  launch<embedding_kernel<In, Out>>(
      {.blocks = {uint32_t(op.ids.dim(0))}, .threads = {row_threads(n, kVectorOf<In, Out>)}}, op.ids.data<int32_t>(),
      table, y, static_cast<int>(op.table.dim(0)), n, aligned_rows(n, table, y));
}

template <class In, class Out>
void backward(const EmbeddingBackward& op) {
  const int rows = static_cast<int>(op.ids.dim(0)), n = static_cast<int>(op.dtable.dim(1));
  const Tensor order = stable_order(op.ids, op.dtable.dim(0));
  const In* dy = op.dy.data<In>();
  Out* dtable = op.dtable.data<Out>();
  const auto slices = uint32_t(ceil_div(n, kGradientThreads * kVectorOf<In, Out>));
  launch<embedding_gradient_kernel<In, Out>>({.blocks = {uint32_t(rows), slices}, .threads = {kGradientThreads}},
                                             op.ids.data<int32_t>(), order.data<int32_t>(), dy, dtable, rows,
                                             static_cast<int>(op.dtable.dim(0)), n, aligned_rows(n, dy, dtable));
}

// out has in's type or is f32.
template <class F>
void visit_widening(const char* op, DType in, DType out, F&& f) {
  visit_device_floating(op, in, [&]<class In>() {
    if (out == in) return f.template operator()<In, In>();
    if (out == DType::kF32) return f.template operator()<In, float>();
    unsupported_dtype(op, out);
  });
}

void forward_device(const Embedding& op) {
  visit_widening("embedding", op.table.dtype(), op.y.dtype(), [&]<class In, class Out>() { forward<In, Out>(op); });
}
void backward_device(const EmbeddingBackward& op) {
  visit_widening("embedding_backward", op.dy.dtype(), op.dtable.dtype(),
                 [&]<class In, class Out>() { backward<In, Out>(op); });
}
const RegisterKernel<Embedding> register_forward{kDevice, &forward_device};
const RegisterKernel<EmbeddingBackward> register_backward{kDevice, &backward_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
