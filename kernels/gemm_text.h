#pragma once
// A product in words, for messages, lists of picks and keys: "grouped_m nt f32xbf16->f32 bf16 gather m=4096 n=2048 k=1024 g=64".

#include <string>

#include "kernels/gemm.h"

namespace lightmoe {

std::string text_of(const GemmDesc& desc);

}  // namespace lightmoe
