#include "kernels/gemm.h"

#include <algorithm>

#include "runtime/parallel.h"
#include "tests/support/devices.h"
#include "tests/support/gemm_checks.h"

namespace lightmoe {
namespace {

using testing::check_dense;
using testing::check_grouped_k;
using testing::check_grouped_m;
using testing::check_one_output;
using testing::GemmTypes;
using testing::GroupedVariant;
using testing::kGemmScales;
using testing::kGemmTypes;
using testing::offsets_of;
using testing::random_tensor;
using testing::Window;

// On GPUs one backend takes every product; the others hand these on to it.
bool handed_on() { return default_device() != DeviceKind::kCpu && forced_gemm_backend() != "simple"; }

// Small cases meet all types and transposes, large ones a rotating choice (on the simulator all cases do); scales, windows, gather and
// skips rotate so that each meets each.
TEST(Gemm, DenseMatchesTheEquation) {
  testing::on_each_backend([] {
    if (handed_on()) return;
    size_t turn = 0;
    for (const auto& c : cases::gemm) {
      const bool small = c.m * c.n * c.k < 20000 && default_device() != DeviceKind::kSim;
      for (unsigned trans = 0; trans < 4; ++trans, ++turn) {
        for (size_t i = 0; i < (small ? kGemmTypes.size() : 3); ++i, ++turn) {
          const GemmTypes& t = kGemmTypes[(turn + 3 * i) % kGemmTypes.size()];
          check_dense(c, t, trans & 1, trans & 2, kGemmScales[turn % kGemmScales.size()],
                      turn % 5 == 1 ? Window::kOdd : Window::kNone);
        }
      }
    }
  });
}

TEST(Gemm, GroupedMatchesTheEquation) {
  testing::on_each_backend([] {
    if (handed_on()) return;
    unsigned turn = 0;
    for (const auto& c : cases::grouped_gemm) {
      for (const GemmTypes& t : kGemmTypes) {
        const int repetitions = c.n * c.k < 2000 && default_device() != DeviceKind::kSim ? 3 : 1;
        for (int i = 0; i < repetitions; ++i, ++turn) {
          const unsigned bits = turn * 5 % 16;
          const GroupedVariant v{(bits & 1) != 0, bits & 2 ? Window::kOdd : Window::kNone, (bits & 4) != 0,
                                 (bits & 8) != 0};
          check_grouped_m(c, t, v, kGemmScales[turn % kGemmScales.size()]);
          check_grouped_k(c, t, v, kGemmScales[(turn + 1) % kGemmScales.size()], v.trans_b);
        }
        turn += 3;
      }
    }
  });
}

// Products this backend has computed so far, by the list of picks.
int64_t picks_of(std::string_view backend) {
  const std::vector<std::string> picks = gemm_picks();
  const std::string end = fmt::format(": {}", backend);
  return std::count_if(picks.begin(), picks.end(), [&](const std::string& line) { return line.ends_with(end); });
}

// Where the tensor-core backends of the devices work; those must be among the computing, not hand everything on.
TEST(Gemm, AlignedMatchesTheEquation) {
  testing::on_each_backend([] {
    if (default_device() == DeviceKind::kCpu) return;
    const bool sim = default_device() == DeviceKind::kSim;
    size_t turn = testing::part_of_seed();
    const auto types = [&](size_t i) -> const GemmTypes& {  // wgmma: two bf16 factors
      return forced_gemm_backend() == "wgmma" ? kGemmTypes[5 + i % 2] : kGemmTypes[i % 7];
    };
    for (const auto& c : cases::gemm_aligned) {
      for (unsigned trans = 0; trans < 3; ++trans) {
        for (size_t i = 0; i < (sim ? 1 : 2); ++i, ++turn) {
          check_dense(c, types(turn + 2 * i), trans == 2, trans == 1, kGemmScales[turn % kGemmScales.size()],
                      turn % 4 == 1 ? Window::kAligned : Window::kNone);
        }
      }
    }
    for (const auto& c : cases::grouped_gemm_aligned) {
      for (size_t i = 0; i < (sim ? 2 : 4); ++i, ++turn) {
        const GroupedVariant v{turn % 2 == 0, turn % 3 == 0 ? Window::kAligned : Window::kNone, turn % 4 == 3,
                               turn / 2 % 2 == 0};
        check_grouped_m(c, types(turn + 2 * i), v, kGemmScales[turn % kGemmScales.size()]);
        check_grouped_k(c, types(turn + 2 * i), v, kGemmScales[(turn + 1) % kGemmScales.size()], i == 1);
      }
    }
    EXPECT_GT(picks_of(forced_gemm_backend()), forced_gemm_backend() == "gemv" ? 5 : sim ? 20 : 40);
  });
}

// As in decoding: one to a few rows, alone or spread over many groups of which most have none, in all types, scales and windows; more rows
// in a group than a warp takes at a time.
TEST(Gemm, FewRowsMatchTheEquation) {
  testing::on_each_backend([] {
    if (default_device() == DeviceKind::kCpu) return;
    const int64_t before = picks_of(forced_gemm_backend());
    const size_t first = forced_gemm_backend() == "wgmma" ? 5 : 0,
                 count = first > 0 ? 2 : 7;  // wgmma: two bf16 factors
    size_t turn = 0;
    for (const int64_t m : {1, 2, 7, 8, 9, 17}) {
      for (size_t i = 0; i < count; ++i, ++turn) {
        check_dense({m, 24 + 7 * m, 264}, kGemmTypes[first + i], false, true, kGemmScales[turn % kGemmScales.size()],
                    turn % 3 == 1 ? Window::kAligned : Window::kNone);
      }
    }
    const std::vector<std::vector<int64_t>> rows = {{0, 1, 0, 0, 1, 1}, {8}, {0, 0, 9, 1}, std::vector<int64_t>(70, 0)};
    for (std::vector<int64_t> of_groups : rows) {
      if (of_groups.size() == 70) of_groups[3] = of_groups[7] = of_groups[33] = of_groups[69] = 2;
      for (size_t i = 0; i < count; ++i, ++turn) {
        const GroupedVariant v{turn % 2 == 0, turn % 3 == 0 ? Window::kAligned : Window::kNone, turn % 4 == 3, true};
        check_grouped_m({of_groups, 33, 40}, kGemmTypes[first + i], v, kGemmScales[turn % kGemmScales.size()]);
      }
    }
    EXPECT_GT(picks_of(forced_gemm_backend()) - before, 5);
  });
}

// More groups than one launch of a GPU backend takes, in both kinds, with an output shared by more than that.
TEST(Gemm, ManyGroups) {
  testing::on_each_backend([] {
    cases::GroupedCase c{{}, 16, 8};
    for (int64_t g = 0; g < 300; ++g) c.rows.push_back(g % 3 == 0 ? 0 : g % 5);
    const GroupedVariant v{.gather = true, .window = Window::kNone, .skip = true, .trans_b = true};
    const GemmTypes& bf16_factors = kGemmTypes[5];
    check_grouped_m(c, bf16_factors, v, {1, 0});
    check_grouped_k(c, bf16_factors, v, {0.5, 1}, false);
    check_one_output(bf16_factors, 300);
  });
}

// Rows of C in the bits of one product of many rows: alone, in small and large groups, on one thread and on three.
void check_row_independence(const GemmTypes& t, bool trans_b, int64_t n, int64_t k) {
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
  for (const GemmTypes& t : kGemmTypes) {
    if (t.c == DType::kF64) continue;  // another backend's
    check_row_independence(t, true, 45, 67);
    check_row_independence(t, false, 45, 67);
  }
  for (const bool trans_b : {false, true}) {  // several blocks of k
    check_row_independence(kGemmTypes[0], trans_b, 33, 1311);
    check_row_independence(kGemmTypes[3], trans_b, 33, 2603);
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
