#include "kernels/swiglu.h"

#include "bench/op_bench.h"
#include "tests/cases/swiglu.h"

namespace lightmoe {
namespace {

void add(int64_t rows, int64_t width, DType dtype) {
  const std::string suffix = fmt::format("/{}/{}x{}", name_of(dtype), rows, width);
  bench::add("op/swiglu" + suffix, [=] {
    const Tensor h = bench::random({rows, 2 * width}, dtype), a = Tensor::empty({rows, width}, dtype);
    return bench::Work{.bytes = bench::bytes_of({h, a}), .run = [=] { run(SwiGlu{.h = h, .a = a}); }};
  });
  bench::add("op/swiglu_backward" + suffix, [=] {
    const Tensor h = bench::random({rows, 2 * width}, dtype), da = bench::random({rows, width}, dtype);
    const Tensor dh = h.clone(), a = da.clone();
    return bench::Work{.bytes = bench::bytes_of({h, da, dh, a}),
                       .run = [=] { run(SwiGluBackward{.h = h, .da = da, .dh = dh, .a = a}); }};
  });
}

const bool registered = bench::registered([] {
  for (const auto& c : cases::swiglu) add(c.rows, c.width, DType::kF32);
  for (const DType dtype : bench::kStorageTypes) add(8, 1024, dtype), add(8192, 1024, dtype);
});

}  // namespace
}  // namespace lightmoe
