#include "kernels/embedding.h"

#include "bench/op_bench.h"
#include "tests/cases/embedding.h"

namespace lightmoe {
namespace {

void add(const cases::EmbeddingCase& c, DType dtype) {
  const std::string suffix = fmt::format("/{}/{}of{}x{}", name_of(dtype), c.tokens, c.vocabulary, c.width);
  bench::add("op/embedding" + suffix, [=] {
    const Tensor ids = bench::random_ids({c.tokens}, c.vocabulary),
                 table = bench::random({c.vocabulary, c.width}, dtype);
    const Tensor y = Tensor::empty({c.tokens, c.width}, dtype);
    return bench::Work{.bytes = bench::bytes_of({y, y}),
                       .run = [=] { run(Embedding{.ids = ids, .table = table, .y = y}); }};
  });
  bench::add("op/embedding_backward" + suffix, [=] {
    const Tensor ids = bench::random_ids({c.tokens}, c.vocabulary),
                 dtable = Tensor::zeros({c.vocabulary, c.width}, DType::kF32);
    const Tensor dy = bench::random({c.tokens, c.width}, dtype);
    return bench::Work{.bytes = bench::bytes_of({dy, dy, dy}),
                       .run = [=] { run(EmbeddingBackward{.ids = ids, .dy = dy, .dtable = dtable}); }};
  });
}

const bool registered = bench::registered([] {
  for (const auto& c : cases::embedding) add(c, DType::kF32);
  for (const DType dtype : bench::kStorageTypes) add({4096, 50304, 2048}, dtype);
});

}  // namespace
}  // namespace lightmoe
