#include "kernels/rope.h"

#include "bench/op_bench.h"
#include "tests/cases/rope.h"

namespace lightmoe {
namespace {

void add(const cases::RopeCase& c, DType dtype) {
  bench::add(fmt::format("op/rope/{}/{}x{}x{}", name_of(dtype), c.tokens, c.heads, c.head_dim), [=] {
    const Tensor x = bench::random({c.tokens, c.heads * c.head_dim}, dtype), y = x.clone();
    const Tensor positions = Tensor::empty({c.tokens}, DType::kI32);
    for (int32_t t = 0; t < c.tokens; ++t) positions.data<int32_t>()[t] = c.first_position + t;
    return bench::Work{.bytes = bench::bytes_of({x, y}),
                       .run = [=] { run(Rope{.x = x, .positions = positions, .head_dim = c.head_dim, .y = y}); }};
  });
}

const bool registered = bench::registered([] {
  for (const auto& c : cases::rope) add(c, DType::kF32);
  for (const DType dtype : bench::kStorageTypes) add({4096, 16, 128, 0}, dtype);
});

}  // namespace
}  // namespace lightmoe
