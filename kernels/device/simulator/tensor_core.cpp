// mma.sync and ldmatrix: done by the last lane that arrives, for the whole warp.
#include <algorithm>
#include <bit>

#include "kernels/device/simulator/layouts.h"
#include "kernels/device/simulator/race.h"

namespace lightmoe::simulator {
namespace {

float bf16_half(uint32_t word, int half) { return std::bit_cast<float>(half != 0 ? word & 0xffff0000u : word << 16); }

struct MmaArgument {
  float* d;
  const uint32_t *a, *b;
};

void run_mma(uint32_t, void** arguments, Warp& warp) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& x = *static_cast<MmaArgument*>(arguments[lane]);
    for (int e = 0; e < 8; ++e) {
      const auto at = layout::mma_a(lane, e);
      a[at.row][at.column] = bf16_half(x.a[e / 2], e & 1);
    }
    for (int e = 0; e < 4; ++e) {
      const auto at = layout::mma_b(lane, e), to = layout::mma_d(lane, e);
      b[at.row][at.column] = bf16_half(x.b[e / 2], e & 1);
      d[to.row][to.column] = x.d[e];
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int e = 0; e < 4; ++e) {
      const auto to = layout::mma_d(lane, e);
      static_cast<MmaArgument*>(arguments[lane])->d[e] = d[to.row][to.column];
    }
  }
  ++warp.block->statistics.mma;
}

struct LdmatrixArgument {
  uint32_t* registers;
  const void* row;
  int matrices;
  bool transposed;
  Site site;
};

// Rows of one 8x8 matrix that share a 16-byte bank group are read one after another.
uint64_t conflict_cycles(const uint16_t* const* rows) {
  int taken[8] = {}, most = 0;
  for (int i = 0; i < 8; ++i) most = std::max(most, ++taken[(reinterpret_cast<uintptr_t>(rows[i]) >> 4) & 7]);
  return static_cast<uint64_t>(most - 1);
}

void run_ldmatrix(uint32_t, void** arguments, Warp& warp) {
  const auto& first = *static_cast<LdmatrixArgument*>(arguments[0]);
  const int matrices = first.matrices;
  const uint16_t* rows[32];
  for (int i = 0; i < 8 * matrices; ++i) {
    const auto& x = *static_cast<LdmatrixArgument*>(arguments[i]);
    if (reinterpret_cast<uintptr_t>(x.row) % 16 != 0) {
      fault("alignment", x.site, "ldmatrix: the row address of lane {} is no multiple of 16", i);
    }
    shared_offset(*warp.block, x.row, 16, "ldmatrix", x.site);
    race::access(&warp.block->threads[warp.id * 32 + i], x.row, 16, false, false, x.site);
    rows[i] = static_cast<const uint16_t*>(x.row);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto low = layout::ldmatrix(lane, 0, first.transposed), high = layout::ldmatrix(lane, 1, first.transposed);
    uint32_t* registers = static_cast<LdmatrixArgument*>(arguments[lane])->registers;
    for (int j = 0; j < matrices; ++j) {
      registers[j] = rows[8 * j + low.row][low.column] | static_cast<uint32_t>(rows[8 * j + high.row][high.column])
                                                             << 16;
    }
  }
  ++warp.block->statistics.ldmatrix;
  for (int j = 0; j < matrices; ++j) warp.block->statistics.ldmatrix_conflicts += conflict_cycles(rows + 8 * j);
}

}  // namespace

void mma_m16n8k16_bf16(float* d, const uint32_t* a, const uint32_t* b, Site site) {
  MmaArgument argument{d, a, b};
  rendezvous(kFullWarp, "mma.sync", site, &argument, run_mma, true);
}

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Site site) {
  LdmatrixArgument argument{registers, row, matrices, transposed, site};
  rendezvous(kFullWarp, "ldmatrix", site, &argument, run_ldmatrix, true);
}

void set_max_registers(int count, bool, Site site) {
  if (count < 24 || count > 256 || count % 8 != 0)
    fault("setmaxnreg", site, "{} is no multiple of 8 in 24..256", count);
  struct Argument {
    int count;
    Site site;
  } argument{count, site};
  rendezvous(
      kFullWarp, "setmaxnreg", site, &argument,
      [](uint32_t, void** arguments, Warp& warp) {
        const auto& a = *static_cast<Argument*>(arguments[0]);
        warp.registers = a.count;
        int sum = 0;
        bool all = true;
        for (int w = 0; w < warp.block->num_warps; ++w) {
          sum += 32 * warp.block->warps[w].registers;
          all = all && warp.block->warps[w].registers != 0;
        }
        if (all && sum > 65536) fault("setmaxnreg", a.site, "the block asks for {} registers, an SM has 65536", sum);
      },
      true);
}

}  // namespace lightmoe::simulator
