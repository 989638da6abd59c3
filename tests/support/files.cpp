#include "tests/support/files.h"

#include <stdlib.h>

#include <cstring>
#include <fstream>
#include <iterator>

namespace lightmoe::testing {

TempDir::TempDir() {
  std::string name = (std::filesystem::temp_directory_path() / "lightmoe-test-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp " + name);
  path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void put_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out << bytes;
  out.close();
  if (!out) throw std::runtime_error("cannot write " + path.string());
}

std::string get_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::string safetensors_bytes(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  std::string prefix(8, '\0');
  std::memcpy(prefix.data(), &length, sizeof length);
  return prefix + header + data;
}

::testing::AssertionResult fails_with(ErrorKind kind, const std::vector<std::string>& pieces,
                                      const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    const std::string message = error.what();
    if (error.kind() != kind) {
      return ::testing::AssertionFailure()
             << "kind " << error.exit_code() << ", expected " << static_cast<int>(kind) << ": " << message;
    }
    for (const std::string& piece : pieces) {
      if (message.find(piece) == std::string::npos) {
        return ::testing::AssertionFailure() << "\"" << message << "\" does not name \"" << piece << "\"";
      }
    }
    for (const char c : message) {
      if (static_cast<unsigned char>(c) < 0x20)
        return ::testing::AssertionFailure() << "control character in: " << message;
    }
    return ::testing::AssertionSuccess() << message;
  } catch (const std::exception& error) {
    return ::testing::AssertionFailure() << "not an Error: " << error.what();
  }
  return ::testing::AssertionFailure() << "no error";
}

}  // namespace lightmoe::testing
