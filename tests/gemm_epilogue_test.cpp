// Epilogues of gemm.h on every backend that has them, against their equations in double.

#include <algorithm>
#include <cstring>

#include "kernels/gemm.h"
#include "kernels/swiglu.h"
#include "tests/support/devices.h"
#include "tests/support/gemm_checks.h"

namespace lightmoe {
namespace {

using testing::GemmTypes;
using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;
using Kind = GemmEpilogueKind;

// What stands in a matrix after rounding to the type factors are multiplied in.
std::vector<double> factors(const Tensor& x, GemmCompute compute) {
  std::vector<double> values = to_doubles(x);
  if (compute == GemmCompute::kF32 || x.dtype() == DType::kF64) return values;
  for (double& v : values) v = static_cast<float>(bf16(static_cast<float>(v)));
  return values;
}

struct Shapes {
  std::vector<int64_t> rows;  // of each group; one group: dense too
  int64_t width, k;           // width: of C for kScale, of an expert for SwiGLU
};
struct Variant {
  Kind kind;
  bool gather = false, skip = false, scaled = false, indexed = false,
       optional = false;  // optional: C or activated, dots
  double alpha = 1, beta = 0;
};

// An output, NaN before the call, and what must stand in it; what is not computed must keep its bits.
struct Output {
  Guarded memory;
  Tensor before;
  std::vector<double> expected;
  std::vector<bool> computed;
  Output(const Shape& shape, DType dtype)
      : memory(shape, dtype),
        before(memory.tensor().clone().on(DeviceKind::kCpu)),
        expected(to_doubles(before)),
        computed(expected.size(), false) {}
  void set(int64_t at, double value) {
    expected[static_cast<size_t>(at)] = value, computed[static_cast<size_t>(at)] = true;
  }
  void check(const char* name, double tolerance) const {
    SCOPED_TRACE(name);
    const Tensor after = memory.tensor().on(DeviceKind::kCpu);
    const size_t size = size_of(after.dtype());
    std::vector<double> values = to_doubles(after);
    for (size_t i = 0; i < computed.size(); ++i) {
      if (computed[i]) {
        EXPECT_LE(std::abs(values[i] - expected[i]), tolerance) << "element " << i;
        continue;
      }
      EXPECT_EQ(std::memcmp(static_cast<const char*>(after.raw()) + i * size,
                            static_cast<const char*>(before.raw()) + i * size, size),
                0)
          << "element " << i << " was written";
    }
  }
};

class Check {
 public:
  Check(const Shapes& s, const GemmTypes& t, const Variant& v) : s_(s), t_(t), v_(v) {
    for (const int64_t r : s.rows) offsets_.push_back(offsets_.back() + static_cast<int32_t>(r));
    rows_ = offsets_.back();
    product_ = v.kind == Kind::kSwiGlu ? 2 * s.width : s.width;
    const int64_t stored = v.gather ? rows_ / 2 + 3 : rows_;
    a_ = random_tensor({stored, s.k}, t.a, 1);
    Philox random(5, 5);
    taken_.resize(static_cast<size_t>(rows_)), index_.resize(static_cast<size_t>(rows_));
    for (size_t i = 0; i < taken_.size(); ++i) {
      taken_[i] =
          v.gather ? static_cast<int32_t>(random.below(static_cast<uint64_t>(stored))) : static_cast<int32_t>(i);
      index_[i] = v.indexed ? static_cast<int32_t>(2 * taken_.size() - 1 - 2 * i) : static_cast<int32_t>(i);
    }
    const double stddev = 1 / std::sqrt(static_cast<double>(std::max<int64_t>(1, s.k)));  // h of unit size
    trans_b_ = v.kind != Kind::kSwiGluBackward;
    for (size_t g = 0; g < s.rows.size(); ++g) {
      const bool skipped = v.skip && g % 3 == 1;
      const Shape shape = trans_b_ ? Shape{product_, s.k} : Shape{s.k, product_};
      b_.push_back(skipped ? Tensor() : random_tensor(shape, t.b, 20 + g, stddev));
    }
    accumulator_ = t.c == DType::kF64 ? DType::kF64 : DType::kF32;
    scales_ = random_tensor({2 * rows_ + 1}, accumulator_, 3);
    h_ = random_tensor({rows_, 2 * s.width}, t.c, 4);
  }
  void run_grouped() {
    SCOPED_TRACE(describe());
    GroupedGemmM op{.a = a_,
                    .offsets = Tensor::from(offsets_, {std::ssize(offsets_)}),
                    .b = b_,
                    .trans_b = trans_b_,
                    .alpha = v_.alpha,
                    .beta = v_.beta,
                    .compute = t_.compute};
    if (v_.gather) op.a_rows = Tensor::from(taken_, {rows_});
    run_op(op);
  }
  void run_dense() {
    if (s_.rows.size() != 1 || v_.gather || v_.skip) return;
    SCOPED_TRACE(describe() + " dense");
    Gemm op{.a = a_, .b = b_[0], .trans_b = trans_b_, .alpha = v_.alpha, .beta = v_.beta, .compute = t_.compute};
    run_op(op);
  }

