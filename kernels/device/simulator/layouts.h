#pragma once
// Which matrix element a lane's register holds, and where tensor-core operands lie in shared memory: the PTX ISA's figures as pure
// functions. The simulator executes by them; kernels may use them to place their results. Tests hold them against the definitions.

#include <cstdint>

namespace lightmoe::simulator::layout {

struct Element {
  int row, column;
};

// mma.sync.m16n8k16 with 16-bit operands. `e` counts the lane's elements, two to a 32-bit register.
constexpr Element mma_a(int lane, int e) {  // (m, k)
  return {lane / 4 + 8 * ((e >> 1) & 1), 2 * (lane % 4) + (e & 1) + 8 * (e >> 2)};
}
constexpr Element mma_b(int lane, int e) {  // (k, n)
  return {2 * (lane % 4) + (e & 1) + 8 * (e >> 1), lane / 4};
}
constexpr Element mma_d(int lane, int e) {  // (m, n), f32
  return {lane / 4 + 8 * (e >> 1), 2 * (lane % 4) + (e & 1)};
}
// ldmatrix: the element of the 8x8 matrix in half `h` of a lane's register.
constexpr Element ldmatrix(int lane, int h, bool transposed) {
  const Element e{lane / 4, 2 * (lane % 4) + h};
  return transposed ? Element{e.column, e.row} : e;
}
// wgmma m64nNk16: accumulator `e` of thread `t` of the warpgroup; A in registers has mma_a's layout in rows 16 * warp.
constexpr Element wgmma_d(int t, int e) {
  return {16 * (t / 32) + (t % 32) / 4 + 8 * ((e >> 1) & 1), 8 * (e >> 2) + 2 * (t % 4) + (e & 1)};
}

// Swizzles of TMA and wgmma, by the descriptor's numbers: 16-byte pieces change places within 1024, 512 or 256 bytes.
enum class Swizzle { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };
constexpr uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k128:
      return address ^ ((address >> 3) & 0x70);
    case Swizzle::k64:
      return address ^ ((address >> 3) & 0x30);
    case Swizzle::k32:
      return address ^ ((address >> 3) & 0x10);
    case Swizzle::kNone:
      break;
  }
  return address;
}

// The 64-bit description of an operand in shared memory. Offsets in bytes.
struct Descriptor {
  uint32_t start, leading_offset, stride_offset;
  int base_offset;
  Swizzle swizzle;
  explicit constexpr Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading_offset(static_cast<uint32_t>((bits >> 16) & 0x3fff) << 4),
        stride_offset(static_cast<uint32_t>((bits >> 32) & 0x3fff) << 4),
        base_offset(static_cast<int>((bits >> 49) & 7)),
        swizzle(static_cast<Swizzle>((bits >> 62) & 3)) {}
};

// Shared address of element (mn, k) of a 16-bit operand. mn_major: consecutive mn lie together (the "transposed" operand).
constexpr uint32_t operand_address(const Descriptor& d, int mn, int k, bool mn_major) {
  const auto m = static_cast<uint32_t>(mn), kk = static_cast<uint32_t>(k);
  uint32_t address = d.start;
  if (d.swizzle == Swizzle::kNone) {  // 8x8 blocks of 128 contiguous bytes
    const uint32_t block = mn_major ? (m % 8) * 2 + (kk % 8) * 16 : (m % 8) * 16 + (kk % 8) * 2;
    address += block + (m / 8) * d.stride_offset + (kk / 8) * d.leading_offset;
  } else {
    const uint32_t row_bytes = d.swizzle == Swizzle::k128 ? 128 : d.swizzle == Swizzle::k64 ? 64 : 32;
    if (mn_major) {
      const uint32_t width = row_bytes / 2;
      address += (m % width) * 2 + (m / width) * d.leading_offset + (kk % 8) * row_bytes + (kk / 8) * d.stride_offset;
    } else {
      address += (m % 8) * row_bytes + (m / 8) * d.stride_offset + kk * 2;
    }
  }
  return swizzled(address, d.swizzle);
}

}  // namespace lightmoe::simulator::layout
