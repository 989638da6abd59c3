// Any bytes as a .jsonl and as a .txt data file, strict and lenient, with a small cap on lines; then as text to a tokenizer.

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>

#include "loaders/dataset.h"
#include "runtime/error.h"

namespace {

namespace fs = std::filesystem;

const lightmoe::Tokenizer& tokenizer() {
  static const auto loaded = lightmoe::Tokenizer::load("tests/data/tokenizer");
  return loaded;
}

fs::path write_file(const char* extension, const uint8_t* data, size_t size) {
  const fs::path path = fs::temp_directory_path() / ("lightmoe-fuzz-" + std::to_string(getpid()) + extension);
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  return path;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  for (const char* extension : {".jsonl", ".txt"}) {
    const fs::path file = write_file(extension, data, size);
    for (const bool skip_invalid : {false, true}) {
      try {
        lightmoe::ReadReport report;
        const auto records = lightmoe::read_records(file, {skip_invalid, 1 << 10}, &report);
        lightmoe::DataStream::Options options;
        options.rows = 2;
        options.length = 16;
        options.truncate = true;
        lightmoe::DataStream stream(lightmoe::tokenize(records, tokenizer(), 0), options);
        stream.next();
        stream.seek(stream.position());
        stream.next();
      } catch (const lightmoe::Error& error) {
        if (error.kind() == lightmoe::ErrorKind::kInternal) throw;
      }
    }
    fs::remove(file);
  }
  return 0;
}
