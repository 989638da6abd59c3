#include "kernels/device/simulator/guard.h"

#include <execinfo.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <vector>

#include "runtime/error.h"
#include "runtime/memory.h"

namespace lightmoe::simulator {
namespace {

constexpr size_t kReservedBytes = size_t{1} << 36;  // of address space; pages come as they are touched
constexpr size_t kPageBytes = 4096;

// Each block has pages of its own and ends, but for alignment, where its last page ends.
class GuardedMemory {
 public:
  GuardedMemory() {
    void* start = mmap(nullptr, kReservedBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    check(start != MAP_FAILED, ErrorKind::kMemory, "LIGHTMOE_SIM_GUARD: {} bytes of address space cannot be reserved",
          kReservedBytes);
    start_ = static_cast<unsigned char*>(start);
    struct sigaction action {};
    action.sa_sigaction = &on_fault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, nullptr);
  }

  void* allocate(size_t bytes) {
    if (bytes == 0) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t size = rounded(bytes);
    std::vector<unsigned char*>& free = free_[size];
    if (!free.empty()) {
      unsigned char* block = free.back();
      free.pop_back();
      return block;
    }
    if (used_ + size > kReservedBytes) return nullptr;
    unsigned char* block = start_ + used_;
    used_ += size;
    if (open_ > 0) protect(PROT_READ | PROT_WRITE);
    return block;
  }
  void release(void* block, size_t bytes) {
    if (block == nullptr) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    free_[rounded(bytes)].push_back(static_cast<unsigned char*>(block));
  }
  void open() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (open_++ == 0) protect(PROT_READ | PROT_WRITE);
  }
  void close() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--open_ == 0) protect(PROT_NONE);
  }

  static GuardedMemory* instance() {  // null when the guard is off; never destroyed: tensors may outlive everything
    static GuardedMemory* const memory = [] {
      const char* wanted = std::getenv("LIGHTMOE_SIM_GUARD");
      return wanted != nullptr && std::strcmp(wanted, "1") == 0 ? new GuardedMemory : nullptr;
    }();
    return memory;
  }

 private:
  static size_t rounded(size_t bytes) { return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes; }
  void protect(int access) {
    const int failed = used_ == 0 ? 0 : mprotect(start_, used_, access);
    require(failed == 0, "LIGHTMOE_SIM_GUARD: mprotect of {} bytes failed", used_);
  }

  static void on_fault(int signal, siginfo_t* info, void*) {
    const GuardedMemory& memory = *instance();
    const auto* address = static_cast<unsigned char*>(info->si_addr);
    if (address >= memory.start_ && address < memory.start_ + kReservedBytes) {
      static const char message[] = "sim: the host touches device memory; bring it over with Tensor::on. Backtrace:\n";
      [[maybe_unused]] const ssize_t written = write(2, message, sizeof message - 1);
      void* frames[64];
      backtrace_symbols_fd(frames, backtrace(frames, 64), 2);
    }
    ::signal(signal, SIG_DFL);
    raise(signal);
  }

  unsigned char* start_ = nullptr;
  size_t used_ = 0;
  int open_ = 0;
  std::map<size_t, std::vector<unsigned char*>> free_;  // by size
  std::mutex mutex_;
};

void* allocate(size_t bytes) { return GuardedMemory::instance()->allocate(bytes); }
void release(void* data, size_t bytes) { GuardedMemory::instance()->release(data, bytes); }
void copy(void* to, const void* from, size_t bytes) {
  const OpenDeviceMemory open;
  std::memcpy(to, from, bytes);
}
void fill(void* data, int byte, size_t bytes) {
  const OpenDeviceMemory open;
  std::memset(data, byte, bytes);
}

const bool registered = [] {
  if (GuardedMemory::instance() == nullptr) return false;
  register_device_memory(DeviceKind::kSim, {&allocate, &release, &copy, &fill});
  return true;
}();

}  // namespace

OpenDeviceMemory::OpenDeviceMemory() {
  if (GuardedMemory* memory = GuardedMemory::instance()) memory->open();
}
OpenDeviceMemory::~OpenDeviceMemory() {
  if (GuardedMemory* memory = GuardedMemory::instance()) memory->close();
}

}  // namespace lightmoe::simulator
