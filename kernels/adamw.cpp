#include "kernels/adamw.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

// All tensors are cut into chunks and the threads share the chunks, so that many small tensors cost as much as one large one.
constexpr int64_t kChunk = 16384;

struct Chunk {
  size_t tensor;
  int64_t begin, end;
};

template <class TensorAt>
std::vector<Chunk> cut(size_t count, const TensorAt& tensor_at) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < count; ++i) {
    const int64_t elements = tensor_at(i).defined() ? tensor_at(i).numel() : 0;
    for (int64_t begin = 0; begin < elements; begin += kChunk) {
      chunks.push_back({i, begin, std::min(elements, begin + kChunk)});
    }
  }
  return chunks;
}

template <class W, class G>
void update(const AdamW& op, const Chunk& chunk) {
  using C = compute_t<W>;
  const AdamWTensor& tensor = op.tensors[chunk.tensor];
  W* w = tensor.w.data<W>();
  const G* grad = tensor.grad.data<G>();
  C *m = tensor.m.data<C>(), *v = tensor.v.data<C>();
  const double step = static_cast<double>(op.step);
  const C beta1 = static_cast<C>(op.beta1), beta2 = static_cast<C>(op.beta2), eps = static_cast<C>(op.eps);
  const C rest1 = static_cast<C>(1 - op.beta1), rest2 = static_cast<C>(1 - op.beta2);
  const C grad_scale = static_cast<C>(op.grad_scale), keep = static_cast<C>(1 - tensor.lr * tensor.weight_decay);
  const C rate = static_cast<C>(tensor.lr / (1 - std::pow(op.beta1, step)));
  const C root_correction = static_cast<C>(1 / std::sqrt(1 - std::pow(op.beta2, step)));
#pragma omp simd
  for (int64_t i = chunk.begin; i < chunk.end; ++i) {
    const C g = grad_scale * static_cast<C>(load(grad, i));
    const C mean = beta1 * m[i] + rest1 * g;
    const C square = beta2 * v[i] + rest2 * g * g;
    m[i] = mean;
    v[i] = square;
    store(w, i, keep * load(w, i) - rate * mean / (std::sqrt(square) * root_correction + eps));
  }
}

void adamw_cpu(const AdamW& op) {
  const std::vector<Chunk> chunks = cut(op.tensors.size(), [&](size_t i) { return op.tensors[i].w; });
  parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[static_cast<size_t>(c)];
      const AdamWTensor& tensor = op.tensors[chunk.tensor];
      visit_floating("adamw", tensor.w.dtype(), [&]<class W>() {
        if (tensor.grad.dtype() == tensor.w.dtype())
          update<W, W>(op, chunk);
        else
          update<W, float>(op, chunk);
      });
    }
  });
}
const RegisterKernel<AdamW> register_adamw{DeviceKind::kCpu, &adamw_cpu};

template <class T>
double sum_of_squares(const T* values, int64_t count) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i)
    sum += static_cast<double>(load(values, i)) * static_cast<double>(load(values, i));
  return sum;
}

void gradient_norm_cpu(const GradientNorm& op) {
  const std::vector<Tensor>& gradients = op.gradients;
  const std::vector<Chunk> chunks = cut(gradients.size(), [&](size_t i) { return gradients[i]; });
  std::vector<double> sums(chunks.size());
  parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const Chunk& chunk = chunks[static_cast<size_t>(c)];
      const Tensor& gradient = gradients[chunk.tensor];
      visit_floating("gradient_norm", gradient.dtype(), [&]<class T>() {
        sums[static_cast<size_t>(c)] = sum_of_squares(gradient.data<T>() + chunk.begin, chunk.end - chunk.begin);
      });
    }
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  op.norm.data<double>()[0] = std::sqrt(total);
}
const RegisterKernel<GradientNorm> register_norm{DeviceKind::kCpu, &gradient_norm_cpu};

}  // namespace

void run(const AdamW& op) {
  require(op.step >= 1, "adamw: step is {}, counts from 1", op.step);
  if (op.tensors.empty()) return;
  for (const AdamWTensor& t : op.tensors) {
    const DType accumulator = accumulator_of(t.w.dtype());
    const bool f32_gradient = t.w.dtype() == DType::kBF16 && t.grad.dtype() == DType::kF32;
    require_tensor(t.grad, "adamw", "grad", t.w.shape(), f32_gradient ? DType::kF32 : t.w.dtype());
    require_tensor(t.m, "adamw", "m", t.w.shape(), accumulator);
    require_tensor(t.v, "adamw", "v", t.w.shape(), accumulator);
  }
  dispatch(op, op.tensors[0].w.device(), "adamw");
}

void run(const GradientNorm& op) {
  require_tensor(op.norm, "gradient_norm", "norm", {1}, DType::kF64);
  dispatch(op, op.norm.device(), "gradient_norm");
}

double gradient_norm(const std::vector<Tensor>& gradients) {
  const auto first = std::find_if(gradients.begin(), gradients.end(), [](const Tensor& t) { return t.defined(); });
  if (first == gradients.end()) return 0;
  const Tensor norm = Tensor::empty({1}, DType::kF64, first->device());
  run(GradientNorm{.gradients = gradients, .norm = norm});
  return norm.on(DeviceKind::kCpu).data<double>()[0];
}

}  // namespace lightmoe
