#include "kernels/distillation.h"

#include <cmath>

#include "kernels/device/reduce.h"
#include "kernels/device/rows.h"
#include "kernels/labels.h"

namespace lightmoe::LIGHTMOE_DEVICE {
namespace {

constexpr int kThreads = kMaxRowThreads;
constexpr int kV = kVector<float>;
constexpr int64_t kDefaultChunkBytes = 128 << 20;  // of logits, twice
constexpr int64_t kChunkRowsStep = 128;            // rows of a tile of a product

struct RowShared {
  BlockScratch<float> maxima;
  BlockScratch<double> sums;
};

DEVICE_FN float largest_of(const float* row, int n, bool aligned, RowShared& shared) {
  float largest = -INFINITY;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    const auto v = load_floats<kV>(row, i, n, aligned);
#pragma unroll
    for (int k = 0; k < kV; ++k) largest = i + k < n ? std::max(largest, v[k]) : largest;
  }
  return block_max(largest, -INFINITY, shared.maxima);
}

// sum of exp((logit - shift) * sharpness): f32 within four logits, f64 across.
DEVICE_FN double sum_of_exponentials(const float* row, int n, bool aligned, float shift, float sharpness,
                                     RowShared& shared) {
  double sum = 0;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    const auto v = load_floats<kV>(row, i, n, aligned);
    float here = 0;
#pragma unroll
    for (int k = 0; k < kV; ++k) here += i + k < n ? fast_exp((v[k] - shift) * sharpness) : 0.0f;
    sum += static_cast<double>(here);
  }
  return block_sum(sum, shared.sums);
}

struct Loss {
  double weight, temperature, scale;
};

// losses[row] = {CE, KL}, and where the gradient is wanted it takes the place of the student's logits; zeros for ignored rows.
__global__ void __launch_bounds__(kThreads)
    distillation_kernel(float* student, const float* teacher, const int* labels, double* losses, int n, Loss loss,
                        bool gradient, bool aligned) {
  auto& shared = shared_memory<RowShared>();
  float* z = student + static_cast<int64_t>(blockIdx.x) * n;
  const float* t = teacher + static_cast<int64_t>(blockIdx.x) * n;
  double* out = losses + 2 * static_cast<int64_t>(blockIdx.x);
  const int label = labels[blockIdx.x];
  if (label == kIgnoredLabel) {
    if (threadIdx.x == 0) out[0] = out[1] = 0;
    for (int i = first_column<kV>(); gradient && i < n; i += column_step<kV>())
      store_floats(z, i, n, aligned, Floats<kV>{});
    return;
  }
  if (label < 0 || label >= n) trap();
  const double label_logit = static_cast<double>(z[label]);
  const float sharpness = static_cast<float>(1 / loss.temperature);
  const float z_top = largest_of(z, n, aligned, shared), t_top = largest_of(t, n, aligned, shared);
  const double z_sum = sum_of_exponentials(z, n, aligned, z_top, 1.0f, shared);
  const double soft_sum = sum_of_exponentials(z, n, aligned, z_top, sharpness, shared);
  const double t_sum = sum_of_exponentials(t, n, aligned, t_top, sharpness, shared);
  // log q - log p = (t - z) / T - gap
  const double gap =
      (static_cast<double>(t_top) - static_cast<double>(z_top)) / loss.temperature + log(t_sum / soft_sum);
  const float hard = static_cast<float>(loss.scale * (1 - loss.weight));
  const float towards = static_cast<float>(loss.scale * loss.weight * loss.temperature);
  const float of_z = static_cast<float>(1 / z_sum), of_soft = static_cast<float>(1 / soft_sum),
              of_t = static_cast<float>(1 / t_sum);
  double kl = 0;
  for (int i = first_column<kV>(); i < n; i += column_step<kV>()) {
    const auto zs = load_floats<kV>(z, i, n, aligned), ts = load_floats<kV>(t, i, n, aligned);
    Floats<kV> d{};
#pragma unroll
    for (int k = 0; k < kV; ++k) {
      if (i + k >= n) continue;
      const float q = fast_exp((ts[k] - t_top) * sharpness) * of_t;
      const float soft = fast_exp((zs[k] - z_top) * sharpness) * of_soft;
      const float p = fast_exp(zs[k] - z_top) * of_z - (i + k == label ? 1.0f : 0.0f);
      kl +=
          static_cast<double>(q) * ((static_cast<double>(ts[k]) - static_cast<double>(zs[k])) / loss.temperature - gap);
      d[k] = hard * p + towards * (soft - q);
    }
    if (gradient) store_floats(z, i, n, aligned, d);
  }
  kl = block_sum(kl, shared.sums);
  if (threadIdx.x != 0) return;
  out[0] = static_cast<double>(z_top) + log(z_sum) - label_logit;
  out[1] = kl;
}

// sums[blockIdx.x] = the sum of that column of losses [rows,2].
__global__ void __launch_bounds__(kThreads) add_losses_kernel(const double* losses, double* sums, int rows) {
  auto& scratch = shared_memory<BlockScratch<double>>();
  double sum = 0;
  for (int t = static_cast<int>(threadIdx.x); t < rows; t += kThreads)
    sum += losses[2 * static_cast<int64_t>(t) + blockIdx.x];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

void distillation_device(const LmHeadDistillation& op) {
  const MemoryScope scratch(MemoryCategory::kScratch);
  const int64_t rows = op.x.dim(0), n = op.w.dim(0);
  const int64_t steps = std::max(kDefaultChunkBytes / (4 * n) / kChunkRowsStep, int64_t{1});
  const int64_t chunk = std::min(op.chunk_rows > 0 ? op.chunk_rows : steps * kChunkRowsStep, rows);
  const Tensor student = Tensor::empty({chunk, n}, DType::kF32, kDevice),
               teacher = Tensor::empty({chunk, n}, DType::kF32, kDevice),
               losses = Tensor::empty({rows, 2}, DType::kF64, kDevice);
  const bool aligned = aligned_rows(n, student.data<float>(), teacher.data<float>());
  for (int64_t begin = 0; begin < rows; begin += chunk) {
    const int64_t end = std::min(begin + chunk, rows);
    const Tensor z = student.slice(0, end - begin), t = teacher.slice(0, end - begin);
    run(Gemm{.a = op.x.slice(begin, end), .b = op.w, .c = z, .trans_b = true, .compute = op.compute});
    run(Gemm{.a = op.teacher.slice(begin, end), .b = op.teacher_w, .c = t, .trans_b = true, .compute = op.compute});
    launch<distillation_kernel>(
        {.blocks = {uint32_t(end - begin)}, .threads = {row_threads(n, kV)}, .shared_bytes = sizeof(RowShared)},
        z.data<float>(), t.data<float>(), op.labels.data<int32_t>() + begin, losses.data<double>() + 2 * begin,
        static_cast<int>(n), Loss{op.weight, op.temperature, op.scale}, op.dx.defined(), aligned);
    if (op.dx.defined()) run(Gemm{.a = z, .b = op.w, .c = op.dx.slice(begin, end), .compute = op.compute});
  }
  launch<add_losses_kernel>({.blocks = {2}, .threads = {kThreads}, .shared_bytes = sizeof(BlockScratch<double>)},
                            losses.data<double>(), op.losses.data<double>(), static_cast<int>(rows));
}

const RegisterKernel<LmHeadDistillation> register_kernel{kDevice, &distillation_device};

}  // namespace
}  // namespace lightmoe::LIGHTMOE_DEVICE
