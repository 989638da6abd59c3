#include "kernels/elementwise.h"

#include "bench/op_bench.h"
#include "tests/cases/elementwise.h"

namespace lightmoe {
namespace {

void add(int64_t count, DType dtype) {
  const auto one = [=](const char* name, auto&& op_on) {
    bench::add(fmt::format("op/{}/{}/{}", name, name_of(dtype), count), [=] {
      const Tensor a = bench::random({count}, dtype), b = bench::random({count}, dtype), y = a.clone();
      return op_on(a, b, y);
    });
  };
  one("add", [](const Tensor& a, const Tensor& b, const Tensor& y) {
    return bench::Work{.bytes = bench::bytes_of({a, b, y}), .run = [=] { run(Add{.a = a, .b = b, .y = y}); }};
  });
  one("axpy", [](const Tensor& a, const Tensor&, const Tensor& y) {
    return bench::Work{.bytes = bench::bytes_of({a, y, y}), .run = [=] { run(Axpy{.alpha = 1e-6, .x = a, .y = y}); }};
  });
  one("clamp", [](const Tensor& a, const Tensor&, const Tensor& y) {
    return bench::Work{.bytes = bench::bytes_of({a, y}), .run = [=] { run(Clamp{.limit = 0.3, .x = a, .y = y}); }};
  });
  one("silu", [](const Tensor& a, const Tensor&, const Tensor& y) {
    return bench::Work{.bytes = bench::bytes_of({a, y}), .run = [=] { run(Silu{.x = a, .y = y}); }};
  });
  one("silu_backward", [](const Tensor& a, const Tensor& b, const Tensor& y) {
    return bench::Work{.bytes = bench::bytes_of({a, b, y}),
                       .run = [=] { run(SiluBackward{.x = a, .dy = b, .dx = y}); }};
  });
  one("blend", [](const Tensor& a, const Tensor& b, const Tensor& y) {
    return bench::Work{.bytes = bench::bytes_of({a, b, y}),
                       .run = [=] { run(Blend{.beta = 0.3, .a = a, .b = b, .y = y}); }};
  });
}

const bool registered = bench::registered([] {
  for (const int64_t count : cases::elementwise) add(count, DType::kF32);
  // One expert of OLMoE, gate and up and down: what annealing blends.
  for (const DType dtype : bench::kStorageTypes) add(3 * 1024 * 2048, dtype);
});

}  // namespace
}  // namespace lightmoe
