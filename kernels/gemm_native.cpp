// gemm.h by hand: packed panels and register tiles (gemm_native_tile.h), f32 or bf16 products, any storage.
// Every element of C is alpha * (one chain of fused multiply-adds over k ascending, from zero) + beta * C, whatever the
// shape of the product, the way it is cut into tasks and the number of threads: hence the row independence of gemm.h.

#include <algorithm>

#include "kernels/gemm_epilogue.h"
#include "kernels/gemm_native_pack.h"
#include "kernels/gemm_native_rows.h"
#include "kernels/gemm_native_tile.h"
#include "runtime/parallel.h"

namespace lightmoe::native {
namespace {

constexpr int64_t kBlockSteps = 512, kChunkT = 1, kChunkN = 4;
constexpr int64_t kSerialFlop = 1 << 20;  // a product under this is not worth waking threads
constexpr int64_t kTasksPerThread = 4;
constexpr int64_t kTaskSizes[][2] = {{392, 512}, {196, 512}, {196, 256}, {112, 256}, {112, 128}, {56, 64}};

struct Task {  // rows and columns of C of one problem
  const GemmProblem* problem;
  int64_t row, rows, column, columns;
};

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }
int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Packed A and B of one block of k, and the sums: of the whole task when k takes several blocks, else of a tile.
struct Workspace {
  std::shared_ptr<Buffer> memory;
  uint32_t *a, *b;
  float* sums;
  Workspace(int64_t a_dwords, int64_t b_dwords, int64_t num_sums) {
    a_dwords = round_up(a_dwords + kLanes, 16), b_dwords = round_up(b_dwords + kLanes, 16);
    memory = Buffer::allocate(static_cast<size_t>(a_dwords + b_dwords + num_sums) * 4, DeviceKind::kCpu,
                              MemoryCategory::kScratch);
    a = static_cast<uint32_t*>(memory->data()), b = a + a_dwords;
    sums = reinterpret_cast<float*>(b + b_dwords);
  }
};

class BlockedTask {
 public:
  BlockedTask(const Task& task, const GemmProblems& all)
      : p_(*task.problem),
        compute_(all.compute),
        rows_(task.row, task.rows, 1, kMaxRows),
        columns_(task.column, task.columns, kLanes, kMaxVectors),
        steps_(steps_of(all.compute, p_.k)),
        block_steps_(std::min(steps_, kBlockSteps)),
        one_block_(steps_ <= kBlockSteps),
        chunk_panels_(p_.b.transposed ? kChunkT : kChunkN),
        space_(task.rows * block_steps_, chunk_panels_ * kColumns * block_steps_,
               one_block_ ? kMaxRows * kColumns : task.rows * columns_.padded()),
        out_{p_.c, p_.c_dtype, p_.c_stride, static_cast<float>(all.alpha), static_cast<float>(all.beta)} {}

  void run() {
    for (int64_t step = 0; step == 0 || step < steps_; step += kBlockSteps) {
      const int64_t k_begin = step * k_per_step(compute_);
      const int64_t k_end = std::min(p_.k, (step + kBlockSteps) * k_per_step(compute_));
      pack(panels_of_a(p_, compute_), rows_, 0, rows_.count, k_begin, k_end, block_steps_, space_.a);
      for (int64_t j = 0; j < columns_.count; j += chunk_panels_) {
        const int64_t end = std::min(j + chunk_panels_, columns_.count);
        pack(panels_of_b(p_, compute_), columns_, j, end, k_begin, k_end, block_steps_, space_.b);
        multiply(j, end, std::min(kBlockSteps, steps_ - step), step == 0, step + kBlockSteps >= steps_);
      }
    }
  }

