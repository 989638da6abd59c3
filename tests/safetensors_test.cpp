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

TEST(Safetensors, FusedExpertsByRows) {
  const Checkpoint plain("tests/golden/plain"), fused("tests/golden/plain-fused");
  const std::string prefix = "model.layers.1.mlp.experts.";
  const TensorInfo& info = fused.info(prefix + "gate_up_proj");
  ASSERT_EQ(info.shape, (std::vector<int64_t>{8, 64, 64}));
  for (int64_t e = 0; e < 8; ++e) {
    const Tensor both = Tensor::empty({1, 64, 64}, DType::kF32);
    fused.file_of(info.name).read_rows(info, e, both);
    const std::string expert = prefix + std::to_string(e);
    EXPECT_TRUE(bits_equal(both.row(0).slice(0, 32), plain.read(expert + ".gate_proj.weight", DType::kF32)));
    EXPECT_TRUE(bits_equal(both.row(0).slice(32, 64), plain.read(expert + ".up_proj.weight", DType::kF32)));
  }
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"gate_up_proj", "[8, 64, 64]", "7..9", "[2, 64, 64]"}, [&] {
    fused.file_of(info.name).read_rows(info, 7, Tensor::empty({2, 64, 64}, DType::kF32));
  }));
  EXPECT_TRUE(fails_with(ErrorKind::kInput, {"gate_up_proj", "[1, 64, 63]"}, [&] {
    fused.file_of(info.name).read_rows(info, 0, Tensor::empty({1, 64, 63}, DType::kF32));
  }));
}

TEST(Safetensors, RowsOfEveryRangeConvert) {
  const TempDir dir;
  const Tensor x = random_tensor({7, 3, 2}, DType::kBF16, 8);
  write_safetensors(dir / "x.safetensors", {{"odd", integers({1}, DType::kU8, 9)}, {"x", x}});  // x at an odd address
  const SafetensorsFile file(dir / "x.safetensors");
  for (int64_t begin = 0; begin <= 7; ++begin) {
    for (int64_t end = begin; end <= 7; ++end) {
      const Tensor rows = Tensor::empty({end - begin, 3, 2}, DType::kF32);
      file.read_rows(*file.find("x"), begin, rows);
      EXPECT_TRUE(bits_equal(rows, x.slice(begin, end).to(DType::kF32)));
    }
  }
}

// Larger than the pieces of reading and converting, with a remainder, at an odd offset.
TEST(Safetensors, LargeTensorsGoInPieces) {
  const TempDir dir;
  const Tensor x = random_tensor({3, 1'000'003}, DType::kF32, 10);
  SafetensorsWriter writer(
      dir.path(), {{"odd", DType::kU8, {1}}, {"x", DType::kF32, {3, 1'000'003}}, {"half", DType::kF16, {3'000'009}}},
      {});
  writer.write("odd", integers({1}, DType::kU8, 11));
  const char* bytes = static_cast<const char*>(x.raw());
  for (int64_t done = 0, piece = 1; done < x.bytes(); done += piece, piece = piece * 3 + 1) {  // pieces of any size
    writer.append_raw(bytes + done, static_cast<size_t>(std::min(piece, x.bytes() - done)));
  }
  writer.write("half", x.reshape({3'000'009}));
  writer.finish();
  const Checkpoint checkpoint(dir.path());
  EXPECT_TRUE(bits_equal(checkpoint.read("x", DType::kF32), x));
  EXPECT_TRUE(bits_equal(checkpoint.read("x", DType::kBF16), x.to(DType::kBF16)));
  EXPECT_TRUE(bits_equal(checkpoint.read("half", DType::kF32).reshape(x.shape()), x.to(DType::kF16).to(DType::kF32)));
}

