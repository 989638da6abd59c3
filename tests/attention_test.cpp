#include "kernels/attention.h"

#include <limits>

#include "tests/cases/attention.h"
#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::Guarded;
using testing::random_tensor;
using testing::to_doubles;

DType accumulator_type(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

struct Problem {
  cases::AttentionCase c;
  AttentionSequences sequences;
  std::vector<int64_t> q_begin = {0}, k_begin;
  Tensor q, k, v, dout;
  Problem(const cases::AttentionCase& description, DType dtype, DType kv_dtype) : c(description) {
    std::vector<int32_t> q_offsets = {0}, k_offsets, k_counts, q_positions;
    int32_t key = 0;
    for (const auto& s : c.sequences) {
      q_offsets.push_back(q_offsets.back() + s.queries);
      k_offsets.push_back(key += s.k_gap);
      k_counts.push_back(s.k_count);
      q_positions.push_back(s.q_pos);
      key += s.k_count;
    }
    q_begin.assign(q_offsets.begin(), q_offsets.end());
    k_begin.assign(k_offsets.begin(), k_offsets.end());
    const int64_t n = static_cast<int64_t>(c.sequences.size()), rows = q_offsets.back(),
                  keys = key + 2;  // two rows behind nobody owns
    sequences = {Tensor::from(q_offsets, {n + 1}), Tensor::from(k_offsets, {n}), Tensor::from(k_counts, {n}),
                 Tensor::from(q_positions, {n})};
    q = random_tensor({rows, c.heads * c.head_dim}, dtype, 1), dout = random_tensor(q.shape(), dtype, 2);
    k = random_tensor({keys, c.kv_heads * c.head_dim}, kv_dtype, 3), v = random_tensor(k.shape(), kv_dtype, 4);
    k = poisoned(k), v = poisoned(v);
  }
  // NaN in the rows that nobody owns: what lies beside a sequence's keys does not reach its results.
  Tensor poisoned(const Tensor& t) const {
    std::vector<double> values = to_doubles(t);
    std::vector<bool> owned(static_cast<size_t>(t.dim(0)), false);
    for (size_t n = 0; n < c.sequences.size(); ++n)
      std::fill_n(owned.begin() + k_begin[n], c.sequences[n].k_count, true);
    for (size_t i = 0; i < values.size(); ++i) {
      if (!owned[i / static_cast<size_t>(t.dim(1))]) values[i] = std::numeric_limits<double>::quiet_NaN();
    }
    return Tensor::from(values, t.shape()).to(t.dtype());
  }
  Attention forward(const Tensor& out, const Tensor& lse) const {
    return {.q = q, .k = k, .v = v, .sequences = sequences, .head_dim = c.head_dim, .out = out, .lse = lse};
  }
  int64_t visible(size_t n, int64_t j) const {
    return std::max<int64_t>(0, std::min<int64_t>(c.sequences[n].k_count, c.sequences[n].q_pos + j + 1));
  }
};

struct Oracle {
  std::vector<double> out, lse, dq, dk, dv;
  explicit Oracle(const Problem& p)
      : q_(to_doubles(p.q)), k_(to_doubles(p.k)), v_(to_doubles(p.v)), dout_(to_doubles(p.dout)) {
    out.assign(q_.size(), 0), dq = out;
    dk.assign(k_.size(), 0), dv = dk;
    lse.assign(static_cast<size_t>(p.c.heads * p.q.dim(0)), -std::numeric_limits<double>::infinity());
    for (size_t n = 0; n < p.c.sequences.size(); ++n) {
      for (int64_t j = 0; j < p.c.sequences[n].queries; ++j) {
        for (int64_t head = 0; head < p.c.heads; ++head) query(p, n, j, head);
      }
    }
  }

 private:
  void query(const Problem& p, size_t n, int64_t j, int64_t head) {
    const int64_t width = p.c.head_dim, row = p.q_begin[n] + j, visible = p.visible(n, j);
    const size_t at = static_cast<size_t>((row * p.c.heads + head) * width), w = static_cast<size_t>(width);
    const double scale = 1 / std::sqrt(static_cast<double>(width));
    std::vector<double> prob(static_cast<size_t>(visible)), dprob(prob);
    double sum = 0, mean = 0;
    const auto key_at = [&](size_t i) {
      return static_cast<size_t>(
          ((p.k_begin[n] + static_cast<int64_t>(i)) * p.c.kv_heads + head / (p.c.heads / p.c.kv_heads)) * width);
    };
    for (size_t i = 0; i < prob.size(); ++i) {
      double score = 0;
      for (size_t d = 0; d < w; ++d)
        score += q_[at + d] * k_[key_at(i) + d], dprob[i] += dout_[at + d] * v_[key_at(i) + d];
      sum += prob[i] = std::exp(scale * score);
    }
    if (visible > 0) lse[static_cast<size_t>(head * p.q.dim(0) + row)] = std::log(sum);
    for (size_t i = 0; i < prob.size(); ++i) {
      prob[i] /= sum;
      mean += prob[i] * dprob[i];
      for (size_t d = 0; d < w; ++d)
        out[at + d] += prob[i] * v_[key_at(i) + d], dv[key_at(i) + d] += prob[i] * dout_[at + d];
    }
    for (size_t i = 0; i < prob.size(); ++i) {
      const double dscore = scale * prob[i] * (dprob[i] - mean);
      for (size_t d = 0; d < w; ++d) dq[at + d] += dscore * k_[key_at(i) + d], dk[key_at(i) + d] += dscore * q_[at + d];
    }
  }
  std::vector<double> q_, k_, v_, dout_;
};

// Scores are sums of head_dim products; an absolute error of a score is a relative error of a probability; the weighted sum over
// keys adds its own. Values are of order 1, scores of order 3.
double tolerance_of(const Problem& p, DType result) {
  const DType compute = accumulator_type(p.q.dtype());
  return testing::sum_tolerance(compute, p.c.head_dim) * 3 + testing::sum_tolerance(result, p.k.dim(0));
}

bool on_cpu() { return default_device() == DeviceKind::kCpu; }

void check_case(const cases::AttentionCase& c, DType dtype, DType kv_dtype) {
  SCOPED_TRACE(::testing::Message() << c.name << " " << name_of(dtype) << " " << name_of(kv_dtype));
  const Problem p(c, dtype, kv_dtype);
  const Oracle oracle(p);
  const Guarded out(p.q.shape(), dtype), lse({c.heads, p.q.dim(0)}, accumulator_type(dtype));
  run(p.forward(out.tensor(), lse.tensor()));
  EXPECT_TRUE(testing::close(out.tensor(), oracle.out, testing::unit_roundoff(dtype),
                             tolerance_of(p, accumulator_type(dtype))));
  EXPECT_TRUE(testing::close(lse.tensor(), oracle.lse, tolerance_of(p, accumulator_type(dtype))));

  const Guarded dq(p.q.shape(), dtype), dk(p.k.shape(), kv_dtype), dv(p.k.shape(), kv_dtype);
  run(AttentionBackward{.q = p.q,
                        .k = p.k,
                        .v = p.v,
                        .out = out.tensor(),
                        .lse = lse.tensor(),
                        .dout = p.dout,
                        .sequences = p.sequences,
                        .head_dim = c.head_dim,
                        .dq = dq.tensor(),
                        .dk = dk.tensor(),
                        .dv = dv.tensor()});
  // <out, dout> is taken from the stored out: its rounding reaches dscore as an absolute error of order sqrt(head_dim).
  const double from_out = testing::unit_roundoff(dtype) * std::sqrt(static_cast<double>(c.head_dim));
  EXPECT_TRUE(testing::close(dq.tensor(), oracle.dq, 2 * tolerance_of(p, dtype),
                             8 * tolerance_of(p, accumulator_type(dtype)) + from_out));
  EXPECT_TRUE(testing::close(dk.tensor(), oracle.dk, 2 * tolerance_of(p, kv_dtype),
                             8 * tolerance_of(p, accumulator_type(dtype)) + from_out));
  EXPECT_TRUE(testing::close(dv.tensor(), oracle.dv, 2 * tolerance_of(p, kv_dtype),
                             8 * tolerance_of(p, accumulator_type(dtype))));
}

TEST(Attention, MatchesTheEquation) {
  testing::on_each_device<Attention, AttentionBackward>([] {
    struct Run {
      DType dtype, kv_dtype;
      bool wgmma = true;
    };
    size_t turn = 0;
    for (const auto& c : cases::attention) {
      const bool two_kernels = !on_cpu() && c.head_dim >= 64 && c.heads == c.kv_heads;  // wgmma's and mma's
      std::vector<Run> runs;
      for (const DType dtype : testing::floating_dtypes()) runs.push_back({dtype, dtype});
      if (two_kernels) runs.push_back({DType::kBF16, DType::kBF16, false});
      // On devices two types differ in the loads alone: some cases are enough.
      if (on_cpu() || c.head_dim == 16) runs.push_back({DType::kF32, DType::kBF16});
      for (const Run& run : runs) {
        if (two_kernels && !testing::is_run_now(turn++, runs.size())) continue;
        set_attention_takes_wgmma(run.wgmma);
        check_case(c, run.dtype, run.kv_dtype);
      }
      set_attention_takes_wgmma(true);
      turn += two_kernels;
    }
  });
}

TEST(Attention, GradientCheck) {
  const Problem p({"", 4, 2, 3, {{4, 4, 0, 1}, {2, 5, 3, 0}, {3, 2, -1, 0}}}, DType::kF64, DType::kF64);
  const Tensor out = Tensor::empty(p.q.shape(), DType::kF64), lse = Tensor::empty({4, p.q.dim(0)}, DType::kF64);
  const auto loss = [&] {
    run(p.forward(out, lse));
    double sum = 0;
    for (int64_t i = 0; i < out.numel(); ++i) sum += out.data<double>()[i] * p.dout.data<double>()[i];
    return sum;
  };
  loss();
  const Tensor dq = Tensor::empty(p.q.shape(), DType::kF64), dk = Tensor::empty(p.k.shape(), DType::kF64),
               dv = dk.clone();
  run(AttentionBackward{.q = p.q,
                        .k = p.k,
                        .v = p.v,
                        .out = out,
                        .lse = lse,
                        .dout = p.dout,
                        .sequences = p.sequences,
                        .head_dim = 3,
                        .dq = dq,
                        .dk = dk,
                        .dv = dv});
  EXPECT_TRUE(testing::gradient_matches(loss, p.q, dq));
  EXPECT_TRUE(testing::gradient_matches(loss, p.k, dk));
  EXPECT_TRUE(testing::gradient_matches(loss, p.v, dv));
}

// Runs sequence n of p alone, its keys copied to row `k_offset` of a fresh cache, all queries or only the last `tail`; as training does, with
// lse, or as inference.
Tensor run_alone(const Problem& p, size_t n, int64_t k_offset, int64_t tail, bool training = false) {
  const auto& s = p.c.sequences[n];
  const int64_t first = s.queries - std::min<int64_t>(tail, s.queries), queries = s.queries - first;
  const Tensor k = random_tensor({k_offset + s.k_count + 3, p.k.dim(1)}, p.k.dtype(), 90),
               v = random_tensor(k.shape(), p.v.dtype(), 91);
  k.slice(k_offset, k_offset + s.k_count).copy_from(p.k.slice(p.k_begin[n], p.k_begin[n] + s.k_count));
  v.slice(k_offset, k_offset + s.k_count).copy_from(p.v.slice(p.k_begin[n], p.k_begin[n] + s.k_count));
  const AttentionSequences sequences{Tensor::from<int32_t>({0, static_cast<int32_t>(queries)}, {2}),
                                     Tensor::from<int32_t>({static_cast<int32_t>(k_offset)}, {1}),
                                     Tensor::from<int32_t>({s.k_count}, {1}),
                                     Tensor::from<int32_t>({static_cast<int32_t>(s.q_pos + first)}, {1})};
  const Tensor out = Tensor::empty({queries, p.q.dim(1)}, p.q.dtype());
  run(Attention{.q = p.q.slice(p.q_begin[n] + first, p.q_begin[n + 1]),
                .k = k,
                .v = v,
                .sequences = sequences,
                .head_dim = p.c.head_dim,
                .out = out,
                .lse = training ? Tensor::empty({p.c.heads, queries}, accumulator_type(p.q.dtype())) : Tensor()});
  return out;
}

void check_alone(DType dtype, int64_t least_head_dim, bool training = false) {
  const std::vector<int64_t> k_offsets = on_cpu() ? std::vector<int64_t>{0, 1, 37} : std::vector<int64_t>{37};
  for (const auto& c : cases::attention) {
    if (c.head_dim < least_head_dim) continue;
    const Problem p(c, dtype, dtype);
    const Tensor out = Tensor::empty(p.q.shape(), dtype);
    run(p.forward(out, training ? Tensor::empty({c.heads, p.q.dim(0)}, accumulator_type(dtype)) : Tensor()));
    for (size_t n = 0; n < c.sequences.size(); ++n) {
      const int64_t queries = c.sequences[n].queries;
      for (const int64_t k_offset : k_offsets) {
        EXPECT_TRUE(testing::bits_equal(run_alone(p, n, k_offset, queries, training),
                                        out.slice(p.q_begin[n], p.q_begin[n + 1])))
            << c.name << " " << name_of(dtype);
      }
    }
  }
}

TEST(Attention, AQueryDoesNotDependOnWhatElseIsInTheCall) {
  testing::on_each_device<Attention>([] {
    check_alone(DType::kF32, 0);
    check_alone(DType::kBF16, on_cpu() ? 0 : 64);  // from 64 on devices have other kernels for it
    if (!on_cpu()) check_alone(DType::kBF16, 64, true);
  });
}

// A token's result is the same whether it came with its prompt or alone, one step later, out of a cache that has grown since.
void check_decode(DType dtype, DType kv_dtype, int64_t head_dim) {
  const Problem whole({"", 4, 2, head_dim, {{300, 300, 0, 0}}}, dtype, kv_dtype);
  const Tensor out = Tensor::empty(whole.q.shape(), dtype);
  run(whole.forward(out, {}));
  for (int32_t t = 0; t < 300; t += on_cpu() ? 1 : 41) {
    Problem part = whole;
    part.c.sequences = {{t + 1, t + 1, 0, 0}};
    part.q_begin = {0, t + 1};
    EXPECT_TRUE(testing::bits_equal(run_alone(part, 0, 5, 1), out.slice(t, t + 1))) << "token " << t;
    const int64_t tail = std::min(3, t + 1);
    EXPECT_TRUE(testing::bits_equal(run_alone(part, 0, 0, tail), out.slice(t + 1 - tail, t + 1))) << "token " << t;
  }
}

TEST(Attention, DecodeRepeatsPrefillBitForBit) {
  testing::on_each_device<Attention>([] {
    check_decode(DType::kF32, DType::kF32, 32);
    check_decode(DType::kF32, DType::kBF16, 32);
    check_decode(DType::kBF16, DType::kBF16, 64);
  });
}

// Head widths between and beyond those of the cases: sums over 192 and 256 columns.
TEST(Attention, WideHeads) {
  testing::on_each_device<Attention, AttentionBackward>([] {
    check_case({"wide", 2, 1, 192, {{37, 37, 0, 0}}}, DType::kF32, DType::kF32);
    check_case({"widest", 2, 2, 256, {{19, 19, 0, 0}}}, DType::kBF16, DType::kBF16);
  });
}

TEST(Attention, IsTheSameOnAnyThreads) {
  const Problem p({"", 6, 3, 32, {{200, 200, 0, 0}, {50, 50, 0, 0}, {1, 300, 299, 0}}}, DType::kF32, DType::kF32);
  EXPECT_TRUE(testing::same_on_any_threads([&] {
    const Tensor out = Tensor::empty(p.q.shape(), DType::kF32), lse = Tensor::empty({6, p.q.dim(0)}, DType::kF32);
    run(p.forward(out, lse));
    const Tensor gradients = Tensor::empty({p.q.numel() + 2 * p.k.numel()}, DType::kF32);
    const int64_t q_end = p.q.numel(), k_end = q_end + p.k.numel();
    run(AttentionBackward{.q = p.q,
                          .k = p.k,
                          .v = p.v,
                          .out = out,
                          .lse = lse,
                          .dout = p.dout,
                          .sequences = p.sequences,
                          .head_dim = 32,
                          .dq = gradients.slice(0, q_end).reshape(p.q.shape()),
                          .dk = gradients.slice(q_end, k_end).reshape(p.k.shape()),
                          .dv = gradients.slice(k_end, gradients.numel()).reshape(p.k.shape())});
    return gradients;
  }));
}

// Scores of +-1000 overflow exp without the running maximum; the softmax is then one-hot.
void check_large_scores() {
  const Tensor q = Tensor::from<float>({1000}, {1, 1}), k = Tensor::from<float>({-1, 1, 0.5f}, {3, 1});
  const Tensor v = Tensor::from<float>({3, 5, 7}, {3, 1});
  const Guarded out({1, 1}, DType::kF32), lse({1, 1}, DType::kF32);
  const AttentionSequences sequences{Tensor::from<int32_t>({0, 1}, {2}), Tensor::from<int32_t>({0}, {1}),
                                     Tensor::from<int32_t>({3}, {1}), Tensor::from<int32_t>({2}, {1})};
  run(Attention{
      .q = q, .k = k, .v = v, .sequences = sequences, .head_dim = 1, .out = out.tensor(), .lse = lse.tensor()});
  EXPECT_EQ(to_doubles(out.tensor())[0], 5);
  EXPECT_EQ(to_doubles(lse.tensor())[0], 1000);
}

TEST(Attention, LargeScoresDoNotOverflow) { testing::on_each_device<Attention>(check_large_scores); }

TEST(Attention, RefusesWrongArguments) {
  const Problem p({"", 2, 1, 4, {{3, 3, 0, 0}}}, DType::kF32, DType::kF32);
  const Tensor out = Tensor::empty(p.q.shape(), DType::kF32);
  Attention op = p.forward(out, {});
  op.head_dim = 3;
  EXPECT_THROW(run(op), Error);
  op = p.forward(out, {});
  op.sequences.k_count = Tensor::from<int32_t>({6}, {1});  // beyond the key rows
  EXPECT_THROW(run(op), Error);
  op = p.forward(out, {});
  op.sequences.q_begin = Tensor::from<int32_t>({0, 2}, {2});  // a query nobody owns
  EXPECT_THROW(run(op), Error);
}

}  // namespace
}  // namespace lightmoe
