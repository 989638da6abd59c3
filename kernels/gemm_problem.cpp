#include "kernels/gemm_problem.h"

#include <map>

namespace lightmoe {
namespace {

void* element(const Tensor& t, int64_t row, int64_t column) {
  const int64_t offset = (row * t.dim(1) + column) * static_cast<int64_t>(size_of(t.dtype()));
  return static_cast<char*>(t.raw()) + offset;
}

GemmMatrix matrix(const Tensor& t, bool transposed, int64_t column = 0) {
  return {element(t, 0, column), t.dtype(), t.dim(1), nullptr, transposed};
}

// Stored rows [begin, ...) of t, through the row list if there is one.
GemmMatrix rows_of(const Tensor& t, const Tensor& rows, int64_t begin, bool transposed, int64_t column) {
  if (!rows.defined()) return {element(t, begin, column), t.dtype(), t.dim(1), nullptr, transposed};
  return {element(t, 0, column), t.dtype(), t.dim(1), rows.data<int32_t>() + begin, transposed};
}

void set_output(GemmProblem& p, const Tensor& c, const GemmEpilogue& epilogue, int64_t row, int64_t column) {
  p.first_row = row;
  p.c_dtype = (c.defined() ? c : epilogue.activated).dtype();
  if (c.defined()) p.c = element(c, row, column), p.c_stride = c.dim(1);
}

void append_rows(std::vector<int32_t>& list, const Tensor& rows, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    list.push_back(rows.defined() ? rows.data<int32_t>()[r] : static_cast<int32_t>(r));
  }
}

}  // namespace

GemmProblems problems_of(const Gemm& op) {
  GemmProblems out{.alpha = op.alpha, .beta = op.beta, .compute = op.compute, .epilogue = op.epilogue};
  GemmProblem p{.a = matrix(op.a, op.trans_a, op.a_column), .b = matrix(op.b, op.trans_b)};
  set_output(p, op.c, op.epilogue, 0, op.c_column);
  p.m = (op.c.defined() ? op.c : op.epilogue.activated).dim(0), p.n = op.b.dim(op.trans_b ? 0 : 1),
  p.k = op.b.dim(op.trans_b ? 1 : 0);
  if (p.m > 0 && p.n > 0) out.items.push_back(p);
  return out;
}

GemmProblems problems_of(const GroupedGemmM& op) {
  GemmProblems out{.alpha = op.alpha, .beta = op.beta, .compute = op.compute, .epilogue = op.epilogue};
  const int32_t* offsets = op.offsets.data<int32_t>();
  for (size_t g = 0; g < op.b.size(); ++g) {
    const Tensor& b = op.b[g];
    if (!b.defined()) continue;
    GemmProblem p{.a = rows_of(op.a, op.a_rows, offsets[g], false, op.a_column), .b = matrix(b, op.trans_b)};
    set_output(p, op.c, op.epilogue, offsets[g], op.c_column);
    p.m = offsets[g + 1] - offsets[g], p.n = b.dim(op.trans_b ? 0 : 1), p.k = b.dim(op.trans_b ? 1 : 0);
    if (p.m > 0 && p.n > 0) out.items.push_back(p);
  }
  return out;
}

GemmProblems problems_of(const GroupedGemmK& op) {
  GemmProblems out{.alpha = op.alpha, .beta = op.beta, .compute = op.compute};
  const int32_t* offsets = op.offsets.data<int32_t>();
  std::vector<std::vector<size_t>> members;  // groups of each problem, in group order
  std::map<const void*, size_t> problem_of;
  for (size_t g = 0; g < op.c.size(); ++g) {
    if (!op.c[g].defined() || op.c[g].numel() == 0) continue;
    const auto [found, is_new] = problem_of.emplace(op.c[g].raw(), members.size());
    if (is_new) members.emplace_back();
    members[found->second].push_back(g);
  }
  for (const std::vector<size_t>& groups : members) {
    const Tensor& c = op.c[groups[0]];
    const int64_t begin = offsets[groups[0]], end = offsets[groups[0] + 1];
    GemmProblem p{.a = rows_of(op.a, op.a_rows, begin, true, op.a_column),
                  .b = rows_of(op.b, op.b_rows, begin, false, op.b_column)};
    p.c = c.raw(), p.c_dtype = c.dtype(), p.c_stride = c.dim(1);
    p.m = c.dim(0), p.n = c.dim(1), p.k = end - begin;
    if (groups.size() > 1) {
      std::vector<int32_t> a_rows, b_rows;
      for (const size_t g : groups) {
        append_rows(a_rows, op.a_rows, offsets[g], offsets[g + 1]);
        append_rows(b_rows, op.b_rows, offsets[g], offsets[g + 1]);
      }
      p.k = static_cast<int64_t>(a_rows.size());
      p.a.data = element(op.a, 0, op.a_column), p.a.rows = out.joined_rows.emplace_back(std::move(a_rows)).data();
      p.b.data = element(op.b, 0, op.b_column), p.b.rows = out.joined_rows.emplace_back(std::move(b_rows)).data();
    }
    out.items.push_back(p);
  }
  return out;
}

}  // namespace lightmoe
