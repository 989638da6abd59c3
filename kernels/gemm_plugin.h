#pragma once
// A GEMM backend from outside the tree: a shared object with the C interface of kernels/plugin/lightmoe_gemm.h.
//   --gemm=./my_gemm.so   opens it, holds it to the equations (gemm_check.h) on the device in use, then gives it every product that it
//                         supports; the others fall to the cheapest built-in backend and gemm_picks() names them.
// Errors are Error(kDevice), exit code 9, and name the file: cannot be opened, no entry, other ABI, wrong results, a failed call, a crash
// or hang while it is held to the equations. One plug-in for each process, kept open to its end.

#include <cstdint>
#include <string>

#include "kernels/gemm.h"

namespace lightmoe {

struct GemmPluginInfo {
  std::string path, name, version, licence;
  uint64_t file_hash = 0;  // XXH3 of the shared object
};

// Is this value of --gemm a file rather than a name?
bool is_gemm_plugin_path(std::string_view value);
// Opens it and creates its context for the default device. The backend is not among gemm_backends() yet.
const GemmBackend& open_gemm_plugin(const std::string& path);
const GemmPluginInfo* gemm_plugin_info();  // null when none is open
// Opens, checks, registers. The name is what force_gemm_backend takes.
std::string_view use_gemm_plugin(const std::string& path);
// What the plug-in's score says of a product (0: not supported).
int32_t gemm_plugin_score(const GemmDesc& desc);

}  // namespace lightmoe
