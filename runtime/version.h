#pragma once
namespace lightmoe {
// `git describe` of the source this binary was built from; written into every output.
const char* version();
}  // namespace lightmoe
