#include "runtime/device_pool.h"

#include <gtest/gtest.h>

#include <cstdlib>

namespace lightmoe {
namespace {

// A device of a megabyte that counts what it is asked.
int64_t taken = 0;
int asked = 0, returned = 0;
void* take(size_t bytes) {
  ++asked;
  if (taken + static_cast<int64_t>(bytes) > (int64_t{1} << 20)) return nullptr;
  taken += static_cast<int64_t>(bytes);
  return std::malloc(bytes);
}
void give(void* data, size_t bytes) {
  ++returned;
  taken -= static_cast<int64_t>(bytes);
  std::free(data);
}

class Pool : public ::testing::Test {
 protected:
  Pool() { taken = asked = returned = 0; }
  ~Pool() override {
    pool.trim();
    EXPECT_EQ(taken, 0) << "all goes back to the device";
  }
  DevicePool pool{{&take, &give}};
};

TEST_F(Pool, ABlockIsReusedForItsSize) {
  void* first = pool.allocate(1000);
  pool.release(first, 1000);
  EXPECT_EQ(pool.allocate(600), first) << "both are 1024 bytes";
  EXPECT_EQ(asked, 1);
  void* other = pool.allocate(1025);
  EXPECT_NE(other, first);
  EXPECT_EQ(pool.use().given_bytes, 1024 + 1536);
  pool.release(first, 600), pool.release(other, 1025);
  EXPECT_EQ(pool.use().given_bytes, 0);
  EXPECT_EQ(pool.use().kept_bytes, 1024 + 1536);
  EXPECT_EQ(pool.use().from_pool, 1);
  EXPECT_EQ(pool.use().from_device, 2);
}

TEST_F(Pool, KeptBlocksMakeRoom) {
  void* half = pool.allocate(512 << 10);
  pool.release(half, 512 << 10);
  void* most = pool.allocate(900 << 10);  // fits only once the kept half has gone back
  ASSERT_NE(most, nullptr);
  EXPECT_EQ(returned, 1);
  EXPECT_EQ(pool.allocate(512 << 10), nullptr) << "the device has no more";
  pool.release(most, 900 << 10);
}

TEST_F(Pool, TheLimitCountsWhatIsKept) {
  pool.set_limit(4096);
  void* a = pool.allocate(2048);
  void* b = pool.allocate(2048);
  EXPECT_EQ(pool.allocate(1), nullptr);
  pool.release(a, 2048);
  void* c = pool.allocate(1536);  // another size: the kept block goes first
  ASSERT_NE(c, nullptr);
  EXPECT_EQ(returned, 1);
  EXPECT_EQ(pool.use().kept_bytes, 0);
  pool.release(b, 2048), pool.release(c, 1536);
}

TEST_F(Pool, NothingIsNothing) {
  EXPECT_EQ(pool.allocate(0), nullptr);
  pool.release(nullptr, 0);
  EXPECT_EQ(asked, 0);
  EXPECT_EQ(DevicePool::rounded(1), 512u);
  EXPECT_EQ(DevicePool::rounded((1 << 20) + 1), (1u << 20) + (128u << 10));
  EXPECT_EQ(DevicePool::rounded((17 << 20) + 1), 18u << 20);
}

}  // namespace
}  // namespace lightmoe
