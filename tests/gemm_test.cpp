#include "kernels/gemm.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "runtime/parallel.h"
#include "tests/cases/gemm.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

struct Types {
  DType a, b, c;
  GemmCompute compute;
};
const std::vector<Types> kTypes = {
    {DType::kF32, DType::kF32, DType::kF32, GemmCompute::kF32},
    {DType::kF32, DType::kF32, DType::kF32, GemmCompute::kBF16},
    {DType::kF32, DType::kBF16, DType::kF32, GemmCompute::kF32},
    {DType::kF32, DType::kBF16, DType::kBF16, GemmCompute::kBF16},
    {DType::kBF16, DType::kF32, DType::kBF16, GemmCompute::kF32},
    {DType::kBF16, DType::kBF16, DType::kF32, GemmCompute::kBF16},
    {DType::kBF16, DType::kBF16, DType::kBF16, GemmCompute::kF32},
    {DType::kF64, DType::kF64, DType::kF64, GemmCompute::kF32},
};
struct Scales {
  double alpha, beta;
};
const std::vector<Scales> kScales = {{1, 0}, {1, 1}, {-0.5, 0}, {0.75, -2}, {0, 0}, {0, 1}};

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
  void check(const Scales& s, int64_t k) const {
    const double size = std::abs(s.alpha) * std::sqrt(static_cast<double>(k)) + std::abs(s.beta);
    const double tolerance = testing::sum_tolerance(before.dtype(), k);
    EXPECT_TRUE(testing::close(memory.tensor(), expected, tolerance, tolerance * size));
  }
  void check_untouched(int64_t i, int64_t j) const {
    const size_t size = size_of(before.dtype()), at = static_cast<size_t>(i * before.dim(1) + j) * size;
    const char *now = static_cast<const char*>(after.raw()), *was = static_cast<const char*>(before.raw());
    EXPECT_EQ(std::memcmp(now + at, was + at, size), 0) << "outside the window: " << i << ", " << j;
  }
};

