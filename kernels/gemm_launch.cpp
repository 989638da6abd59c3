#include "kernels/gemm_launch.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

namespace lightmoe {
namespace {

void* at_column(const Tensor& t, int64_t column) {
  return static_cast<char*>(t.raw()) + column * static_cast<int64_t>(size_of(t.dtype()));
}
GemmOperand operand(const Tensor& t, const Tensor& rows, int64_t column) {
  return {at_column(t, column), rows.defined() ? rows.data<int32_t>() : nullptr, t.dim(1)};
}
int to_int(int64_t size) {
  check(size <= std::numeric_limits<int>::max(), ErrorKind::kUsage,
        "gemm: a dimension of {} is more than kernels count", size);
  return static_cast<int>(size);
}
int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

const Tensor& written(const Tensor& c, const GemmEpilogue& e) { return c.defined() ? c : e.activated; }

// Where the results go.
void set_output(GemmLaunch& p, const Tensor& c, int64_t column, const GemmEpilogue& e) {
  p.c_type = written(c, e).dtype(), p.m = to_int(written(c, e).dim(0));
  if (c.defined()) p.c = at_column(c, column), p.c_stride = c.dim(1);
  const auto data = [](const Tensor& t) { return t.defined() ? t.raw() : nullptr; };
  p.epilogue = {.kind = e.kind,
                .scales = data(e.scales),
                .scale_rows = e.scale_rows.defined() ? e.scale_rows.data<int32_t>() : nullptr,
                .h = data(e.h),
                .activated = data(e.activated),
                .dots = data(e.dots),
                .dots_stride = 0};
}

// Groups of each output of a GroupedGemmK, outputs in the order of their first group.
std::vector<std::vector<int32_t>> groups_of_outputs(const GroupedGemmK& op) {
  std::vector<std::vector<int32_t>> outputs;
  std::map<const void*, size_t> output_of;
  for (size_t g = 0; g < op.c.size(); ++g) {
    if (!op.c[g].defined() || op.c[g].numel() == 0) continue;
    const auto [found, is_new] = output_of.emplace(op.c[g].raw(), outputs.size());
    if (is_new) outputs.emplace_back();
    outputs[found->second].push_back(static_cast<int32_t>(g));
  }
  return outputs;
}

}  // namespace

std::vector<GemmLaunch> launches_of(const Gemm& op) {
  GemmLaunch p{.kind = GemmKind::kDense, .a_type = op.a.dtype(), .b_type = op.b.dtype()};
  set_output(p, op.c, op.c_column, op.epilogue);
  p.trans_a = op.trans_a, p.trans_b = op.trans_b;
  p.round = op.compute == GemmCompute::kBF16;
  p.a = operand(op.a, {}, op.a_column), p.b = operand(op.b, {}, 0);
  p.n = to_int(op.b.dim(op.trans_b ? 0 : 1)), p.k = to_int(op.b.dim(op.trans_b ? 1 : 0));
  p.alpha = op.alpha, p.beta = op.beta;
  if (p.m == 0 || p.n == 0) return {};
  return {p};
}

std::vector<GemmLaunch> launches_of(const GroupedGemmM& op) {
  const auto b = std::find_if(op.b.begin(), op.b.end(), [](const Tensor& t) { return t.defined(); });
  GemmLaunch p{.kind = GemmKind::kGroupedM, .a_type = op.a.dtype(), .b_type = b->dtype()};
  set_output(p, op.c, op.c_column, op.epilogue);
  p.trans_b = op.trans_b;
  p.round = op.compute == GemmCompute::kBF16;
  p.a = operand(op.a, op.a_rows, op.a_column), p.b = {nullptr, nullptr, b->dim(1)};
  p.n = to_int(b->dim(op.trans_b ? 0 : 1)), p.k = to_int(b->dim(op.trans_b ? 1 : 0));
  p.alpha = op.alpha, p.beta = op.beta;
  std::vector<GemmLaunch> launches;
  if (p.m == 0 || p.n == 0) return launches;
  for (size_t begin = 0; begin < op.b.size(); begin += kMaxLaunchGroups) {
    p.offsets = op.offsets.data<int32_t>() + begin;
    p.num_groups = static_cast<int>(std::min<size_t>(op.b.size() - begin, kMaxLaunchGroups));
    bool any = false;
    for (int g = 0; g < p.num_groups; ++g) {
      const Tensor& matrix = op.b[begin + static_cast<size_t>(g)];
      // An empty matrix (k = 0) has no address, yet its group's rows are written.
      p.group_data[g] = !matrix.defined()         ? nullptr
                        : matrix.raw() != nullptr ? matrix.raw()
                                                  : written(op.c, op.epilogue).raw();
      any |= matrix.defined();
    }
    if (any) launches.push_back(p);
  }
  return launches;
}

std::vector<GemmLaunch> launches_of(const GroupedGemmK& op) {
  std::vector<GemmLaunch> launches;
  for (const std::vector<int32_t>& groups : groups_of_outputs(op)) {
    const Tensor& c = op.c[static_cast<size_t>(groups[0])];
    for (size_t begin = 0; begin < groups.size(); begin += kMaxLaunchGroups) {
      const size_t count = std::min<size_t>(groups.size() - begin, kMaxLaunchGroups);
      const double beta = begin == 0 ? op.beta : 1;
      GemmLaunch* p = launches.empty() ? nullptr : &launches.back();
      if (p == nullptr || p->beta != beta || p->first[p->num_groups] + count > kMaxLaunchGroups) {
        p = &launches.emplace_back(GemmLaunch{
            .kind = GemmKind::kGroupedK, .a_type = op.a.dtype(), .b_type = op.b.dtype(), .c_type = c.dtype()});
        p->trans_a = true;
        p->round = op.compute == GemmCompute::kBF16;
        p->a = operand(op.a, op.a_rows, op.a_column), p->b = operand(op.b, op.b_rows, op.b_column);
        p->c_stride = c.dim(1), p->m = to_int(c.dim(0)), p->n = to_int(c.dim(1));
        p->k = to_int((op.a_rows.defined() ? op.a_rows : op.a).dim(0));
        p->alpha = op.alpha, p->beta = beta, p->offsets = op.offsets.data<int32_t>();
      }
      const int i = p->num_groups++;
      p->group_data[i] = c.raw();
      std::copy_n(groups.begin() + static_cast<int64_t>(begin), count, p->member + p->first[i]);
      p->first[i + 1] = p->first[i] + static_cast<int32_t>(count);
    }
  }
  return launches;
}

int64_t tiles_of(const GemmLaunch& launch, int rows, int columns) {
  const int64_t across = ceil_div(launch.n, columns);
  if (launch.kind == GemmKind::kDense) return ceil_div(launch.m, rows) * across;
  if (launch.kind == GemmKind::kGroupedK) return launch.num_groups * ceil_div(launch.m, rows) * across;
  // Each group has at most one tile that is not full.
  return (launch.m / rows + std::min(launch.num_groups, launch.m)) * across;
}

double tiled_flops(const GemmDesc& desc, int rows, int columns) {
  const double groups = static_cast<double>(desc.groups), n = static_cast<double>(ceil_div(desc.n, columns) * columns);
  if (desc.kind == GemmKind::kGroupedK) {
    return 2 * static_cast<double>(ceil_div(desc.m, rows) * rows) * n * static_cast<double>(desc.k);
  }
  const double mean = std::max(1.0, std::ceil(static_cast<double>(desc.m) / (groups * rows))) * rows;
  return 2 * std::min(mean * groups, static_cast<double>(desc.m) * rows) * n * static_cast<double>(desc.k);
}

double bytes_moved(const GemmDesc& desc) {
  const double m = static_cast<double>(desc.m), n = static_cast<double>(desc.n), k = static_cast<double>(desc.k);
  const double b_matrices = desc.kind == GemmKind::kGroupedM ? static_cast<double>(desc.groups) : 1;
  const double c_matrices = desc.kind == GemmKind::kGroupedK ? static_cast<double>(desc.groups) : 1;
  return m * k * static_cast<double>(size_of(desc.a)) + n * k * b_matrices * static_cast<double>(size_of(desc.b)) +
         m * n * c_matrices * static_cast<double>(size_of(desc.c));
}

}  // namespace lightmoe
