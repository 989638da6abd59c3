// Any bytes as a .safetensors file: refused with Error(kInput), or tensors that tile the file and can be read and scanned.
// The first eight bytes of the input are not believed: the length prefix is made to fit, or the fuzzer would never
// get past it; the prefix itself is tested exhaustively in tests/faults_test.cpp.
// seeds: tests/fuzz/seeds/safetensors-* tests/golden/plain-bf16/golden.safetensors

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "loaders/finite_scan.h"
#include "runtime/error.h"

namespace {

// A file in memory with these bytes, by its name under /proc.
std::string memory_file(const std::string& bytes) {
  static const int fd = ::memfd_create("fuzz", MFD_CLOEXEC);
  if (::ftruncate(fd, 0) != 0 || ::pwrite(fd, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size()))
    std::abort();
  return "/proc/self/fd/" + std::to_string(fd);
}

// The header ends at the last brace whose length would fit the file, so that mutations move the border between header and data.
std::string with_fitting_prefix(std::string bytes) {
  if (bytes.size() < 10) return bytes;
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  if (length > bytes.size() - 8) {
    const size_t brace = bytes.find("}}");
    length = brace == std::string::npos ? bytes.size() - 8 : brace + 2 - 8;
    std::memcpy(bytes.data(), &length, 8);
  }
  return bytes;
}

void check_file(const lightmoe::SafetensorsFile& file, uint64_t size) {
  uint64_t reached = file.tensors().empty() ? size : file.tensors().front().begin;
  for (const lightmoe::TensorInfo& info : file.tensors()) {
    if (info.begin != reached || info.end < info.begin || info.end > size) std::abort();
    reached = info.end;
    if (info.numel() < 0 || file.find(info.name) != &info) std::abort();
    try {
      file.read(info.name);
      file.read(info.name, lightmoe::DType::kF32);
    } catch (const lightmoe::Error& error) {  // too many dimensions, or a dtype that is not f32
      if (error.kind() != lightmoe::ErrorKind::kInput) std::abort();
    }
  }
  if (reached != size || lightmoe::scan_file(file).hash != lightmoe::hash_file(file.path())) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string bytes = with_fitting_prefix(std::string(reinterpret_cast<const char*>(data), size));
  const std::string path = memory_file(bytes);
  try {
    const lightmoe::SafetensorsFile file(path);
    check_file(file, bytes.size());
  } catch (const lightmoe::Error& error) {
    if (error.kind() != lightmoe::ErrorKind::kInput) std::abort();
  }
  return 0;
}
