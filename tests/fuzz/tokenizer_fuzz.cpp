// Any bytes as tokenizer.json: refused with an Error, or a tokenizer that encodes and decodes without harm.

#include <cstddef>
#include <cstdint>

#include "loaders/tokenizer.h"
#include "runtime/error.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const auto tokenizer = lightmoe::Tokenizer::parse({reinterpret_cast<const char*>(data), size}, "fuzz");
    const auto ids = tokenizer.encode("The router's 12 experts,  A\u030a <|endoftext|>\n\n \u4e13\u5bb6");
    tokenizer.decode(ids);
    tokenizer.decode(ids, true);
  } catch (const lightmoe::Error& error) {
    if (error.kind() == lightmoe::ErrorKind::kInternal) throw;
  }
  return 0;
}
