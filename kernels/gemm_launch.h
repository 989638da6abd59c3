#pragma once
// What every GPU backend of gemm.h works on: one kernel launch, as plain data that travels as the kernel's parameter.
// The host knows the addresses of a product's groups but not their sizes: offsets stay in device memory, where the dispatch plan wrote
// them, so that a training step never waits for the host. The grid is therefore an upper bound of the tiles (tiles_of) and each
// block finds its group itself (gemm_tiles.h). Addresses of groups travel in the launch: no copy to the device, and a captured graph
// holds them. A launch takes kMaxLaunchGroups groups; more groups take several launches.

#include <vector>

#include "kernels/gemm.h"

namespace lightmoe {

inline constexpr int kMaxLaunchGroups = 128;  // keeps the parameter below 4 KB, which every driver takes

struct GemmOperand {  // stored row r starts at element (rows ? rows[r] : r) * stride
  const void* data;
  const int32_t* rows;
  int64_t stride;
};

// gemm.h's epilogue; rows are those of all groups. Backends' kernels get dots as [tiles of columns][dots_stride], what each tile sums up.
struct GemmLaunchEpilogue {
  GemmEpilogueKind kind;
  const void* scales;  // f32; null: 1
  const int32_t* scale_rows;
  const void* h;
  void *activated, *dots;
  int64_t dots_stride;
  constexpr bool swiglu() const { return kind == GemmEpilogueKind::kSwiGlu; }
};

struct GemmLaunch {
  GemmKind kind;
  DType a_type, b_type, c_type;
  bool trans_a, trans_b, round;  // round: f32 factors are rounded to bf16
  GemmOperand a, b;              // kGroupedM: b.data stands in group_data
  void* c;                       // kGroupedK: stands in group_data
  int64_t c_stride;
  GemmLaunchEpilogue epilogue;
  int m, n, k;  // kGroupedM: m, kGroupedK: k is an upper bound of the rows of all groups
  double alpha, beta;
  // kGroupedM: group i has matrix group_data[i] (null: skipped) and the rows [offsets[i], offsets[i + 1]).
  // kGroupedK: output i is group_data[i], the sum over the groups member[first[i] .. first[i + 1]) in that order.
  const int32_t* offsets;
  int num_groups;
  void* group_data[kMaxLaunchGroups];
  int32_t first[kMaxLaunchGroups + 1], member[kMaxLaunchGroups];
};

// A product with nothing to write has no launches.
std::vector<GemmLaunch> launches_of(const Gemm& op);
std::vector<GemmLaunch> launches_of(const GroupedGemmM& op);
std::vector<GemmLaunch> launches_of(const GroupedGemmK& op);

// Blocks of a grid whose blocks own rows x columns of C each: at least as many as there are tiles.
int64_t tiles_of(const GemmLaunch& launch, int rows, int columns);
// FLOPs with every group's rows rounded up to whole tiles: what a tiled backend computes, for its cost.
double tiled_flops(const GemmDesc& desc, int rows, int columns);
// Bytes of A, B and C, each once.
double bytes_moved(const GemmDesc& desc);

}  // namespace lightmoe
