#include "kernels/embedding.h"

#include "tests/cases/embedding.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

Tensor random_ids(int64_t count, int64_t vocabulary, uint64_t seed) {
  Philox random(seed);
  std::vector<int32_t> ids(static_cast<size_t>(count));
  for (int32_t& id : ids) id = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocabulary)));
  return Tensor::from(ids, {count});
}

void check_forward(const cases::EmbeddingCase& c, DType table_type, DType y_type) {
  const Tensor ids = random_ids(c.tokens, c.vocabulary, 1),
               table = random_tensor({c.vocabulary, c.width}, table_type, 2);
  const Guarded y({c.tokens, c.width}, y_type);
  run(Embedding{.ids = ids, .table = table, .y = y.tensor()});
  const std::vector<double> values = to_doubles(table), actual = to_doubles(y.tensor()), rows = to_doubles(ids);
  for (int64_t i = 0; i < c.tokens * c.width; ++i) {
    const int64_t row = static_cast<int64_t>(rows[static_cast<size_t>(i / c.width)]);
    ASSERT_EQ(actual[static_cast<size_t>(i)], values[static_cast<size_t>(row * c.width + i % c.width)]) << i;
  }
}

void check_backward(const cases::EmbeddingCase& c, DType dy_type, DType table_type) {
  const Tensor ids = random_ids(c.tokens, c.vocabulary, 3), dy = random_tensor({c.tokens, c.width}, dy_type, 4);
  const Tensor before = random_tensor({c.vocabulary, c.width}, table_type, 5);
  std::vector<double> expected = to_doubles(before);
  const std::vector<double> gradient = to_doubles(dy), rows = to_doubles(ids);
  double largest = 0;
  for (int64_t i = 0; i < c.tokens * c.width; ++i) {
    const int64_t row = static_cast<int64_t>(rows[static_cast<size_t>(i / c.width)]);
    double& sum = expected[static_cast<size_t>(row * c.width + i % c.width)];
    sum += gradient[static_cast<size_t>(i)];
    largest = std::max(largest, std::abs(sum));
  }
  const Guarded dtable({c.vocabulary, c.width}, table_type);
  dtable.tensor().copy_from(before);
  run(EmbeddingBackward{.ids = ids, .dy = dy, .dtable = dtable.tensor()});
  // Every '+=' rounds to the table's type, at most `tokens` times, each by unit_roundoff of a partial sum.
  const double roundings = 1 + std::sqrt(static_cast<double>(c.tokens));
  EXPECT_TRUE(
      testing::close(dtable.tensor(), expected, 0, 4 * roundings * testing::unit_roundoff(table_type) * largest));
}

TEST(Embedding, MatchesTheEquation) {
  testing::on_each_device<Embedding, EmbeddingBackward>([] {
    for (const auto& c : cases::embedding) {
      SCOPED_TRACE(::testing::Message() << c.tokens << " of " << c.vocabulary << " x " << c.width);
      for (const DType dtype : testing::floating_dtypes()) {
        check_forward(c, dtype, dtype);
        check_backward(c, dtype, dtype);
      }
      check_forward(c, DType::kBF16, DType::kF32);
      check_backward(c, DType::kBF16, DType::kF32);
    }
  });
}

TEST(Embedding, BackwardIsTheSameOnAnyThreads) {
  const Tensor ids = random_ids(700, 3, 6), dy = random_tensor({700, 333}, DType::kF32, 7);
  EXPECT_TRUE(testing::same_on_any_threads([&] {
    const Tensor dtable = Tensor::zeros({3, 333}, DType::kF32);
    run(EmbeddingBackward{.ids = ids, .dy = dy, .dtable = dtable});
    return dtable;
  }));
}

TEST(Embedding, RefusesIdsOutsideTheVocabulary) {
  const Tensor table = Tensor::zeros({4, 2}, DType::kF32), y = Tensor::zeros({1, 2}, DType::kF32);
  for (const int32_t id : {-1, 4}) {
    const Tensor ids = Tensor::from<int32_t>({id}, {1});
    try {
      run(Embedding{.ids = ids, .table = table, .y = y});
      FAIL() << "id " << id << " was taken";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::kInput);
    }
    EXPECT_THROW(run(EmbeddingBackward{.ids = ids, .dy = y, .dtable = table}), Error);
  }
  EXPECT_THROW(run(Embedding{.ids = Tensor::from<int32_t>({1}, {1}), .table = table, .y = table}), Error);
}

}  // namespace
}  // namespace lightmoe