void check_dense(const cases::GemmCase& c, const Types& t, bool trans_a, bool trans_b, const Scales& s, bool window) {
  SCOPED_TRACE(::testing::Message() << c.m << "x" << c.n << "x" << c.k << (trans_a ? " t" : " n")
                                    << (trans_b ? "t " : "n ") << name_of(t.a) << name_of(t.b) << name_of(t.c)
                                    << (t.compute == GemmCompute::kBF16 ? " bf16 " : " f32 ") << s.alpha << " "
                                    << s.beta << (window ? " window" : ""));
  const int64_t a_column = window ? 3 : 0, c_column = window ? 5 : 0, extra = window ? 2 : 0;
  const Shape a_shape = trans_a ? Shape{c.k, a_column + c.m + extra} : Shape{c.m, a_column + c.k + extra};
  const Tensor a = random_tensor(a_shape, t.a, 1),
               b = random_tensor(trans_b ? Shape{c.n, c.k} : Shape{c.k, c.n}, t.b, 2);
  Output out({c.m, c_column + c.n + extra}, t.c, s.beta);
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

struct Variant {
  bool gather, window, skip, trans_b;
};

void check_grouped_m(const cases::GroupedCase& c, const Types& t, const Variant& v, const Scales& s) {
  SCOPED_TRACE(::testing::Message() << "grouped_m g=" << c.rows.size() << " n=" << c.n << " k=" << c.k << " "
                                    << name_of(t.a) << name_of(t.b) << name_of(t.c) << " "
                                    << static_cast<int>(t.compute) << " gather " << v.gather << " window " << v.window
                                    << " skip " << v.skip << " trans " << v.trans_b << " " << s.alpha << " " << s.beta);
  const Tensor offsets = offsets_of(c.rows);
  const std::vector<int32_t> offset = indices(offsets);
  const int64_t rows = offset[c.rows.size()], a_rows = v.gather ? rows / 2 + 3 : rows;
  const int64_t a_column = v.window ? 7 : 0, c_column = v.window ? 4 : 0;
  const Tensor a = random_tensor({a_rows, a_column + c.k + (v.window ? 1 : 0)}, t.a, 3);
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

void check_grouped_k(const cases::GroupedCase& c, const Types& t, const Variant& v, const Scales& s, bool repeat) {
  const int64_t m = c.k, n = c.n;
  SCOPED_TRACE(::testing::Message() << "grouped_k g=" << c.rows.size() << " m=" << m << " n=" << n << " "
                                    << name_of(t.a) << name_of(t.b) << name_of(t.c) << " "
                                    << static_cast<int>(t.compute) << " gather " << v.gather << " window " << v.window
                                    << " skip " << v.skip << " repeat " << repeat << " " << s.alpha << " " << s.beta);
  const Tensor offsets = offsets_of(c.rows);
  const std::vector<int32_t> offset = indices(offsets);
  const int64_t rows = offset[c.rows.size()];
  const int64_t stored = v.gather ? rows / 2 + 3 : rows, a_column = v.window ? 6 : 0, b_column = v.window ? 2 : 0;
  const Tensor a = random_tensor({stored, a_column + m + (v.window ? 1 : 0)}, t.a, 4);
  const Tensor b = random_tensor({v.gather ? stored + 5 : stored, b_column + n}, t.b, 5);
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

// All groups add to one C.
void check_one_output(const Types& t, int64_t groups) {
  const std::vector<int64_t> rows(static_cast<size_t>(groups), 2);
  const int64_t m = 5, n = 7;
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
      const GemmDesc desc{.kind = GemmKind::kDense,
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
    }
  }
  return names;
}

template <class Body>
void on_each_backend(Body&& body) {
  for (const DeviceKind device : testing::devices()) {
    const DeviceScope on(device);
    for (const std::string_view name : backends_of(device)) {
      SCOPED_TRACE(::testing::Message() << name_of(device) << " " << name);
      const GemmBackendScope scope(name);
      body();
    }
  }
}

// Small cases meet all types and transposes, large ones a rotating choice (on the simulator all cases do); scales, windows, gather and
// skips rotate so that each meets each.
TEST(Gemm, DenseMatchesTheEquation) {
  on_each_backend([] {
    size_t turn = 0;
    for (const auto& c : cases::gemm) {
      const bool small = c.m * c.n * c.k < 20000 && default_device() != DeviceKind::kSim;
      for (unsigned trans = 0; trans < 4; ++trans, ++turn) {
        for (size_t i = 0; i < (small ? kTypes.size() : 3); ++i, ++turn) {
          const Types& t = kTypes[(turn + 3 * i) % kTypes.size()];
          check_dense(c, t, trans & 1, trans & 2, kScales[turn % kScales.size()], turn % 5 == 1);
        }
      }
    }
  });
}

TEST(Gemm, GroupedMatchesTheEquation) {
  on_each_backend([] {
    unsigned turn = 0;
    for (const auto& c : cases::grouped_gemm) {
      for (const Types& t : kTypes) {
        const int repetitions = c.n * c.k < 2000 && default_device() != DeviceKind::kSim ? 3 : 1;
        for (int i = 0; i < repetitions; ++i, ++turn) {
          const unsigned bits = turn * 5 % 16;
          const Variant v{(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0};
          check_grouped_m(c, t, v, kScales[turn % kScales.size()]);
          check_grouped_k(c, t, v, kScales[(turn + 1) % kScales.size()], v.trans_b);
        }
        turn += 3;
      }
    }
  });
}

// More groups than one launch of a GPU backend takes, in both kinds, with an output shared by more than that.
TEST(Gemm, ManyGroups) {
  on_each_backend([] {
    cases::GroupedCase c{{}, 9, 8};
    for (int64_t g = 0; g < 300; ++g) c.rows.push_back(g % 3 == 0 ? 0 : g % 5);
    const Variant v{.gather = true, .window = false, .skip = true, .trans_b = true};
    check_grouped_m(c, kTypes[0], v, {1, 0});
    check_grouped_k(c, kTypes[0], v, {0.5, 1}, false);
    check_one_output(kTypes[0], 300);
  });
}

// Rows of C in the bits of one product of many rows: alone, in small and large groups, on one thread and on three.
void check_row_independence(const Types& t, bool trans_b, int64_t n, int64_t k) {
  SCOPED_TRACE(::testing::Message() << name_of(t.a) << name_of(t.b) << name_of(t.c) << static_cast<int>(t.compute)
                                    << " trans " << trans_b << " n=" << n << " k=" << k);
  const int64_t rows = 61;
  const Tensor a = random_tensor({rows, k}, t.a, 1), b = random_tensor(trans_b ? Shape{n, k} : Shape{k, n}, t.b, 2);
  const Tensor whole = Tensor::empty({rows, n}, t.c), part = Tensor::empty({rows, n}, t.c);
  run(Gemm{.a = a, .b = b, .c = whole, .trans_b = trans_b, .alpha = 0.7, .compute = t.compute});
  for (const int64_t height : {1, 2, 5, 7, 13, 31, 60}) {
    const Tensor c = part.slice(0, height), first = a.slice(rows - height, rows);
    run(Gemm{.a = first, .b = b, .c = c, .trans_b = trans_b, .alpha = 0.7, .compute = t.compute});
    EXPECT_TRUE(testing::bits_equal(c, whole.slice(rows - height, rows))) << height << " rows";
  }
  std::vector<int32_t> reversed;
  for (int64_t r = 0; r < rows; ++r) reversed.push_back(static_cast<int32_t>(rows - 1 - r));
  GroupedGemmM op{.a = a,
                  .a_rows = Tensor::from(reversed, {rows}),
                  .offsets = offsets_of({1, 0, 20, 3, 37}),
                  .c = part,
                  .trans_b = trans_b,
                  .alpha = 0.7,
                  .compute = t.compute};
  op.b.assign(5, b);
  const int threads = num_threads();
  for (const int count : {1, 3}) {
    omp_set_num_threads(count);
    run(op);
    omp_set_num_threads(threads);
    for (int64_t r = 0; r < rows; ++r) {
      EXPECT_TRUE(testing::bits_equal(part.slice(r, r + 1), whole.slice(rows - 1 - r, rows - r))) << "row " << r;
    }
  }
}

TEST(Gemm, NativeRowsDoNotDependOnTheRest) {
  const GemmBackendScope scope("native");
  for (const Types& t : kTypes) {
    if (t.c == DType::kF64) continue;  // another backend's
    check_row_independence(t, true, 45, 67);
    check_row_independence(t, false, 45, 67);
  }
  for (const bool trans_b : {false, true}) {  // several blocks of k
    check_row_independence(kTypes[0], trans_b, 33, 1311);
    check_row_independence(kTypes[3], trans_b, 33, 2603);
  }
}

TEST(Gemm, PicksAreListedAndForced) {
  const Tensor a = random_tensor({3, 5}, DType::kF32, 1), b = random_tensor({5, 11}, DType::kBF16, 2);
  const Tensor c = Tensor::empty({3, 11}, DType::kF32);
  {
    const GemmBackendScope scope("reference");
    EXPECT_EQ(forced_gemm_backend(), "reference");
    run(Gemm{.a = a, .b = b, .c = c});
  }
  EXPECT_EQ(forced_gemm_backend(), "auto");
  const std::vector<std::string> picks = gemm_picks();
  EXPECT_NE(std::find(picks.begin(), picks.end(), "dense nn f32xbf16->f32 m=3 n=11 k=5 g=1: reference"), picks.end());
  try {
    force_gemm_backend("cublas-of-dreams");
    FAIL() << "an unknown backend was accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kUsage);
    EXPECT_NE(std::string(e.what()).find("reference"), std::string::npos);
  }
}

TEST(Gemm, RefusesWrongArguments) {
  const Tensor a = Tensor::zeros({2, 3}, DType::kF32), b = Tensor::zeros({3, 4}, DType::kF32);
  const Tensor c = Tensor::zeros({2, 4}, DType::kF32), d = Tensor::zeros({2, 4}, DType::kF64);
  EXPECT_THROW(run(Gemm{.a = a, .b = b, .c = d}), Error);
  EXPECT_THROW(run(Gemm{.a = a, .b = b, .c = c, .trans_b = true}), Error);
  EXPECT_THROW(run(Gemm{.a = a, .b = b, .c = c, .a_column = 1}), Error);
  EXPECT_THROW(run(Gemm{.a = a, .b = b, .c = c, .c_column = 1}), Error);
  EXPECT_THROW(run(Gemm{.a = a, .b = Tensor(), .c = c}), Error);
  GroupedGemmM op{.a = a, .offsets = Tensor::from<int32_t>({0, 2}, {2}), .b = {b}, .c = c};
  run(op);
  op.a_rows = Tensor::from<int32_t>({0, 2}, {2});
  EXPECT_THROW(run(op), Error);
  op.a_rows = Tensor(), op.offsets = Tensor::from<int32_t>({1, 0}, {2});
  EXPECT_THROW(run(op), Error);
}

}  // namespace
}  // namespace lightmoe
