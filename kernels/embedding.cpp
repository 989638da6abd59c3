#include "kernels/embedding.h"

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrainElements = 1 << 16;

int64_t grain(int64_t cost) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, cost)); }

// Of f32/bf16/f64, out may be the type of in, or f32 where in is bf16.
template <class F>
void visit_widening(const char* op, DType in, DType out, F&& f) {
  visit_floating(op, in, [&]<class In>() {
    if (out == in) return f.template operator()<In, In>();
    if (in == DType::kBF16 && out == DType::kF32) return f.template operator()<In, float>();
    unsupported_dtype(op, out);
  });
}

template <class In, class Out>
void forward(const Embedding& op) {
  const int64_t width = op.table.dim(1);
  const int32_t* ids = op.ids.data<int32_t>();
  const In* table = op.table.data<In>();
  Out* y = op.y.data<Out>();
  parallel_for(0, op.ids.dim(0), grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const In* from = table + ids[t] * width;
      for (int64_t i = 0; i < width; ++i) {
        if constexpr (std::is_same_v<In, Out>)
          y[t * width + i] = from[i];
        else
          y[t * width + i] = static_cast<Out>(from[i]);
      }
    }
  });
}

// Threads own columns, so that duplicates add up in order of t and one frequent id does not unbalance them.
template <class In, class Out>
void backward(const EmbeddingBackward& op) {
  const int64_t rows = op.ids.dim(0), width = op.dtable.dim(1);
  const int32_t* ids = op.ids.data<int32_t>();
  const In* dy = op.dy.data<In>();
  Out* dtable = op.dtable.data<Out>();
  parallel_for(0, width, std::max<int64_t>(64, grain(rows)), [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < rows; ++t) {
      const In* from = dy + t * width;
      Out* to = dtable + ids[t] * width;
      for (int64_t i = begin; i < end; ++i) store(to, i, load(to, i) + static_cast<compute_t<Out>>(load(from, i)));
    }
  });
}

void forward_cpu(const Embedding& op) {
  visit_widening("embedding", op.table.dtype(), op.y.dtype(), [&]<class In, class Out>() { forward<In, Out>(op); });
}
void backward_cpu(const EmbeddingBackward& op) {
  visit_widening("embedding_backward", op.dy.dtype(), op.dtable.dtype(),
                 [&]<class In, class Out>() { backward<In, Out>(op); });
}
const RegisterKernel<Embedding> register_forward{DeviceKind::kCpu, &forward_cpu};
const RegisterKernel<EmbeddingBackward> register_backward{DeviceKind::kCpu, &backward_cpu};

void check_ids(const Tensor& ids, int64_t vocabulary) {
  if (ids.device() != DeviceKind::kCpu) return;
  const int32_t* values = ids.data<int32_t>();
  for (int64_t t = 0; t < ids.numel(); ++t) {
    check(values[t] >= 0 && values[t] < vocabulary, ErrorKind::kInput,
          "embedding: token id {} at position {} is outside the vocabulary of {}; is this tokenizer the model's?",
          values[t], t, vocabulary);
  }
}

}  // namespace

void run(const Embedding& op) {
  require(op.table.rank() == 2, "embedding: table is {}, expected [V, D]", op.table.shape());
  require(op.ids.rank() == 1, "embedding: ids is {}, expected [T]", op.ids.shape());
  require_tensor(op.ids, "embedding", "ids", op.ids.shape(), DType::kI32);
  require_tensor(op.y, "embedding", "y", {op.ids.dim(0), op.table.dim(1)}, op.y.dtype());
  check_ids(op.ids, op.table.dim(0));
  dispatch(op, op.table.device(), "embedding");
}

void run(const EmbeddingBackward& op) {
  require(op.dtable.rank() == 2, "embedding_backward: dtable is {}, expected [V, D]", op.dtable.shape());
  require(op.ids.rank() == 1, "embedding_backward: ids is {}, expected [T]", op.ids.shape());
  require_tensor(op.ids, "embedding_backward", "ids", op.ids.shape(), DType::kI32);
  require_tensor(op.dy, "embedding_backward", "dy", {op.ids.dim(0), op.dtable.dim(1)}, op.dy.dtype());
  check_ids(op.ids, op.dtable.dim(0));
  dispatch(op, op.dtable.device(), "embedding_backward");
}

}  // namespace lightmoe
