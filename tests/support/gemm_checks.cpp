#include "tests/support/gemm_checks.h"

#include <cstring>

namespace lightmoe::testing {
namespace {

// Where the window begins, and the width of a matrix whose window ends at `end`.
int64_t first_column(Window window, int64_t odd) {
  return window == Window::kNone ? 0 : window == Window::kOdd ? odd : 8;
}
int64_t width(Window window, int64_t end) {
  return window == Window::kNone ? end : window == Window::kOdd ? end + 1 : (end + 15) / 8 * 8;
}

// op(X) in double, rounded to bf16 where the product is.
struct Factors {
  std::vector<double> values;
  int64_t stride;
  bool transposed;
  Factors(const Tensor& x, bool trans, GemmCompute compute)
      : values(to_doubles(x)), stride(x.dim(1)), transposed(trans) {
    if (compute == GemmCompute::kF32 || x.dtype() == DType::kF64) return;
    for (double& v : values) v = static_cast<float>(bf16(static_cast<float>(v)));
  }
  double at(int64_t i, int64_t j) const {
    return values[static_cast<size_t>(transposed ? j * stride + i : i * stride + j)];
  }
};

// C before the call, with the part outside the window, which must keep its bits.
struct Output {
  Guarded memory;
  Tensor before, after;  // in host memory
  std::vector<double> expected;
  Output(const Shape& shape, DType dtype, double beta) : memory(shape, dtype) {
    if (beta != 0) memory.tensor().copy_from(random_tensor(shape, dtype, 99));
    before = memory.tensor().clone().on(DeviceKind::kCpu);  // NaN everywhere when beta is 0
    expected = to_doubles(before);
  }
  void read() { after = memory.tensor().on(DeviceKind::kCpu); }  // once the product is computed
  void add(int64_t i, int64_t j, double product, double beta) {
    double& e = expected[static_cast<size_t>(i * before.dim(1) + j)];
    e = product + (beta == 0 ? 0 : beta * e);
  }
  // Sums of k products of unit normals are of size sqrt(k); each rounding is relative to the largest partial sum.
  void check(const GemmScales& s, int64_t k) const {
    const double size = std::abs(s.alpha) * std::sqrt(static_cast<double>(k)) + std::abs(s.beta);
    const double tolerance = sum_tolerance(before.dtype(), k);
    EXPECT_TRUE(close(memory.tensor(), expected, tolerance, tolerance * size));
  }
  void check_untouched(int64_t i, int64_t j) const {
    const size_t size = size_of(before.dtype()), at = static_cast<size_t>(i * before.dim(1) + j) * size;
    const char *now = static_cast<const char*>(after.raw()), *was = static_cast<const char*>(before.raw());
    EXPECT_EQ(std::memcmp(now + at, was + at, size), 0) << "outside the window: " << i << ", " << j;
  }
};

}  // namespace

void check_dense(const cases::GemmCase& c, const GemmTypes& t, bool trans_a, bool trans_b, const GemmScales& s,
                 Window window) {
  SCOPED_TRACE(::testing::Message() << c.m << "x" << c.n << "x" << c.k << (trans_a ? " t" : " n")
                                    << (trans_b ? "t " : "n ") << name_of(t.a) << name_of(t.b) << name_of(t.c)
                                    << (t.compute == GemmCompute::kBF16 ? " bf16 " : " f32 ") << s.alpha << " "
                                    << s.beta << " window " << static_cast<int>(window));
  const int64_t a_column = first_column(window, 3), c_column = window == Window::kNone ? 0 : 5, extra = 2;
  const Shape a_shape = trans_a ? Shape{c.k, width(window, a_column + c.m)} : Shape{c.m, width(window, a_column + c.k)};
  const Tensor a = random_tensor(a_shape, t.a, 1),
               b = random_tensor(trans_b ? Shape{c.n, c.k} : Shape{c.k, c.n}, t.b, 2);
  Output out({c.m, c_column + c.n + (window == Window::kNone ? 0 : extra)}, t.c, s.beta);
  run(Gemm{.a = a,
           .b = b,
           .c = out.memory.tensor(),
           .trans_a = trans_a,
           .trans_b = trans_b,
           .alpha = s.alpha,
           .beta = s.beta,
           .compute = t.compute,
           .a_column = a_column,
           .c_column = c_column});
  out.read();
  const Factors fa(a, trans_a, t.compute), fb(b, trans_b, t.compute);
  for (int64_t i = 0; i < c.m; ++i) {
    for (int64_t j = 0; j < c.n; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < c.k; ++k) {
        sum += (trans_a ? fa.at(i + a_column, k) : fa.at(i, k + a_column)) * fb.at(k, j);
      }
      out.add(i, c_column + j, s.alpha * sum, s.beta);
    }
    for (int64_t j = 0; j < c_column; ++j) out.check_untouched(i, j);
    for (int64_t j = c_column + c.n; j < out.before.dim(1); ++j) out.check_untouched(i, j);
  }
  out.check(s, c.k);
}

