#include "loaders/safetensors.h"

#include <algorithm>
#include <cstring>

#include "tests/support/files.h"
#include "tests/support/testing.h"

namespace lightmoe {
namespace {

using testing::bits_equal;
using testing::fails_with;
using testing::get_file;
using testing::put_file;
using testing::random_tensor;
using testing::safetensors_bytes;
using testing::TempDir;

Tensor integers(const Shape& shape, DType dtype, uint64_t seed) {
  Tensor t = Tensor::empty(shape, dtype);
  Philox random(seed);
  for (int64_t i = 0; i < t.bytes(); ++i) static_cast<uint8_t*>(t.raw())[i] = static_cast<uint8_t>(random.next_u32());
  return t;
}

TensorSpec spec_of(const std::string& name, const Tensor& t) {
  std::vector<int64_t> shape;
  for (int i = 0; i < t.rank(); ++i) shape.push_back(t.dim(i));
  return {name, t.dtype(), shape};
}

// Every dtype, a scalar, empty tensors at the start, middle and end, and odd byte counts that leave what follows unaligned.
std::vector<std::pair<std::string, Tensor>> all_kinds() {
  return {{"empty.first", Tensor::empty({0, 5}, DType::kF32)},
          {"u8", integers({3}, DType::kU8, 1)},
          {"f32", random_tensor({5, 7}, DType::kF32, 2)},
          {"bf16", random_tensor({3, 1, 5}, DType::kBF16, 3)},
          {"scalar", random_tensor({}, DType::kF64, 4)},
          {"empty.middle", Tensor::empty({4, 0}, DType::kI32)},
          {"f16", random_tensor({11}, DType::kF16, 5)},
          {"i64", integers({2, 2, 2, 2}, DType::kI64, 6)},
          {"i32", integers({13}, DType::kI32, 7)},
          {"empty.last", Tensor::empty({0}, DType::kU8)}};
}

TEST(Safetensors, OneFileRoundTrip) {
  const TempDir dir;
  const auto tensors = all_kinds();
  write_safetensors(dir / "x.safetensors", tensors, {{"made by", "a test"}});
  const SafetensorsFile file(dir / "x.safetensors");
  EXPECT_EQ(file.tensors().size(), tensors.size());
  EXPECT_EQ(file.metadata(), (std::map<std::string, std::string>{{"format", "pt"}, {"made by", "a test"}}));
  for (const auto& [name, tensor] : tensors) {
    SCOPED_TRACE(name);
    ASSERT_NE(file.find(name), nullptr);
    EXPECT_TRUE(bits_equal(file.read(name), tensor));
    if (is_floating(tensor.dtype())) {
      EXPECT_TRUE(bits_equal(file.read(name, DType::kF64), tensor.to(DType::kF64)));
      EXPECT_TRUE(bits_equal(file.read(name, DType::kBF16), tensor.to(DType::kBF16)));
    }
  }
}

TEST(Safetensors, ShardedRoundTrip) {
  const auto tensors = all_kinds();
  for (const int64_t shard_bytes : {1, 20, 100, 150, 200, 100000}) {
    SCOPED_TRACE(shard_bytes);
    const TempDir dir;
    std::vector<TensorSpec> specs;
    for (const auto& [name, tensor] : tensors) specs.push_back(spec_of(name, tensor));
    SafetensorsWriter writer(dir.path(), specs, {.max_shard_bytes = shard_bytes});
    for (const auto& [name, tensor] : tensors) writer.write(name, tensor);
    writer.finish();
    const Checkpoint checkpoint(dir.path());
    EXPECT_EQ(checkpoint.names().size(), tensors.size());
    EXPECT_GE(checkpoint.files().size(), shard_bytes == 1 ? 7u : 1u);
    EXPECT_EQ(checkpoint.files().size() == 1, shard_bytes == 100000);
    int64_t bytes = 0;
    for (const auto& [name, tensor] : tensors) {
      bytes += tensor.bytes();
      EXPECT_TRUE(bits_equal(checkpoint.read(name, tensor.dtype()), tensor)) << name;
    }
    EXPECT_EQ(checkpoint.total_bytes(), bytes);
  }
}

TEST(Safetensors, GoldenFoldersAgree) {
  for (const std::string base : {"plain", "gqa-clip-renorm", "e64k8"}) {
    const Checkpoint single("tests/golden/" + base), sharded("tests/golden/" + base + "-sharded");
    EXPECT_EQ(single.names(), sharded.names());
    EXPECT_EQ(sharded.files().size(), 2u);
    for (const std::string& name : single.names()) {
      EXPECT_TRUE(bits_equal(single.read(name, DType::kF32), sharded.read(name, DType::kF32))) << name;
    }
  }
}

}  // namespace
}  // namespace lightmoe
