#include "kernels/adamw.h"

#include "bench/op_bench.h"
#include "tests/cases/adamw.h"

namespace lightmoe {
namespace {

void add(const std::vector<int64_t>& sizes, DType dtype) {
  int64_t total = 0;
  for (const int64_t size : sizes) total += size;
  const std::string suffix = fmt::format("/{}/{}tensors{}", name_of(dtype), sizes.size(), total);
  bench::add("op/adamw" + suffix, [=] {
    AdamW op;
    double bytes = 0;
    for (const int64_t size : sizes) {
      op.tensors.push_back({.w = bench::random({size}, dtype),
                            .grad = bench::random({size}, dtype),
                            .m = Tensor::zeros({size}, DType::kF32),
                            .v = Tensor::zeros({size}, DType::kF32),
                            .lr = 1e-4,
                            .weight_decay = 0.1});
      const AdamWTensor& t = op.tensors.back();
      bytes += bench::bytes_of({t.w, t.w, t.grad, t.m, t.m, t.v, t.v});
    }
    return bench::Work{.bytes = bytes, .run = [=] { run(op); }};
  });
  bench::add("op/gradient_norm" + suffix, [=] {
    std::vector<Tensor> gradients;
    double bytes = 0;
    for (const int64_t size : sizes) {
      gradients.push_back(bench::random({size}, dtype));
      bytes += bench::bytes_of({gradients.back()});
    }
    return bench::Work{.bytes = bytes, .run = [=] { benchmark::DoNotOptimize(gradient_norm(gradients)); }};
  });
}

const bool registered = bench::registered([] {
  for (const auto& sizes : cases::adamw) add(sizes, DType::kF32);
  std::vector<int64_t> experts(48, 2 * 1024 * 2048 / 4);  // many middling tensors: 50 M parameters
  experts.push_back(2048);
  for (const DType dtype : bench::kStorageTypes) add(experts, dtype);
});

}  // namespace
}  // namespace lightmoe