Tensor offsets_of(const std::vector<int64_t>& rows) {
  std::vector<int32_t> offsets = {0};
  for (const int64_t r : rows) offsets.push_back(offsets.back() + static_cast<int32_t>(r));
  return Tensor::from(offsets, {static_cast<int64_t>(offsets.size())});
}

namespace {

// R indices below `limit`, with repeats.
Tensor random_rows(int64_t count, int64_t limit, uint64_t seed) {
  Philox random(seed, 5);
  std::vector<int32_t> rows(static_cast<size_t>(count));
  for (int32_t& r : rows) r = static_cast<int32_t>(random.below(static_cast<uint64_t>(limit)));
  return Tensor::from(rows, {count});
}

// Index lists in host memory, for the oracle.
std::vector<int32_t> indices(const Tensor& t) {
  if (!t.defined()) return {};
  const Tensor host = t.on(DeviceKind::kCpu);
  return {host.data<int32_t>(), host.data<int32_t>() + host.numel()};
}

}  // namespace

void check_grouped_m(const cases::GroupedCase& c, const GemmTypes& t, const GroupedVariant& v, const GemmScales& s) {
  SCOPED_TRACE(::testing::Message() << "grouped_m g=" << c.rows.size() << " n=" << c.n << " k=" << c.k << " "
                                    << name_of(t.a) << name_of(t.b) << name_of(t.c) << " "
                                    << static_cast<int>(t.compute) << " gather " << v.gather << " window "
                                    << static_cast<int>(v.window) << " skip " << v.skip << " trans " << v.trans_b << " "
                                    << s.alpha << " " << s.beta);
  const Tensor offsets = offsets_of(c.rows);
  const std::vector<int32_t> offset = indices(offsets);
  const int64_t rows = offset[c.rows.size()], a_rows = v.gather ? rows / 2 + 3 : rows;
  const int64_t a_column = first_column(v.window, 7), c_column = v.window == Window::kNone ? 0 : 4;
  const Tensor a = random_tensor({a_rows, width(v.window, a_column + c.k)}, t.a, 3);
  GroupedGemmM op{.a = a,
                  .offsets = offsets,
                  .trans_b = v.trans_b,
                  .alpha = s.alpha,
                  .beta = s.beta,
                  .compute = t.compute,
                  .a_column = a_column,
                  .c_column = c_column};
  if (v.gather) op.a_rows = random_rows(rows, a_rows, 11);
  for (size_t g = 0; g < c.rows.size(); ++g) {
    const bool skipped = v.skip && g % 3 == 1;
    op.b.push_back(skipped ? Tensor() : random_tensor(v.trans_b ? Shape{c.n, c.k} : Shape{c.k, c.n}, t.b, 20 + g));
  }
  Output out({rows, c_column + c.n + 1}, t.c, s.beta);
  op.c = out.memory.tensor();
  run(op);
  out.read();
  const Factors fa(a, false, t.compute);
  const std::vector<int32_t> taken = indices(op.a_rows);
  for (size_t g = 0; g < c.rows.size(); ++g) {
    for (int64_t i = offset[g]; i < offset[g + 1]; ++i) {
      out.check_untouched(i, c_column + c.n);
      if (!op.b[g].defined()) {
        for (int64_t j = 0; j < c.n; ++j) out.check_untouched(i, c_column + j);
        continue;
      }
      const Factors fb(op.b[g], v.trans_b, t.compute);
      for (int64_t j = 0; j < c.n; ++j) {
        double sum = 0;
        const int64_t row = v.gather ? taken[static_cast<size_t>(i)] : i;
        for (int64_t k = 0; k < c.k; ++k) sum += fa.at(row, a_column + k) * fb.at(k, j);
        out.add(i, c_column + j, s.alpha * sum, s.beta);
      }
    }
  }
  out.check(s, c.k);
}

