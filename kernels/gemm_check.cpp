#include "kernels/gemm_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "kernels/crash_guard.h"
#include "runtime/parallel.h"
#include "runtime/philox.h"

namespace lightmoe {
namespace {

// The oracle's products are too small for threads, whose start costs more than they do.
class OneThread {
 public:
  OneThread() : before_(num_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

// --- products ------------------------------------------------------------------------------------------

struct Types {
  DType a, b, c;
  GemmCompute compute;
};
constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;
constexpr Types kTypes[] = {
    {kF32, kF32, kF32, GemmCompute::kF32},    {kF32, kF32, kF32, GemmCompute::kBF16},
    {kF32, kBF16, kF32, GemmCompute::kF32},   {kF32, kBF16, kBF16, GemmCompute::kBF16},
    {kBF16, kF32, kBF16, GemmCompute::kF32},  {kBF16, kBF16, kF32, GemmCompute::kBF16},
    {kBF16, kBF16, kBF16, GemmCompute::kF32},
};
struct Scales {
  double alpha, beta;
};
constexpr Scales kScales[] = {{1, 0}, {1, 1}, {-0.5, 0.75}};
struct Size {
  int64_t m, n, k;
};
constexpr Size kDense[] = {{1, 1, 1}, {7, 5, 3}, {1, 200, 130}, {33, 17, 65}, {64, 64, 64}, {136, 72, 96}};
struct Groups {
  std::vector<int64_t> rows;
  int64_t n, k;
};
const std::vector<Groups>& group_cases() {
  static const std::vector<Groups> cases = {{{1}, 1, 1},          {{3, 0, 1, 17}, 33, 31},     {{0, 29, 0}, 16, 64},
                                            {{1, 1, 70}, 64, 48}, {{5, 14, 0, 33, 1}, 40, 72}, {{130, 3}, 129, 66}};
  return cases;
}

std::string text_of(const std::vector<int64_t>& rows) {
  std::string text;
  for (const int64_t r : rows) text += fmt::format("{}{}", text.empty() ? "" : ",", r);
  return text;
}

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Uniform in [-1, 1) rounded to dtype, NaN outside columns [column, column + width).
Tensor values(int64_t rows, int64_t width, int64_t column, int64_t total, DType dtype, uint64_t seed) {
  const Tensor host = Tensor::empty({rows, total}, DType::kF32, DeviceKind::kCpu);
  Philox random(seed, 17);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < total; ++j) {
      const bool inside = j >= column && j < column + width;
      host.data<float>()[i * total + j] = inside ? static_cast<float>(random.next_u32()) * 0x1p-31f - 1 : kNaN;
    }
  }
  return host.to(dtype);
}

// Factors as the product uses them, in f64, or their magnitudes.
Tensor exact(const Tensor& t, GemmCompute compute, bool magnitude) {
  const Tensor values = (compute == GemmCompute::kBF16 ? t.to(kBF16) : t).to(DType::kF64);
  for (int64_t i = 0; magnitude && i < values.numel(); ++i)
    values.data<double>()[i] = std::abs(values.data<double>()[i]);
  return values;
}

// What the oracle says, [rows, width of C] f64: op(A) op(B) and |op(A)| |op(B)|, sums of k products.
struct Truth {
  Tensor product, size;
  int64_t k = 0;
};

// C between guard rows and columns. What is outside must keep its bits.
class Output {
 public:
  static constexpr int64_t kGuardRows = 3;
  Output(int64_t rows, int64_t n, int64_t column, DType dtype, double beta, uint64_t seed)
      : rows_(rows), n_(n), column_(column), width_(column + n + (column > 0 ? 3 : 0)) {
    before_ = beta == 0 ? values(rows + 2 * kGuardRows, 0, 0, width_, dtype, seed)
                        : values(rows + 2 * kGuardRows, width_, 0, width_, dtype, seed);
    all_ = Tensor::empty(before_.shape(), dtype);
    all_.copy_from(before_.on(all_.device()));
  }
  Tensor c() const { return all_.slice(kGuardRows, kGuardRows + rows_); }
  Tensor before() const { return before_.slice(kGuardRows, kGuardRows + rows_); }
  int64_t column() const { return column_; }

