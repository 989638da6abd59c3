// The ops on a vocabulary's logits: LM head with cross-entropy, and with a teacher. FLOPs are those of the products.
#include "bench/op_bench.h"
#include "kernels/cross_entropy.h"
#include "kernels/distillation.h"

namespace lightmoe {
namespace {

Tensor labels_of(int64_t rows, int64_t vocabulary) { return bench::random_ids({rows}, vocabulary); }

void add(int64_t rows, int64_t width, int64_t vocabulary, DType dtype) {
  const std::string suffix = fmt::format("/{}/{}x{}x{}", name_of(dtype), rows, width, vocabulary);
  const GemmCompute compute = dtype == DType::kBF16 ? GemmCompute::kBF16 : GemmCompute::kF32;
  const double product = 2.0 * static_cast<double>(rows) * static_cast<double>(width) * static_cast<double>(vocabulary);
  bench::add("op/lm_head_cross_entropy" + suffix, [=] {
    const LmHeadCrossEntropy op{.x = bench::random({rows, width}, dtype),
                                .w = bench::random({vocabulary, width}, dtype),
                                .labels = labels_of(rows, vocabulary),
                                .compute = compute,
                                .loss = Tensor::empty({1}, DType::kF64),
                                .dx = Tensor::empty({rows, width}, dtype),
                                .dw = Tensor::zeros({vocabulary, width}, DType::kF32)};
    return bench::Work{.flops = 3 * product, .run = [=] { run(op); }};
  });
  bench::add("op/lm_head_distillation" + suffix, [=] {
    const LmHeadDistillation op{.x = bench::random({rows, width}, dtype),
                                .w = bench::random({vocabulary, width}, dtype),
                                .teacher = bench::random({rows, width}, dtype),
                                .teacher_w = bench::random({vocabulary, width}, dtype),
                                .labels = labels_of(rows, vocabulary),
                                .temperature = 2,
                                .compute = compute,
                                .losses = Tensor::empty({2}, DType::kF64),
                                .dx = Tensor::empty({rows, width}, dtype)};
    return bench::Work{.flops = 3 * product, .run = [=] { run(op); }};
  });
}

const bool registered = bench::registered([] {
  add(33, 16, 257, DType::kF32);
  for (const DType dtype : bench::kStorageTypes) add(256, 2048, 50304, dtype);
  if (bench::is_for_gpu()) add(16384, 2048, 50304, DType::kBF16);
});

}  // namespace
}  // namespace lightmoe