 private:
  std::string describe() const {
    return fmt::format(
        "kind {} rows {} groups {} width {} k {} {}{}{} compute {} gather {} skip {} scaled {} indexed {} optional {} "
        "alpha {} beta {}",
        static_cast<int>(v_.kind), rows_, s_.rows.size(), s_.width, s_.k, name_of(t_.a), name_of(t_.b), name_of(t_.c),
        static_cast<int>(t_.compute), v_.gather, v_.skip, v_.scaled, v_.indexed, v_.optional, v_.alpha, v_.beta);
  }
  template <class Op>
  void run_op(Op& op) {
    const bool scale = v_.kind == Kind::kScale, forward = v_.kind == Kind::kSwiGlu, backward = !scale && !forward;
    const int64_t c_width = scale ? s_.width : 2 * s_.width;
    Output c({rows_, c_width}, t_.c), activated({rows_, s_.width}, t_.c), dots({2 * rows_ + 1}, accumulator_);
    if (v_.beta != 0) c.memory.tensor().copy_from(random_tensor({rows_, c_width}, t_.c, 6));
    // Not NaN, which sums of memory that nobody has written may be as well.
    dots.memory.tensor().copy_from(random_tensor({2 * rows_ + 1}, accumulator_, 7));
    dots.before = dots.memory.tensor().clone().on(DeviceKind::kCpu);
    GemmEpilogue& e = op.epilogue;
    e.kind = v_.kind;
    if (scale || v_.scaled) e.scales = scales_;
    if (v_.indexed) e.scale_rows = Tensor::from(index_, {rows_});
    if (!forward || v_.optional) op.c = c.memory.tensor();
    if (forward || (backward && v_.optional)) e.activated = activated.memory.tensor();
    if (backward) e.h = h_;
    if (backward && v_.optional) e.dots = dots.memory.tensor();
    const std::vector<double> c_before = to_doubles(c.memory.tensor());
    c.before = c.memory.tensor().clone().on(DeviceKind::kCpu);
    run(op);
    expect(c_before, op, c, activated, dots);
  }
  template <class Op>
  void expect(const std::vector<double>& c_before, const Op& op, Output& c, Output& activated, Output& dots) {
    const std::vector<double> fa = factors(a_, t_.compute), scales = to_doubles(scales_), h = to_doubles(h_);
    const int64_t width = s_.width;
    double largest = 1, largest_a = 0, largest_scale = 1, dot_weight = 0;
    for (size_t g = 0; g < b_.size(); ++g) {
      if (!b_[g].defined()) continue;
      const std::vector<double> fb = factors(b_[g], t_.compute);
      for (int64_t i = offsets_[g]; i < offsets_[g + 1]; ++i) {
        std::vector<double> p(static_cast<size_t>(product_), 0);
        for (int64_t j = 0; j < product_; ++j) {
          for (int64_t k = 0; k < s_.k; ++k) {
            p[static_cast<size_t>(j)] += fa[static_cast<size_t>(taken_[static_cast<size_t>(i)] * s_.k + k)] *
                                         fb[static_cast<size_t>(trans_b_ ? j * s_.k + k : k * product_ + j)];
          }
          largest = std::max(largest, std::abs(p[static_cast<size_t>(j)]));
        }
        const int64_t at = index_[static_cast<size_t>(i)];
        const double scale = op.epilogue.scales.defined() ? scales[static_cast<size_t>(at)] : 1;
        largest_scale = std::max(largest_scale, std::abs(scale));
        double dot = 0, weight = 0;
        for (int64_t f = 0; f < width; ++f) {
          if (v_.kind == Kind::kScale) {
            const double before = v_.beta == 0 ? 0 : v_.beta * c_before[static_cast<size_t>(i * width + f)];
            c.set(i * width + f, scale * v_.alpha * p[static_cast<size_t>(f)] + before);
            continue;
          }
          const bool forward = v_.kind == Kind::kSwiGlu;
          const double gate = forward ? p[static_cast<size_t>(f)] : h[static_cast<size_t>(i * 2 * width + f)];
          const double up =
              forward ? p[static_cast<size_t>(width + f)] : h[static_cast<size_t>((i * 2 + 1) * width + f)];
          const double sigmoid = 1 / (1 + std::exp(-gate)), silu = gate * sigmoid, value = silu * up;
          largest_a = std::max({largest_a, std::abs(value), std::abs(gate), std::abs(up)});
          if (op.epilogue.activated.defined()) activated.set(i * width + f, scale * value);
          if (forward) {
            if (op.c.defined()) c.set(i * 2 * width + f, gate), c.set((i * 2 + 1) * width + f, up);
            continue;
          }
          const double gradient = p[static_cast<size_t>(f)];
          c.set(i * 2 * width + f, scale * gradient * up * (sigmoid + silu * (1 - sigmoid)));
          c.set((i * 2 + 1) * width + f, scale * gradient * silu);
          dot += gradient * value, weight += std::abs(value);
        }
        if (op.epilogue.dots.defined()) dots.set(at, dot), dot_weight = std::max(dot_weight, weight);
      }
    }
    // Sums of k products of size 1 / sqrt(k) carry an error of sum_tolerance relative to the largest, and are rounded to C's type; what
    // SwiGLU makes of them grows with the other factor and with at most 1.1, its derivative's largest value. Rounded once more.
    const double product_error = testing::sum_tolerance(accumulator_, s_.k) * largest,
                 rounding = testing::unit_roundoff(t_.c);
    const double scaled = largest_scale * std::max(1.0, std::abs(v_.alpha));
    const double one = product_error + rounding * largest;
    if (v_.kind == Kind::kScale) {
      c.check("C", scaled * product_error + rounding * (scaled * largest + 5 * std::abs(v_.beta)) * 2);
      return;
    }
    const double factor = 2.2 * std::max(largest_a, largest) + 1;
    if (v_.kind == Kind::kSwiGlu) {
      if (op.c.defined()) c.check("C", one);
      activated.check("activated", scaled * (factor * one + 2 * rounding * largest_a * largest_a));
      return;
    }
    c.check("C", scaled * factor * (product_error + rounding * largest));
    if (op.epilogue.activated.defined()) activated.check("activated", 4 * scaled * rounding * largest_a * largest_a);
    if (op.epilogue.dots.defined()) {
      dots.check("dots", dot_weight * (product_error + testing::sum_tolerance(accumulator_, width) * largest * 4));
    }
  }

