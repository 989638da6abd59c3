#include "runtime/error.h"

namespace lightmoe {

void throw_error(ErrorKind kind, fmt::string_view format, fmt::format_args values) {
  throw Error(kind, fmt::vformat(format, values));
}

}  // namespace lightmoe
