#pragma once
// What the simulator keeps in a tensor map: the driver's own format is not public.

#include <cstdint>

namespace lightmoe {

struct TensorMapFields {
  uint64_t magic;
  const unsigned char* base;
  uint64_t columns, rows, row_bytes;
  uint32_t box_columns, box_rows;
  int swizzle;  // as in wgmma's descriptor: 0 none, 1 128 bytes, 2 64, 3 32
};
inline constexpr uint64_t kTensorMapMagic = 0x4c4d4f45544d4150ull;

}  // namespace lightmoe
