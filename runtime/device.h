#pragma once
// A device beside the host: its queue, what is moved between the two, and how much memory it may take.
// All work of a device - kernels, copies, fills - is queued in order on one stream. The host runs ahead and waits only where it reads
// what the device wrote: copies to the host are counted, so that a test can prove that a training step has none but those it reports.

#include <cstddef>
#include <cstdint>
#include <functional>

#include "runtime/dtype.h"
#include "runtime/memory.h"

namespace lightmoe {

// The stream of cuda (a cudaStream_t); null elsewhere.
void* compute_stream(DeviceKind device);
// Until everything that was queued is done.
void wait_for_device(DeviceKind device);

struct TransferCounts {
  int64_t to_host = 0, to_device = 0;  // copies; each one to the host waits for the device
};
TransferCounts transfer_counts();  // since the program began, of all devices but the CPU

// The most that tensors of sim and cuda may take together, in bytes as requested; on cuda with what the pool keeps. 0: no limit.
void set_device_memory_limit(int64_t bytes);
int64_t device_memory_limit();
int64_t device_live_bytes();  // tensors of sim and cuda
int64_t
device_free_bytes();  // what a new tensor may take: limit and, on cuda, the device's free memory; -1 when nothing limits it

// Fills `bytes` of the device's memory from the host without a copy of all of it: read(to, offset, count) is called for pieces in order
// and fills host memory (page-locked where the device has that) while the piece before it is on its way.
void upload(DeviceKind device, void* to, size_t bytes,
            const std::function<void(void* piece, size_t offset, size_t count)>& read);

// --- what a device registers (runtime/cuda_memory.cpp, kernels/convert.cu) --------------------------------

struct DeviceQueue {
  void* (*stream)();
  void (*wait)();
  // Page-locked host memory; copies out of it that overlap with the host; until the copy last started from `slot` is done.
  void* (*allocate_staging)(size_t bytes);
  void (*release_staging)(void* data);
  void (*upload)(void* to, const void* from, size_t bytes, int slot);
  void (*wait_upload)(int slot);
  int64_t (*free_bytes)();
  void (*set_limit)(int64_t bytes);
};
void register_device_queue(DeviceKind device, const DeviceQueue& queue);

// Conversion between floating types on the device itself (Tensor::copy_from); false where it has no kernel for the types, which then go
// through the host.
using DeviceConvert = bool (*)(const void* from, DType from_type, void* to, DType to_type, size_t count);
struct RegisterDeviceConvert {
  RegisterDeviceConvert(DeviceKind device, DeviceConvert convert);
};
bool convert_on_device(DeviceKind device, const void* from, DType from_type, void* to, DType to_type, size_t count);

namespace detail {
void count_transfer(bool to_host);
// Books or gives back `bytes` of sim or cuda; false when the limit is passed (nothing is booked then).
bool book_device_bytes(int64_t bytes);
}  // namespace detail

}  // namespace lightmoe
