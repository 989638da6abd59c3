#include "kernels/rms_norm.h"

#include "bench/op_bench.h"
#include "tests/cases/rms_norm.h"

namespace lightmoe {
namespace {

void add(int64_t rows, int64_t width, DType dtype) {
  const std::string suffix = fmt::format("/{}/{}x{}", name_of(dtype), rows, width);
  bench::add("op/rms_norm" + suffix, [=] {
    const Tensor x = bench::random({rows, width}, dtype), w = bench::random({width}, dtype), y = x.clone();
    const Tensor rstd = Tensor::empty({rows}, DType::kF32);
    return bench::Work{.bytes = bench::bytes_of({x, y}),
                       .run = [=] { run(RmsNorm{.x = x, .w = w, .y = y, .rstd = rstd}); }};
  });
  bench::add("op/add_rms_norm" + suffix, [=] {
    const Tensor x = bench::random({rows, width}, dtype), w = bench::random({width}, dtype), residual = x.clone();
    const Tensor y = x.clone(), sum = x.clone(), rstd = Tensor::empty({rows}, DType::kF32);
    return bench::Work{.bytes = bench::bytes_of({x, residual, y, sum}), .run = [=] {
                         run(RmsNorm{.x = x, .w = w, .y = y, .rstd = rstd, .residual = residual, .sum = sum});
                       }};
  });
  bench::add("op/rms_norm_backward" + suffix, [=] {
    const Tensor x = bench::random({rows, width}, dtype), w = bench::random({width}, dtype), dy = x.clone(),
                 dx = x.clone();
    const Tensor rstd = bench::random({rows}, DType::kF32), dw = Tensor::zeros({width}, DType::kF32);
    return bench::Work{.bytes = bench::bytes_of({x, dy, dx}), .run = [=] {
                         run(RmsNormBackward{.x = x, .w = w, .rstd = rstd, .dy = dy, .dx = dx, .dw = dw});
                       }};
  });
}

const bool registered = bench::registered([] {
  for (const auto& c : cases::rms_norm) add(c.rows, c.width, DType::kF32);
  for (const DType dtype : bench::kStorageTypes) add(1, 2048, dtype), add(4096, 2048, dtype);
});

}  // namespace
}  // namespace lightmoe
