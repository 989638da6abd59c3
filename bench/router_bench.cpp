#include "kernels/router.h"

#include "bench/op_bench.h"
#include "tests/cases/router.h"

namespace lightmoe {
namespace {

void add(const cases::RouterCase& c, DType dtype) {
  const std::string suffix = fmt::format("/{}/{}x{}top{}of{}", name_of(dtype), c.tokens, c.width, c.top_k, c.slots);
  const double flops = 2.0 * static_cast<double>(c.tokens * c.width * c.slots);
  const auto forward = [=](const Tensor& x, const Tensor& w) {
    return Router{.x = x,
                  .w = w,
                  .top_k = c.top_k,
                  .logits = Tensor::empty({c.tokens, c.slots}, DType::kF32),
                  .probs = Tensor::empty({c.tokens, c.slots}, DType::kF32),
                  .slots = Tensor::empty({c.tokens, c.top_k}, DType::kI32),
                  .gates = Tensor::empty({c.tokens, c.top_k}, DType::kF32)};
  };
  bench::add("op/router" + suffix, [=] {
    const Router op = forward(bench::random({c.tokens, c.width}, dtype), bench::random({c.slots, c.width}, dtype));
    return bench::Work{.flops = flops, .run = [=] { run(op); }};
  });
  bench::add("op/router_backward" + suffix, [=] {
    const Router op = forward(bench::random({c.tokens, c.width}, dtype), bench::random({c.slots, c.width}, dtype));
    run(op);
    const RouterBackward backward{.x = op.x,
                                  .w = op.w,
                                  .probs = op.probs,
                                  .slots = op.slots,
                                  .gates = op.gates,
                                  .dgates = bench::random({c.tokens, c.top_k}, DType::kF32),
                                  .dprobs = bench::random({c.tokens, c.slots}, DType::kF32),
                                  .dx = op.x.clone(),
                                  .dw = Tensor::zeros({c.slots, c.width}, DType::kF32)};
    return bench::Work{.flops = 2 * flops, .run = [=] { run(backward); }};
  });
}

void add_load_balance(int64_t layers, int64_t tokens, int64_t slots, int64_t top_k) {
  bench::add(fmt::format("op/load_balance/f32/{}x{}top{}of{}", layers, tokens, top_k, slots), [=] {
    LoadBalance op{.loss = Tensor::empty({1}, DType::kF64)};
    for (int64_t l = 0; l < layers; ++l) {
      op.probs.push_back(bench::random({tokens, slots}, DType::kF32));
      op.slots.push_back(bench::random_ids({tokens, top_k}, slots));
    }
    return bench::Work{.bytes = static_cast<double>(layers * op.probs[0].bytes()), .run = [=] { run(op); }};
  });
}

const bool registered = bench::registered([] {
  for (const auto& c : cases::router) add(c, DType::kF32);
  for (const DType dtype : bench::kStorageTypes) add({1, 2048, 64, 8}, dtype), add({4096, 2048, 64, 8}, dtype);
  add_load_balance(16, 4096, 64, 8);
});

}  // namespace
}  // namespace lightmoe