void check_grouped_k(const cases::GroupedCase& c, const GemmTypes& t, const GroupedVariant& v, const GemmScales& s,
                     bool repeat) {
  const int64_t m = c.k, n = c.n;
  SCOPED_TRACE(::testing::Message() << "grouped_k g=" << c.rows.size() << " m=" << m << " n=" << n << " "
                                    << name_of(t.a) << name_of(t.b) << name_of(t.c) << " "
                                    << static_cast<int>(t.compute) << " gather " << v.gather << " window "
                                    << static_cast<int>(v.window) << " skip " << v.skip << " repeat " << repeat << " "
                                    << s.alpha << " " << s.beta);
  const Tensor offsets = offsets_of(c.rows);
  const std::vector<int32_t> offset = indices(offsets);
  const int64_t rows = offset[c.rows.size()];
  const int64_t stored = v.gather ? rows / 2 + 3 : rows, a_column = first_column(v.window, 6),
                b_column = first_column(v.window, 2);
  const Tensor a = random_tensor({stored, width(v.window, a_column + m)}, t.a, 4);
  const Tensor b = random_tensor(
      {v.gather ? stored + 5 : stored, v.window == Window::kAligned ? width(v.window, b_column + n) : b_column + n},
      t.b, 5);
  GroupedGemmK op{.a = a,
                  .b = b,
                  .offsets = offsets,
                  .alpha = s.alpha,
                  .beta = s.beta,
                  .compute = t.compute,
                  .a_column = a_column,
                  .b_column = b_column};
  if (v.gather) op.a_rows = random_rows(rows, stored, 12), op.b_rows = random_rows(rows, stored + 5, 13);
  const size_t groups = c.rows.size(), outputs = repeat ? (groups + 1) / 2 : groups;
  std::vector<std::unique_ptr<Output>> out;
  for (size_t g = 0; g < outputs; ++g) out.push_back(std::make_unique<Output>(Shape{m, n}, t.c, s.beta));
  std::vector<bool> seen(outputs, false);
  for (size_t g = 0; g < groups; ++g) {
    op.c.push_back(v.skip && g % 3 == 1 ? Tensor() : out[g % outputs]->memory.tensor());
  }
  run(op);
  const Factors fa(a, false, t.compute), fb(b, false, t.compute);
  const std::vector<int32_t> a_taken = indices(op.a_rows), b_taken = indices(op.b_rows);
  for (size_t g = 0; g < groups; ++g) {
    if (!op.c[g].defined()) continue;
    const double beta = seen[g % outputs] ? 1 : s.beta;
    seen[g % outputs] = true;
    for (int64_t i = 0; i < m * n; ++i) {
      double sum = 0;
      for (int32_t r = offset[g]; r < offset[g + 1]; ++r) {
        const size_t at = static_cast<size_t>(r);
        const int64_t ra = v.gather ? a_taken[at] : r, rb = v.gather ? b_taken[at] : r;
        sum += fa.at(ra, a_column + i / n) * fb.at(rb, b_column + i % n);
      }
      out[g % outputs]->add(i / n, i % n, s.alpha * sum, beta);
    }
  }
  for (const auto& o : out) o->check(s, rows);  // an output of skipped groups alone still holds what it held
}

void check_one_output(const GemmTypes& t, int64_t groups) {
  const std::vector<int64_t> rows(static_cast<size_t>(groups), 2);
  const int64_t m = 16, n = 8;
  const Tensor a = random_tensor({2 * groups, m}, t.a, 4), b = random_tensor({2 * groups, n}, t.b, 5);
  Output out({m, n}, t.c, -1);
  GroupedGemmK op{.a = a, .b = b, .offsets = offsets_of(rows), .beta = -1, .compute = t.compute};
  op.c.assign(rows.size(), out.memory.tensor());
  run(op);
  const Factors fa(a, true, t.compute), fb(b, false, t.compute);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t k = 0; k < 2 * groups; ++k) sum += fa.at(i, k) * fb.at(k, j);
      out.add(i, j, sum, -1);
    }
  }
  out.check({1, -1}, 2 * groups);
}

// Names of the backends that compute something on this device.
std::set<std::string_view> backends_of(DeviceKind device) {
  std::set<std::string_view> names;
  for (const GemmBackend& backend : gemm_backends()) {
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      GemmDesc desc{.kind = GemmKind::kDense,
                    .device = device,
                    .a = dtype,
                    .b = dtype,
                    .c = dtype,
                    .m = 64,
                    .n = 64,
                    .k = 64,
                    .groups = 1,
                    .alignment = 16};
      if (backend.supports(desc)) names.insert(backend.name);
      desc.m = 8, desc.trans_b = true;
      if (backend.supports(desc)) names.insert(backend.name);
    }
  }
  return names;
}

}  // namespace lightmoe::testing