 private:
  void multiply(int64_t begin, int64_t end, int64_t steps, bool first, bool last) {
    for (int64_t j = begin; j < end; ++j) {
      const int width = columns_.width(j);
      const uint32_t* b = space_.b + (columns_.begin(j) - columns_.begin(begin)) * block_steps_;
      for (int64_t i = 0; i < rows_.count; ++i) {
        const int height = rows_.width(i);
        const uint32_t* a = space_.a + rows_.begin(i) * block_steps_;
        float* sums = space_.sums + (one_block_ ? 0 : rows_.begin(i) * columns_.padded() + columns_.begin(j) * height);
        const int64_t row = rows_.first + rows_.begin(i), column = columns_.first + columns_.begin(j);
        const bool direct = last && out_.dtype == DType::kF32 && columns_.lanes_in(j) == width;
        float* c = direct ? static_cast<float*>(out_.c) + row * out_.stride + column : nullptr;
        tile_function(compute_, height,
                      width / kLanes)({steps, a, b, sums, first, c, out_.stride, out_.alpha, out_.beta});
        if (last && !direct) write_tile(out_, row, column, height, columns_.lanes_in(j), sums, width);
      }
    }
  }

  const GemmProblem& p_;
  const GemmCompute compute_;
  const Panels rows_, columns_;
  const int64_t steps_, block_steps_;
  const bool one_block_;
  const int64_t chunk_panels_;
  Workspace space_;
  const TileOutput out_;
};

// Problems cut into tasks, the largest ones of which still keep all threads busy.
std::vector<Task> tasks_of(const GemmProblems& all) {
  int64_t flop = 0;
  for (const GemmProblem& p : all.items) flop += 2 * p.m * p.n * std::max<int64_t>(p.k, 1);
  const int64_t wanted = flop < kSerialFlop ? 1 : kTasksPerThread * num_threads();
  std::vector<Task> tasks;
  for (const auto [max_rows, max_columns] : kTaskSizes) {
    tasks.clear();
    for (const GemmProblem& p : all.items) {
      const int64_t down = pieces_of(p.m, max_rows), across = pieces_of(p.n, max_columns);
      const int64_t rows = pieces_of(p.m, down), columns = round_up(pieces_of(p.n, across), kColumns);
      for (int64_t j = 0; j < p.n; j += columns) {
        for (int64_t i = 0; i < p.m; i += rows) {
          tasks.push_back({&p, i, std::min(rows, p.m - i), j, std::min(columns, p.n - j)});
        }
      }
    }
    if (static_cast<int64_t>(tasks.size()) >= wanted) break;
  }
  return tasks;
}

void multiply(const GemmProblems& all) {
  const std::vector<Task> tasks = tasks_of(all);
  const auto run_task = [&](int64_t i) {
    const Task& task = tasks[static_cast<size_t>(i)];
    if (has_few_rows(*task.problem))
      multiply_few_rows(*task.problem, all, task.column, task.column + task.columns);
    else
      BlockedTask(task, all).run();
  };
  parallel_items(static_cast<int64_t>(tasks.size()), run_task);
}

// With an epilogue: the product of each problem in f32, then row by row what becomes of it.
void multiply_and_finish(const GemmProblems& all) {
  if (all.epilogue.kind == GemmEpilogueKind::kNone) return multiply(all);
  for (const GemmProblem& p : all.items) {
    const MemoryScope scope(MemoryCategory::kScratch);
    const Tensor product = Tensor::empty({p.m, p.n}, DType::kF32, DeviceKind::kCpu);
    GemmProblems plain{.alpha = all.alpha, .beta = 0, .compute = all.compute};
    plain.items = {p};
    plain.items[0].c = product.raw(), plain.items[0].c_dtype = DType::kF32, plain.items[0].c_stride = p.n;
    multiply(plain);
    parallel_for(0, p.m, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish_row(all, p, i, product.data<float>() + i * p.n);
    });
  }
}

bool supports(const GemmDesc& desc) { return desc.device == DeviceKind::kCpu && desc.c != DType::kF64; }

double cost(const GemmDesc& desc) {
  const double m = static_cast<double>(desc.m), n = static_cast<double>(desc.n), k = static_cast<double>(desc.k);
  return 2 * m * n * k / (1e5 * num_threads());
}

const RegisterGemmBackend native{{
    .name = "native",
    .supports = &supports,
    .cost = &cost,
    .dense = [](const Gemm& op) { multiply_and_finish(problems_of(op)); },
    .grouped_m = [](const GroupedGemmM& op) { multiply_and_finish(problems_of(op)); },
    .grouped_k = [](const GroupedGemmK& op) { multiply(problems_of(op)); },
}};

}  // namespace
}  // namespace lightmoe::native