  // Empty when right. `written`: one flag for each row of C. contributions: how often C may have been rounded.
  std::string compare(const Truth& truth, const Scales& s, const std::vector<char>& written, int contributions,
                      double* largest_share) const {
    const Tensor after = all_.on(DeviceKind::kCpu);
    const Tensor got = after.to(DType::kF64), was = before().to(DType::kF64);
    const size_t bytes = size_of(after.dtype());
    const double last_place = after.dtype() == kBF16 ? 0x1p-8 : 0x1p-24;
    for (int64_t i = 0; i < after.dim(0); ++i) {
      const int64_t row = i - kGuardRows;
      const bool inside_row = row >= 0 && row < rows_ && written[static_cast<size_t>(row)];
      for (int64_t j = 0; j < width_; ++j) {
        const auto byte = static_cast<size_t>(i * width_ + j) * bytes;
        if (!inside_row || j < column_ || j >= column_ + n_) {
          if (std::memcmp(static_cast<const char*>(after.raw()) + byte, static_cast<const char*>(before_.raw()) + byte,
                          bytes) != 0)
            return fmt::format("wrote outside C at row {}, column {}", row, j - column_);
          continue;
        }
        const int64_t at = row * width_ + j;
        const double c = s.beta == 0 ? 0 : s.beta * was.data<double>()[at];
        const double want = s.alpha * truth.product.data<double>()[at] + c, is = got.data<double>()[i * width_ + j];
        if (std::isnan(want) && std::isnan(is)) continue;
        const double size = std::abs(s.alpha) * truth.size.data<double>()[at] + std::abs(c);
        const double tolerance = (static_cast<double>(truth.k) + 2) * 0x1p-24 * size +
                                 last_place * (std::abs(want) + (contributions - 1) * size) + 1e-30;
        const double error = std::abs(is - want);
        if (!(error <= tolerance)) {
          return fmt::format("C[{},{}] is {:.8g}, expected {:.8g} within {:.2g}", row, j - column_, is, want,
                             tolerance);
        }
        *largest_share = std::max(*largest_share, error / tolerance);
      }
    }
    return "";
  }

 private:
  int64_t rows_, n_, column_, width_;
  Tensor before_, all_;
};

class Checker {
 public:
  Checker(const GemmBackend& backend, const std::string& name) : backend_(backend), guard_(name) {}

  GemmCheckReport run() {
    for (const Types& t : kTypes) {
      for (const Size& s : kDense) {
        for (const int trans : {0, 1, 2, 3}) dense(t, s, trans & 1, trans & 2);
      }
      for (const Groups& g : group_cases()) {
        for (const int variant : {0, 1, 2, 3}) {
          grouped_m(t, g, variant & 1, variant & 2);
          grouped_k(t, g, variant & 1, variant & 2);
        }
      }
    }
    for (const auto& [signature, counts] : signatures_) {
      report_.signatures.push_back(fmt::format("{}: {} products, {} wrong", signature, counts.first, counts.second));
    }
    return report_;
  }

 private:
  // Runs it where the backend supports it; compare() then says what is wrong.
  template <class Op, class Compare>
  void hold(const Op& op, Compare&& compare, const std::string& signature, const std::string& details) {
    const GemmDesc desc = describe(op);
    if (!backend_.supports(desc)) return;
    guard_.next(signature + details);
    if constexpr (std::is_same_v<Op, Gemm>) backend_.dense(op);
    if constexpr (std::is_same_v<Op, GroupedGemmM>) backend_.grouped_m(op);
    if constexpr (std::is_same_v<Op, GroupedGemmK>) backend_.grouped_k(op);
    const std::string wrong = compare();
    auto& [products, failures] = signatures_[signature];
    ++products, ++report_.checked;
    if (wrong.empty()) return;
    ++failures, ++report_.wrong;
    if (report_.first_wrong.empty()) report_.first_wrong = fmt::format("{}{}: {}", signature, details, wrong);
  }

  static std::string signature(const char* kind, bool trans_a, bool trans_b, const Types& t, bool gather = false) {
    return fmt::format("{} {}{} {}x{}->{}{}{}", kind, trans_a ? "t" : "n", trans_b ? "t" : "n", name_of(t.a),
                       name_of(t.b), name_of(t.c), t.compute == GemmCompute::kBF16 ? " bf16" : "",
                       gather ? " gather" : "");
  }

  // place(op, c, sizes) puts the factors, or their magnitudes, and C into the op.
  template <class Op, class Place>
  static Truth oracle(Op op, const Tensor& c, int64_t k, Place&& place) {
    const DeviceScope on(DeviceKind::kCpu);
    const GemmBackendScope reference("reference");
    const OneThread small;
    Truth truth{Tensor::zeros(c.shape(), DType::kF64), Tensor::zeros(c.shape(), DType::kF64), k};
    place(op, truth.product, false), lightmoe::run(op);
    place(op, truth.size, true), lightmoe::run(op);
    return truth;
  }

