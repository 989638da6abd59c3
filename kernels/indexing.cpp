#include "kernels/indexing.h"

#include "runtime/parallel.h"

namespace lightmoe {
namespace {

void check_indices(const char* op, const Tensor& index, int64_t limit) {
  const int32_t* values = index.data<int32_t>();
  for (int64_t i = 0; i < index.numel(); ++i) {
    require(values[i] >= -1 && values[i] < limit, "{}: index {} of {} rows", op, values[i], limit);
  }
}

void lookup_cpu(const Lookup& op) {
  check_indices("lookup", op.index, op.table.dim(0));
  const int32_t *table = op.table.data<int32_t>(), *index = op.index.data<int32_t>();
  for (int64_t i = 0; i < op.index.numel(); ++i) op.y.data<int32_t>()[i] = index[i] < 0 ? -1 : table[index[i]];
}

void scatter_rows_cpu(const ScatterRows& op) {
  check_indices("scatter_rows", op.index, op.y.dim(0));
  const int32_t* index = op.index.data<int32_t>();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, op.x.dim(1)));
  parallel_for(0, op.x.dim(0), grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (index[r] >= 0) op.y.row(index[r]).copy_from(op.x.row(r));
    }
  });
}

const RegisterKernel<Lookup> register_lookup{DeviceKind::kCpu, &lookup_cpu};
const RegisterKernel<ScatterRows> register_scatter{DeviceKind::kCpu, &scatter_rows_cpu};

}  // namespace

void run(const Lookup& op) {
  require_tensor(op.table, "lookup", "table", {op.table.numel()}, DType::kI32);
  require_tensor(op.index, "lookup", "index", op.index.shape(), DType::kI32);
  require_tensor(op.y, "lookup", "y", op.index.shape(), DType::kI32);
  if (op.index.numel() > 0) dispatch(op, op.index.device(), "lookup");
}

void run(const ScatterRows& op) {
  require(op.x.rank() == 2 && op.y.rank() == 2 && op.x.dim(1) == op.y.dim(1), "scatter_rows: x is {}, y {}",
          op.x.shape(), op.y.shape());
  require_tensor(op.index, "scatter_rows", "index", {op.x.dim(0)}, DType::kI32);
  if (op.x.numel() > 0) dispatch(op, op.index.device(), "scatter_rows");
}

}  // namespace lightmoe
