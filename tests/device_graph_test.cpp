#include "runtime/device_graph.h"

#include "kernels/elementwise.h"
#include "runtime/device.h"
#include "tests/support/devices.h"
#include "tests/support/files.h"

namespace lightmoe {
namespace {

using testing::fails_with;
using testing::to_doubles;

class Graph : public ::testing::Test {
 protected:
  static std::vector<DeviceKind> devices() {
    std::vector<DeviceKind> list = testing::devices();
    std::erase(list, DeviceKind::kCpu);
    return list;
  }
};

// y += 2 x, twice through a temporary that lives while the work is recorded only.
TEST_F(Graph, RecordsWithoutDoingAndReplays) {
  for (const DeviceKind device : devices()) {
    const DeviceScope scope(device);
    const Tensor x = Tensor::from<float>({1, 2, 3}, {3}), y = Tensor::zeros({3}, DType::kF32);
    const DeviceGraph graph(device, [&] {
      for (int i = 0; i < 2; ++i) {
        const Tensor sum = Tensor::zeros({3}, DType::kF32);
        run(Axpy{.alpha = 1, .x = x, .y = sum});
        run(Axpy{.alpha = 2, .x = sum, .y = y});
      }
    });
    EXPECT_EQ(to_doubles(y), (std::vector<double>{0, 0, 0})) << "recording does nothing";
    graph.replay();
    EXPECT_EQ(to_doubles(y), (std::vector<double>{4, 8, 12}));
    x.copy_from(Tensor::from<float>({10, 0, 1}, {3}));  // what changes lies in device memory
    graph.replay();
    EXPECT_EQ(to_doubles(y), (std::vector<double>{44, 8, 16}));
  }
}

// A temporary's memory serves the next one of the same work, and nobody else until the graph is gone.
TEST_F(Graph, OwnsWhatItsWorkAllocates) {
  for (const DeviceKind device : devices()) {
    const DeviceScope scope(device);
    const int64_t before = device_live_bytes();
    std::vector<void*> blocks;
    Tensor kept;
    {
      const DeviceGraph graph(device, [&] {
        for (int i = 0; i < 3; ++i) blocks.push_back(Tensor::empty({5000}, DType::kU8).raw());
        kept = Tensor::empty({5000}, DType::kU8);
      });
      EXPECT_EQ(blocks[0], blocks[1]);
      EXPECT_EQ(blocks[0], kept.raw());
      EXPECT_EQ(graph.bytes(), 5000);
      EXPECT_EQ(device_live_bytes(), before + 5000);
      const Tensor other = Tensor::empty({5000}, DType::kU8);
      EXPECT_NE(other.raw(), kept.raw());
      kept.reset();
      EXPECT_NE(Tensor::empty({5000}, DType::kU8).raw(), blocks[0]) << "a replay would write there";
    }
    EXPECT_EQ(device_live_bytes(), before);
    {
      const DeviceGraph graph(device, [&] { kept = Tensor::empty({700}, DType::kU8); });
    }
    EXPECT_EQ(device_live_bytes(), before + 700) << "a tensor may outlive the graph";
    kept.reset();
    EXPECT_EQ(device_live_bytes(), before);
  }
}

TEST_F(Graph, KeepsTheBytesThatComeFromTheHost) {
  for (const DeviceKind device : devices()) {
    const DeviceScope scope(device);
    const Tensor y = Tensor::zeros({2}, DType::kF32);
    const DeviceGraph graph(device, [&] {
      std::vector<float> gone{3, 4};
      const Tensor x = Tensor::from(gone, {2});
      gone.assign(2, -1);
      run(Axpy{.alpha = 1, .x = x, .y = y});
    });
    graph.replay();
    graph.replay();
    EXPECT_EQ(to_doubles(y), (std::vector<double>{6, 8}));
  }
}

TEST_F(Graph, RefusesToReadTheDeviceAndASecondRecording) {
  for (const DeviceKind device : devices()) {
    const DeviceScope scope(device);
    const Tensor x = Tensor::from<float>({1}, {1});
    const int64_t before = device_live_bytes();
    EXPECT_TRUE(fails_with(ErrorKind::kInternal, {"read from the device"},
                           [&] { const DeviceGraph graph(device, [&] { x.clone().on(DeviceKind::kCpu); }); }));
    EXPECT_EQ(device_live_bytes(), before);
    EXPECT_TRUE(fails_with(ErrorKind::kInternal, {"another one"},
                           [&] { const DeviceGraph graph(device, [&] { const DeviceGraph inner(device, [] {}); }); }));
    EXPECT_EQ(to_doubles(x.clone()), (std::vector<double>{1})) << "and everything is as before";
  }
}

}  // namespace
}  // namespace lightmoe
