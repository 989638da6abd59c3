#include "runtime/error.h"

namespace lightmoe {

void throw_error(ErrorKind kind, fmt::string_view format, fmt::format_args values) {
  throw Error(kind, fmt::vformat(format, values));
}

std::string printable(std::string_view text, size_t max_length) {
  const auto escape = [](std::string_view piece) {
    std::string out;
    for (const char c : piece) {
      if (c >= 0x20 && c < 0x7f)
        out += c;
      else
        out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
    return out;
  };
  if (text.size() <= max_length) return escape(text);
  return fmt::format("{}...({} bytes)...{}", escape(text.substr(0, max_length / 2)), text.size(),
                     escape(text.substr(text.size() - max_length / 4)));
}

}  // namespace lightmoe