  void dense(const Types& t, const Size& s, bool trans_a, bool trans_b) {
    const std::vector<char> written(static_cast<size_t>(s.m), 1);
    for (const int64_t column : {0, 8, 5}) {
      const Tensor a = trans_a ? values(s.k, s.m, column, s.m + 2 * column, t.a, 1)
                               : values(s.m, s.k, column, s.k + 2 * column, t.a, 1);
      const Tensor b = trans_b ? values(s.n, s.k, 0, s.k, t.b, 2) : values(s.k, s.n, 0, s.n, t.b, 2);
      if (!trans_a && s.m > 2 && column == 8)
        a.slice(1, 2).copy_from(values(1, 0, 0, a.dim(1), t.a, 1));  // a row of NaN
      Gemm op{.trans_a = trans_a, .trans_b = trans_b, .a_column = column, .c_column = column};
      const Truth truth =
          oracle(op, Output(s.m, s.n, column, t.c, 0, 3).before(), s.k, [&](Gemm& o, const Tensor& c, bool sizes) {
            o.a = exact(a, t.compute, sizes), o.b = exact(b, t.compute, sizes), o.c = c;
          });
      op.a = a.on(default_device()), op.b = b.on(default_device()), op.compute = t.compute;
      for (const Scales& scale : kScales) {
        const Output out(s.m, s.n, column, t.c, scale.beta, 3);
        op.c = out.c(), op.alpha = scale.alpha, op.beta = scale.beta;
        hold(
            op, [&] { return out.compare(truth, scale, written, 1, &report_.largest_share); },
            signature("dense", trans_a, trans_b, t),
            fmt::format(" m={} n={} k={} window {} alpha {} beta {}", s.m, s.n, s.k, column, scale.alpha, scale.beta));
      }
    }
  }

  static std::vector<int32_t> offsets_of(const Groups& g) {
    std::vector<int32_t> offsets = {0};
    for (const int64_t rows : g.rows) offsets.push_back(offsets.back() + static_cast<int32_t>(rows));
    return offsets;
  }
  static Tensor indices(int64_t count, int64_t limit, uint64_t seed) {
    Philox random(seed, 5);
    const DeviceScope on(DeviceKind::kCpu);
    std::vector<int32_t> rows(static_cast<size_t>(count));
    for (int32_t& r : rows) r = static_cast<int32_t>(random.below(static_cast<uint64_t>(limit)));
    return Tensor::from(rows, {count});
  }
  static Tensor host_list(const std::vector<int32_t>& list) {
    const DeviceScope on(DeviceKind::kCpu);
    return Tensor::from(list, {static_cast<int64_t>(list.size())});
  }
  static void move_to_device(std::vector<Tensor>& list) {
    for (Tensor& t : list) {
      if (t.defined()) t = t.on(default_device());
    }
  }

  void grouped_m(const Types& t, const Groups& g, bool trans_b, bool special) {
    const std::vector<int32_t> offsets = offsets_of(g);
    const int64_t rows = offsets.back(), stored = special ? rows / 2 + 3 : rows, column = special ? 8 : 0;
    const Tensor a = values(stored, g.k, column, g.k + 2 * column, t.a, 4);
    const Tensor taken = special ? indices(rows, stored, 11) : Tensor();
    std::vector<Tensor> b;
    std::vector<char> written;
    for (size_t i = 0; i < g.rows.size(); ++i) {
      const bool skip = special && i % 3 == 1;
      b.push_back(skip      ? Tensor()
                  : trans_b ? values(g.n, g.k, 0, g.k, t.b, 20 + i)
                            : values(g.k, g.n, 0, g.n, t.b, 20 + i));
      written.insert(written.end(), static_cast<size_t>(g.rows[i]), skip ? 0 : 1);
    }
    GroupedGemmM op{.a_rows = taken, .trans_b = trans_b, .a_column = column, .c_column = column};
    const Truth truth = oracle(op, Output(rows, g.n, column, t.c, 0, 6).before(), g.k,
                               [&](GroupedGemmM& o, const Tensor& c, bool sizes) {
                                 o.a = exact(a, t.compute, sizes), o.offsets = host_list(offsets), o.c = c, o.b.clear();
                                 for (const Tensor& m : b)
                                   o.b.push_back(m.defined() ? exact(m, t.compute, sizes) : Tensor());
                               });
    op.a = a.on(default_device()), op.offsets = host_list(offsets).on(default_device()), op.b = b;
    if (special) op.a_rows = taken.on(default_device());
    move_to_device(op.b);
    op.compute = t.compute;
    for (const Scales& scale : kScales) {
      const Output out(rows, g.n, column, t.c, scale.beta, 6);
      op.c = out.c(), op.alpha = scale.alpha, op.beta = scale.beta;
      hold(
          op, [&] { return out.compare(truth, scale, written, 1, &report_.largest_share); },
          signature("grouped_m", false, trans_b, t, special),
          fmt::format(" rows [{}] n={} k={} window {} alpha {} beta {}", text_of(g.rows), g.n, g.k, column, scale.alpha,
                      scale.beta));
    }
  }

