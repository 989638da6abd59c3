#include "kernels/qk_norm_rope.h"

#include "bench/op_bench.h"
#include "tests/cases/qk_norm_rope.h"

namespace lightmoe {
namespace {

HeadTurns turns_of(const cases::QkNormRopeCase& c) {
  std::vector<int32_t> positions(static_cast<size_t>(c.tokens));
  for (size_t t = 0; t < positions.size(); ++t) positions[t] = c.first_position + static_cast<int32_t>(t);
  return {.positions = Tensor::from(positions, {c.tokens}), .head_dim = c.head_dim};
}

void add(const cases::QkNormRopeCase& c, DType dtype) {
  const std::string suffix = fmt::format("/{}/{}x{}+{}x{}", name_of(dtype), c.tokens, c.heads, c.key_heads, c.head_dim);
  const auto rows = [=](int64_t heads) { return bench::random({c.tokens, heads * c.head_dim}, dtype); };
  const auto weight = [=](int64_t heads) { return bench::random({heads * c.head_dim}, dtype); };
  bench::add("op/qk_norm_rope" + suffix, [=] {
    const QkNormRope op{.q = {.x = rows(c.heads), .w = weight(c.heads), .y = rows(c.heads), .rstd = {}},
                        .k = {.x = rows(c.key_heads), .w = weight(c.key_heads), .y = rows(c.key_heads), .rstd = {}},
                        .turns = turns_of(c)};
    return bench::Work{.bytes = bench::bytes_of({op.q.x, op.q.y, op.k.x, op.k.y}), .run = [=] { run(op); }};
  });
  bench::add("op/qk_norm_rope_backward" + suffix, [=] {
    const auto part = [=](int64_t heads) {
      return QkNormRopeBackward::Rows{.x = rows(heads),
                                      .w = weight(heads),
                                      .rstd = bench::random({c.tokens}, DType::kF32),
                                      .dy = rows(heads),
                                      .dx = rows(heads),
                                      .dw = Tensor::zeros({heads * c.head_dim}, DType::kF32)};
    };
    const QkNormRopeBackward op{.q = part(c.heads), .k = part(c.key_heads), .turns = turns_of(c)};
    return bench::Work{.bytes = 1.5 * bench::bytes_of({op.q.x, op.q.dx, op.k.x, op.k.dx}), .run = [=] { run(op); }};
  });
}

const bool registered = bench::registered([] {
  for (const auto& c : cases::qk_norm_rope) {
    if (c.tokens > 0) add(c, DType::kF32);
  }
  for (const DType dtype : bench::kStorageTypes) add({1, 16, 16, 128, 0}, dtype), add({4096, 16, 16, 128, 0}, dtype);
});

}  // namespace
}  // namespace lightmoe
