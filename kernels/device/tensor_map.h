#pragma once
// Host side of TMA: the description of a row-major bf16 matrix and of the box that one tma_load_2d brings to shared memory.
// Elements outside the matrix arrive as zeros and count as bytes. Pass the map to a kernel as `const __grid_constant__ TensorMap map`.
// NOTE: cuTensorMapEncodeTiled itself has not run here (it needs a driver); the conditions checked are those of its documentation.

#include <cstring>

#include "kernels/device/simt.h"
#include "kernels/device/tensor_map_bytes.h"

namespace lightmoe::LIGHTMOE_DEVICE {

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

struct MatrixBox {
  const void* base;
  int64_t rows, columns, row_bytes;
  int box_rows, box_columns;  // the box's row is 128, 64 or 32 bytes and swizzled over that many
};

inline void check_box(const MatrixBox& m) {
  require(reinterpret_cast<uintptr_t>(m.base) % 16 == 0, "tensor map: the matrix is not 16-byte aligned");
  require(m.row_bytes % 16 == 0 && m.row_bytes < (int64_t{1} << 40), "tensor map: row pitch {} is no multiple of 16",
          m.row_bytes);
  require(m.rows > 0 && m.columns > 0 && m.rows <= (int64_t{1} << 32) && m.columns <= (int64_t{1} << 32),
          "tensor map: {} x {} elements", m.rows, m.columns);
  require(m.box_rows > 0 && m.box_rows <= 256, "tensor map: box of {} rows, at most 256", m.box_rows);
  require(m.box_columns == 64 || m.box_columns == 32 || m.box_columns == 16,
          "tensor map: box of {} columns, expected 64, 32 or 16", m.box_columns);
}

#if defined(__CUDACC__)
inline TensorMap make_tensor_map(const MatrixBox& m) {
  check_box(m);
  using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                              const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                              CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  check(encode != nullptr, ErrorKind::kDevice, "cuda: this driver has no cuTensorMapEncodeTiled");
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(m.columns), static_cast<cuuint64_t>(m.rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(m.row_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(m.box_columns), static_cast<cuuint32_t>(m.box_rows)},
                   steps[2] = {1, 1};
  const CUtensorMapSwizzle swizzle = m.box_columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : m.box_columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                           : CU_TENSOR_MAP_SWIZZLE_32B;
  TensorMap map;
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  const CUresult result = encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                                 const_cast<void*>(m.base), sizes, pitch, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(result == CUDA_SUCCESS, ErrorKind::kDevice, "cuda: cuTensorMapEncodeTiled: error {}", static_cast<int>(result));
  return map;
}
#else
inline TensorMap make_tensor_map(const MatrixBox& m) {
  check_box(m);
  const TensorMapFields fields{.magic = kTensorMapMagic,
                               .base = static_cast<const unsigned char*>(m.base),
                               .columns = static_cast<uint64_t>(m.columns),
                               .rows = static_cast<uint64_t>(m.rows),
                               .row_bytes = static_cast<uint64_t>(m.row_bytes),
                               .box_columns = static_cast<uint32_t>(m.box_columns),
                               .box_rows = static_cast<uint32_t>(m.box_rows),
                               .swizzle = m.box_columns == 64   ? 1
                                          : m.box_columns == 32 ? 2
                                                                : 3};
  TensorMap map{};
  std::memcpy(map.bytes, &fields, sizeof fields);
  return map;
}
#endif

}  // namespace lightmoe::LIGHTMOE_DEVICE