TEST(Safetensors, IntegersOfEveryWidthAreRangeChecked) {
  const TempDir dir;
  const auto file_with = [&](const std::string& dtype, const std::string& data, int64_t count) {
    const std::string header = R"({"t":{"dtype":")" + dtype + R"(","shape":[)" + std::to_string(count) +
                               R"(],"data_offsets":[0,)" + std::to_string(data.size()) + "]}}";
    put_file(dir / "t.safetensors", safetensors_bytes(header, data));
    return SafetensorsFile(dir / "t.safetensors");
  };
  const std::string minus_one(8, '\xff');
  EXPECT_EQ(file_with("I8", minus_one.substr(0, 1), 1).read("t", DType::kI32).data<int32_t>()[0], -1);
  EXPECT_EQ(file_with("I16", minus_one.substr(0, 2), 1).read("t", DType::kI32).data<int32_t>()[0], -1);
  EXPECT_EQ(file_with("U16", minus_one.substr(0, 2), 1).read("t", DType::kI32).data<int32_t>()[0], 65535);
  EXPECT_EQ(file_with("I64", minus_one, 1).read("t", DType::kI32).data<int32_t>()[0], -1);
  EXPECT_EQ(file_with("I32", minus_one, 2).read("t", DType::kI64).data<int64_t>()[1], -1);
  EXPECT_EQ(file_with("BOOL", std::string("\1\0", 2), 2).read("t").data<uint8_t>()[0], 1);
  const auto refused = [&](const std::string& dtype, const std::string& data, DType as, const std::string& value) {
    return fails_with(ErrorKind::kInput, {"t.safetensors", "\"t\"", value},
                      [&] { file_with(dtype, data, 1).read("t", as); });
  };
  EXPECT_TRUE(refused("U32", minus_one.substr(0, 4), DType::kI32, "4294967295 does not fit i32"));
  EXPECT_TRUE(refused("U64", minus_one, DType::kI64, "18446744073709551615 does not fit i64"));
  EXPECT_TRUE(refused("I8", minus_one.substr(0, 1), DType::kU8, "-1 does not fit u8"));
  EXPECT_TRUE(refused("I32", minus_one.substr(0, 4), DType::kF32, "holds I32, which cannot be read as f32"));
  EXPECT_TRUE(refused("F32", minus_one.substr(0, 4), DType::kI32, "holds F32, which cannot be read as i32"));
  EXPECT_TRUE(refused("F8_E4M3", "a", DType::kF32, "holds F8_E4M3"));
  EXPECT_TRUE(refused("C64", minus_one, DType::kI32, "holds C64"));
}

TEST(SafetensorsWriter, RefusesWrongOrderShapeAndCount) {
  const TempDir dir;
  const std::vector<TensorSpec> specs = {{"a", DType::kF32, {2}}, {"b", DType::kF32, {3}}};
  const Tensor a = random_tensor({2}, DType::kF32, 1), b = random_tensor({3}, DType::kF32, 2);
  SafetensorsWriter writer(dir.path(), specs, {});
  EXPECT_THROW(writer.write("b", b), Error);
  EXPECT_THROW(writer.write("a", b), Error);
  EXPECT_THROW(writer.finish(), Error);
  writer.write("a", a);
  EXPECT_THROW(writer.write("a", a), Error);
  writer.write("b", b);
  EXPECT_THROW(writer.append_raw("x", 1), Error);
  writer.finish();
  EXPECT_TRUE(bits_equal(Checkpoint(dir.path()).read("b", DType::kF32), b));
  EXPECT_THROW(SafetensorsWriter(dir.path(), {specs[0], specs[0]}, {}), Error);
}

TEST(SafetensorsWriter, HeaderIsPaddedAndMarked) {
  const TempDir dir;
  write_safetensors(dir / "x.safetensors", {{"x", Tensor::zeros({1}, DType::kF32)}});
  const std::string bytes = get_file(dir / "x.safetensors");
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  EXPECT_EQ(length % 8, 0u);
  EXPECT_EQ(bytes.size(), 8 + length + 4);
  EXPECT_NE(bytes.find(R"("__metadata__":{"format":"pt"})"), std::string::npos);
  EXPECT_EQ(bytes[8], '{');
}

}  // namespace
}  // namespace lightmoe