  // shared: two groups for each C.
  void grouped_k(const Types& t, const Groups& g, bool shared, bool special) {
    const std::vector<int32_t> offsets = offsets_of(g);
    const int64_t m = g.k, rows = offsets.back(), stored = special ? rows / 2 + 3 : rows, column = special ? 8 : 0;
    const Tensor a = values(stored, m, column, m + 2 * column, t.a, 7);
    const Tensor b = values(special ? stored + 5 : stored, g.n, column, g.n + 2 * column, t.b, 8);
    const Tensor a_rows = special ? indices(rows, stored, 12) : Tensor();
    const Tensor b_rows = special ? indices(rows, stored + 5, 13) : Tensor();
    const size_t groups = g.rows.size(), outputs = shared ? (groups + 1) / 2 : groups;
    const auto output_of = [&](size_t group) { return special && group % 3 == 1 ? outputs : group % outputs; };
    GroupedGemmK op{.a_rows = a_rows, .b_rows = b_rows, .a_column = column, .b_column = column};
    // One tensor for each output, in the order of the groups.
    const auto outputs_by_group = [&](const std::vector<Tensor>& of_output) {
      std::vector<Tensor> c(groups);
      for (size_t i = 0; i < groups; ++i) {
        if (output_of(i) < outputs) c[i] = of_output[output_of(i)];
      }
      return c;
    };
    std::vector<Tensor> products(outputs), sizes_of(outputs);
    for (Tensor& t64 : products) t64 = Tensor::zeros({m, g.n}, DType::kF64, DeviceKind::kCpu);
    for (Tensor& t64 : sizes_of) t64 = Tensor::zeros({m, g.n}, DType::kF64, DeviceKind::kCpu);
    oracle(op, products[0], rows, [&](GroupedGemmK& o, const Tensor&, bool sizes) {
      o.a = exact(a, t.compute, sizes), o.b = exact(b, t.compute, sizes), o.offsets = host_list(offsets);
      o.c = outputs_by_group(sizes ? sizes_of : products);
    });
    op.a = a.on(default_device()), op.b = b.on(default_device()), op.offsets = host_list(offsets).on(default_device());
    if (special) op.a_rows = a_rows.on(default_device()), op.b_rows = b_rows.on(default_device());
    op.compute = t.compute;
    for (const Scales& scale : kScales) {
      std::vector<Output> out;
      std::vector<Tensor> c;
      for (size_t i = 0; i < outputs; ++i)
        out.emplace_back(m, g.n, 0, t.c, scale.beta, 30 + i), c.push_back(out[i].c());
      op.c = outputs_by_group(c), op.alpha = scale.alpha, op.beta = scale.beta;
      const auto compare = [&]() -> std::string {
        for (size_t i = 0; i < outputs; ++i) {
          const bool used =
              std::any_of(op.c.begin(), op.c.end(), [&](const Tensor& x) { return x.raw() == c[i].raw(); });
          const std::vector<char> written(static_cast<size_t>(m), used);
          const std::string wrong =
              out[i].compare({products[i], sizes_of[i], rows}, scale, written, shared ? 3 : 1, &report_.largest_share);
          if (!wrong.empty()) return fmt::format("output {}: {}", i, wrong);
        }
        return "";
      };
      hold(op, compare, signature("grouped_k", true, false, t, special),
           fmt::format(" rows [{}] m={} n={} window {}{} alpha {} beta {}", text_of(g.rows), m, g.n, column,
                       shared ? " shared outputs" : "", scale.alpha, scale.beta));
    }
  }

  const GemmBackend& backend_;
  CrashGuard guard_;
  GemmCheckReport report_;
  std::map<std::string, std::pair<int, int>> signatures_;
};

}  // namespace

GemmCheckReport check_gemm_backend(const GemmBackend& backend, const std::string& name) {
  return Checker(backend, name).run();
}

}  // namespace lightmoe
