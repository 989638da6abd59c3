#include "kernels/indexing.h"

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::to_doubles;

TEST(Lookup, FollowsTheIndexAndKeepsMinusOne) {
  testing::on_each_device<Lookup>([] {
    const Tensor table = Tensor::from<int32_t>({7, -1, 9, 5}, {4});
    const Guarded y({2, 3}, DType::kI32);
    run(Lookup{.table = table, .index = Tensor::from<int32_t>({3, 0, -1, 1, 2, 3}, {2, 3}), .y = y.tensor()});
    EXPECT_EQ(to_doubles(y.tensor()), (std::vector<double>{5, 7, -1, -1, 9, 5}));
    run(Lookup{.table = table, .index = Tensor::empty({0}, DType::kI32), .y = Tensor::empty({0}, DType::kI32)});
  });
}

// Row r goes to (5 r + 1) mod 7 of 7 rows; row 2 nowhere. Untouched rows keep what they held.
void check_scatter(DType from, DType to, int64_t width) {
  const std::vector<int32_t> index{1, 6, -1, 2, 0};
  const Tensor x = testing::random_tensor({5, width}, from, 3);
  const Guarded y({7, width}, to);
  y.tensor().fill_zero();
  run(ScatterRows{.x = x, .index = Tensor::from(index, {5}), .y = y.tensor()});
  std::vector<double> expected(static_cast<size_t>(7 * width), 0.0);
  const std::vector<double> rounded = to_doubles(x.on(DeviceKind::kCpu).to(to));
  for (size_t r = 0; r < index.size(); ++r) {
    for (size_t i = 0; index[r] >= 0 && i < static_cast<size_t>(width); ++i)
      expected[static_cast<size_t>(index[r] * width) + i] = rounded[r * static_cast<size_t>(width) + i];
  }
  EXPECT_EQ(to_doubles(y.tensor()), expected) << name_of(from) << " to " << name_of(to) << ", width " << width;
}

TEST(ScatterRows, MovesAndRounds) {
  testing::on_each_device<ScatterRows>([] {
    for (const int64_t width : {1, 8, 33, 256}) {
      for (const DType from : {DType::kF32, DType::kBF16}) {
        for (const DType to : {DType::kF32, DType::kBF16}) check_scatter(from, to, width);
      }
    }
  });
}

TEST(ScatterRows, RefusesWrongShapes) {
  const Tensor x = Tensor::zeros({2, 3}, DType::kF32);
  const Tensor two = Tensor::from<int32_t>({0, 1}, {2});
  EXPECT_THROW(run(ScatterRows{.x = x, .index = two, .y = Tensor::zeros({2, 4}, DType::kF32)}), Error);
  EXPECT_THROW(run(ScatterRows{.x = x, .index = Tensor::from<int32_t>({0}, {1}), .y = x.clone()}), Error);
  EXPECT_THROW(run(ScatterRows{.x = x, .index = Tensor::from<int32_t>({0, 2}, {2}), .y = x.clone()}), Error);
}

}  // namespace
}  // namespace lightmoe
