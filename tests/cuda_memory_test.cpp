// The GPU's memory and queue (runtime/cuda_memory.cpp) on a fake of the CUDA runtime that does everything as late as it may
// (tests/support/fake_cuda): the file itself is compiled here a second time, against the fake.

#include "runtime/cuda_memory.cpp"  // NOTE: with LIGHTMOE_CUDA and tests/support/fake_cuda from the Makefile

#include <gtest/gtest.h>

namespace lightmoe {
namespace {

struct Block {
  explicit Block(size_t size) : bytes(size), data(static_cast<char*>(allocate(size))) {}
  ~Block() { release(data, bytes); }
  std::string text() const {
    std::string host(bytes, '?');
    copy(host.data(), data, bytes);
    return host;
  }
  size_t bytes;
  char* data;
};

TEST(CudaMemory, SmallCopiesMayBeOverwrittenAtOnceAndNobodyWaits) {
  constexpr size_t kBytes = 4000, kCopies = 5000;  // 20 MB: the page-locked ring is used up twice
  const Block to(kBytes * kCopies);
  const int waits = FakeCuda::get().waits;
  std::string source(kBytes, ' ');
  for (size_t i = 0; i < kCopies; ++i) {
    source.assign(kBytes, static_cast<char>('a' + i % 26));
    copy(to.data + i * kBytes, source.data(), kBytes);
  }
  EXPECT_EQ(FakeCuda::get().waits, waits);
  source.assign(kBytes, '!');
  const std::string arrived = to.text();
  for (size_t i = 0; i < kCopies; ++i) {
    ASSERT_EQ(arrived.substr(i * kBytes, kBytes), std::string(kBytes, static_cast<char>('a' + i % 26))) << i;
  }
}

TEST(CudaMemory, LargeCopiesAndCopiesToTheHostAreCompleteOnReturn) {
  const Block block(size_t{3} << 20);
  std::string source(block.bytes, 'x');
  copy(block.data, source.data(), block.bytes);
  source.assign(block.bytes, 'y');
  fill(block.data + 7, 'z', 2);
  const std::string text = block.text();
  EXPECT_EQ(text.substr(0, 12), "xxxxxxxzzxxx");
  EXPECT_EQ(text.back(), 'x');
}

TEST(CudaMemory, StagingWaitsForWhatLeft) {
  const Block block(8);
  char* staging = static_cast<char*>(allocate_staging(4));
  for (int piece = 0; piece < 2; ++piece) {
    wait_upload(0);
    std::memset(staging, 'p' + piece, 4);
    upload_piece(block.data + 4 * piece, staging, 4, 0);
  }
  wait_upload(0);
  release_staging(staging);
  EXPECT_EQ(block.text(), "ppppqqqq");
}

TEST(CudaMemory, FreedBlocksServeAgainAndGoBackWhenTheDeviceHasNoMore) {
  FakeCuda& fake = FakeCuda::get();
  pool().trim();
  void* first = allocate(1000);
  const int mallocs = fake.mallocs;
  release(first, 1000);
  EXPECT_EQ(allocate(1000), first);
  EXPECT_EQ(fake.mallocs, mallocs);
  release(first, 1000);
  const size_t free_bytes = fake.free_bytes;
  fake.free_bytes =
      DevicePool::rounded(size_t{64} << 20) - DevicePool::rounded(1000);  // fits once the kept block is back
  const int frees = fake.frees;
  void* large = allocate(size_t{64} << 20);
  EXPECT_NE(large, nullptr);
  EXPECT_EQ(fake.frees, frees + 1);
  EXPECT_EQ(allocate(size_t{512} << 20), nullptr) << "and no error: the caller says what it wanted";
  release(large, size_t{64} << 20);
  pool().trim();
  fake.free_bytes = free_bytes + DevicePool::rounded(1000);
}

TEST(CudaMemory, GraphsRecordAndReplay) {
  const Block from(4), to(4);
  fill(from.data, 'a', 4), fill(to.data, '-', 4);
  begin_graph();
  copy(to.data, from.data, 3);
  fill(to.data + 3, '.', 1);
  void* graph = end_graph();
  EXPECT_EQ(to.text(), "----") << "recording does nothing";
  replay_graph(graph);
  EXPECT_EQ(to.text(), "aaa.");
  fill(from.data, 'b', 4);
  replay_graph(graph);
  EXPECT_EQ(to.text(), "bbb.");
  release_graph(graph);
  EXPECT_EQ(FakeCuda::get().graphs, 0);
}

TEST(CudaMemory, ARecordingThatFailsLeavesTheStreamUsable) {
  const Block block(2);
  begin_graph();
  fill(block.data, 'x', 2);
  abandon_graph();
  abandon_graph();  // once more does nothing
  begin_graph();
  FakeCuda::get().next_error = cudaErrorUnknown;
  EXPECT_THROW(end_graph(), Error);
  abandon_graph();
  fill(block.data, 'k', 2);
  EXPECT_EQ(block.text(), "kk");
}

// The first call that fails is named, with the bytes it was about.
TEST(CudaMemory, ErrorsNameTheCall) {
  const Block block(12);
  FakeCuda::get().next_error = cudaErrorUnknown;
  try {
    fill(block.data, 0, 12);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kDevice);
    EXPECT_STREQ(error.what(), "cuda: fill of 12 bytes: a fake error");
  }
}

}  // namespace
}  // namespace lightmoe