  const Shapes& s_;
  const GemmTypes t_;
  const Variant v_;
  std::vector<int32_t> offsets_{0}, taken_, index_;
  int64_t rows_ = 0, product_ = 0;
  bool trans_b_ = true;
  DType accumulator_ = DType::kF32;
  Tensor a_, scales_, h_;
  std::vector<Tensor> b_;
};

std::vector<Shapes> shapes_of(const std::vector<cases::GroupedCase>& list) {
  std::vector<Shapes> out;
  for (const auto& c : list) out.push_back({c.rows, c.n, c.k});
  return out;
}

std::vector<Variant> variants() {
  return {
      {.kind = Kind::kScale, .gather = true, .indexed = true, .alpha = -0.5, .beta = 1},
      {.kind = Kind::kScale, .skip = true},
      {.kind = Kind::kSwiGlu},
      {.kind = Kind::kSwiGlu, .gather = true, .skip = true, .scaled = true, .indexed = true, .optional = true},
      {.kind = Kind::kSwiGlu, .scaled = true},
      {.kind = Kind::kSwiGluBackward},
      {.kind = Kind::kSwiGluBackward, .gather = true, .skip = true, .scaled = true, .indexed = true, .optional = true},
      {.kind = Kind::kSwiGluBackward, .scaled = true, .optional = true}};
}

int64_t picks_with(std::string_view backend, std::string_view epilogue) {
  const std::vector<std::string> picks = gemm_picks();
  return std::count_if(picks.begin(), picks.end(), [&](const std::string& line) {
    return line.ends_with(fmt::format(": {}", backend)) && line.find(epilogue) != std::string::npos;
  });
}

// Every backend that has epilogues computes them, in the types and at the alignment it takes.
TEST(GemmEpilogue, MatchesTheEquation) {
  testing::on_each_backend([] {
    const std::string_view backend = forced_gemm_backend();
    const bool tensor_cores = backend == "mma" || backend == "wgmma" || backend == "gemv";
    if (backend == "blas" || backend == "cublas") return;  // have none
    size_t turn = 0, shape = 0;
    const auto check_all = [&](const std::vector<Shapes>& list, auto&& types) {
      for (const Shapes& shapes : list) {
        ++shape;
        for (const Variant& v : variants()) {
          ++turn;
          if (!testing::is_run_now(turn + shape, 2)) continue;
          Check check(shapes, types(turn), v);
          check.run_grouped();
          check.run_dense();
        }
      }
    };
    if (!tensor_cores) {
      const bool cpu = default_device() == DeviceKind::kCpu;
      check_all(shapes_of(cases::grouped_gemm), [&](size_t i) -> const GemmTypes& {
        return testing::kGemmTypes[i % (cpu && backend == "reference" ? 8 : 7)];
      });
    }
    check_all(shapes_of(cases::grouped_gemm_aligned), [&](size_t i) -> const GemmTypes& {
      return backend == "wgmma" ? testing::kGemmTypes[5 + i % 2] : testing::kGemmTypes[i % 7];
    });
    check_all({{{37}, 40, 24}, {{130}, 136, 72}}, [&](size_t i) -> const GemmTypes& {
      return backend == "wgmma" ? testing::kGemmTypes[5 + i % 2] : testing::kGemmTypes[i % 7];
    });
    EXPECT_GT(picks_with(backend, " scale "), 1);
    EXPECT_GT(picks_with(backend, " swiglu "), 1);
    if (backend != "gemv") {
      EXPECT_GT(picks_with(backend, " swiglu_backward "), 5);
    }
  });
}

// A product with the epilogue has the bits of the same product, stored, and SwiGLU over it.
TEST(GemmEpilogue, SameBitsAsTheTwoSteps) {
  testing::on_each_backend([] {
    if (default_device() == DeviceKind::kCpu || forced_gemm_backend() == "cublas") return;
    for (const DType dtype : {DType::kF32, DType::kBF16}) {
      const int64_t rows = 150, width = 136, k = 72;
      const Tensor a = random_tensor({rows, k}, DType::kBF16, 1),
                   b = random_tensor({2 * width, k}, DType::kBF16, 2, 0.1);
      const Tensor h = Tensor::empty({rows, 2 * width}, dtype), stored = Tensor::empty({rows, 2 * width}, dtype);
      const Tensor two = Tensor::empty({rows, width}, dtype), one = Tensor::empty({rows, width}, dtype);
      run(Gemm{.a = a, .b = b, .c = h, .trans_b = true});
      run(SwiGlu{.h = h, .a = two});
      run(Gemm{.a = a, .b = b, .c = stored, .trans_b = true, .epilogue = {.kind = Kind::kSwiGlu, .activated = one}});
      EXPECT_TRUE(testing::bits_equal(stored, h));
      EXPECT_TRUE(testing::bits_equal(one, two));

      const Tensor dy = random_tensor({rows, k}, DType::kBF16, 3), down = random_tensor({k, width}, DType::kBF16, 4);
      const Tensor da = Tensor::empty({rows, width}, dtype), dh = Tensor::empty({rows, 2 * width}, dtype);
      const Tensor again = Tensor::empty({rows, width}, dtype);
      run(Gemm{.a = dy, .b = down, .c = da});
      run(SwiGluBackward{.h = h, .da = da, .dh = dh});
      const Tensor over = h.clone();  // C over h
      run(Gemm{
          .a = dy, .b = down, .c = over, .epilogue = {.kind = Kind::kSwiGluBackward, .h = over, .activated = again}});
      EXPECT_TRUE(testing::bits_equal(again, two));
      // The gradient is rounded to bf16 on its way between the two steps, once more than here.
      if (dtype == DType::kF32) {
        EXPECT_TRUE(testing::bits_equal(over, dh));
      }
    }
  });
}

TEST(GemmEpilogue, RefusesWrongArguments) {
  const Tensor a = Tensor::zeros({2, 3}, DType::kF32), b = Tensor::zeros({8, 3}, DType::kF32),
               down = Tensor::zeros({3, 4}, DType::kF32);
  const Tensor c = Tensor::zeros({2, 8}, DType::kF32), four = Tensor::zeros({2, 4}, DType::kF32);
  const auto swiglu = [&](Gemm op) {
    op.a = a;
    if (!op.b.defined()) op.b = b;
    op.epilogue.kind = Kind::kSwiGlu;
    run(op);
  };
  swiglu({.trans_b = true, .epilogue = {.activated = four}});
  EXPECT_THROW(swiglu({.trans_b = true, .epilogue = {.activated = c}}), Error);
  EXPECT_THROW(swiglu({.c = four, .trans_b = true, .epilogue = {.activated = four}}), Error);
  EXPECT_THROW(swiglu({.trans_b = true, .alpha = 2, .epilogue = {.activated = four}}), Error);
  EXPECT_THROW(swiglu({.c = c, .trans_b = true, .beta = 1, .epilogue = {.activated = four}}), Error);
  EXPECT_THROW(swiglu({.trans_b = true, .epilogue = {.scales = Tensor::zeros({1}, DType::kF32), .activated = four}}),
               Error);
  EXPECT_THROW(swiglu({.trans_b = true, .epilogue = {.scales = Tensor::zeros({2}, DType::kBF16), .activated = four}}),
               Error);
  EXPECT_THROW(run(Gemm{.a = a, .b = b, .c = c, .trans_b = true, .epilogue = {.kind = Kind::kScale}}), Error);
  run(Gemm{.a = a, .b = down, .c = c, .epilogue = {.kind = Kind::kSwiGluBackward, .h = c}});
  EXPECT_THROW(run(Gemm{.a = a, .b = down, .c = four, .epilogue = {.kind = Kind::kSwiGluBackward, .h = c}}), Error);
  EXPECT_THROW(run(Gemm{.a = a, .b = down, .c = c, .epilogue = {.kind = Kind::kSwiGluBackward, .h = four}}), Error);
}

}  // namespace
}  // namespace lightmoe
