// The op that chooses tokens, on every device: the same ids are kept and the same token drawn as on the host.

#include "kernels/sampling.h"

#include <map>

#include "tests/support/devices.h"

namespace lightmoe {
namespace {

using testing::to_doubles;

std::vector<int32_t> sampled(const Tensor& logits, int64_t allowed, const SamplingRule& rule, const Tensor& streams,
                             const Tensor& draws) {
  const testing::Guarded tokens({logits.dim(0)}, DType::kI32);
  run(SampleTokens{.logits = logits,
                   .allowed = allowed,
                   .rule = rule,
                   .streams = streams,
                   .draws = draws,
                   .tokens = tokens.tensor()});
  const std::vector<double> list = to_doubles(tokens.tensor());
  return {list.begin(), list.end()};
}

// Rows with ties (logits in steps of 1/4), masked ids, more ids than threads; the host draws from Philox by its own class.
TEST(SampleTokens, DrawsWhatTheHostDraws) {
  constexpr int64_t kRows = 9, kWidth = 1100;
  const SamplingRule rules[] = {{},
                                {.temperature = 1},
                                {.temperature = 0.7, .top_k = 5, .seed = 3},
                                {.temperature = 1.3, .top_p = 0.8, .seed = 4},
                                {.temperature = 2, .top_k = 40, .top_p = 0.6, .seed = 5},
                                {.temperature = 5, .top_k = 5000, .top_p = 0.999, .seed = 6},
                                {.temperature = 1e30, .top_k = 3, .seed = 7}};
  testing::on_each_device<SampleTokens>([&] {
    const Tensor random = testing::random_tensor({kRows, kWidth}, DType::kF32, 11, 2);
    const Tensor host = random.on(DeviceKind::kCpu).clone();
    for (int64_t i = 0; i < host.numel(); ++i) {
      float& x = host.data<float>()[i];
      x = i % 17 == 3 ? -INFINITY : i % 29 == 1 ? -0.0f : std::round(4 * x) / 4;
    }
    const Tensor logits = host.on(default_device());
    for (const SamplingRule& rule : rules) {
      for (const int64_t allowed : {kWidth, int64_t{700}, int64_t{1}}) {
        const Tensor streams = Tensor::from<int32_t>({0, 1, 2, 3, 4, 5, 6, 7, 100}, {kRows});
        const Tensor draws = Tensor::zeros({kRows}, DType::kI32);
        for (int step = 0; step < 3; ++step) {
          const std::vector<int32_t> tokens = sampled(logits, allowed, rule, streams, draws);
          for (int64_t n = 0; n < kRows; ++n) {
            Philox rng(rule.seed, n == 8 ? 100 : static_cast<uint64_t>(n));
            uint64_t u = 0;
            for (int i = 0; i <= step && rule.temperature > 0; ++i) u = rng.next_u64();
            const std::span<const float> row(host.data<float>() + n * kWidth, static_cast<size_t>(allowed));
            EXPECT_EQ(tokens[static_cast<size_t>(n)], sample_row(row, rule, u))
                << "row " << n << ", temperature " << rule.temperature << ", top_k " << rule.top_k << ", top_p "
                << rule.top_p;
          }
        }
        EXPECT_EQ(to_doubles(draws)[0], rule.temperature > 0 ? 3 : 0);
      }
    }
  });
}

// What is kept, by hand: weights 8, 4, 2, 1, 1 sixteenths; the tie goes to the lower id; top_p counts after top_k.
TEST(SampleTokens, KeepsByHand) {
  const auto log = [](double p) { return static_cast<float>(std::log(p)); };
  const std::vector<float> row{log(1), log(8), log(2), log(4), log(1)};
  const std::pair<SamplingRule, std::vector<int32_t>> cases[] = {{{.temperature = 1}, {0, 1, 2, 3, 4}},
                                                                 {{.temperature = 1, .top_k = 4}, {0, 1, 2, 3}},
                                                                 {{.temperature = 1, .top_p = 0.45}, {1}},
                                                                 {{.temperature = 1, .top_p = 0.7}, {1, 3}},
                                                                 {{.temperature = 1, .top_p = 0.9}, {0, 1, 2, 3}},
                                                                 {{.temperature = 1, .top_k = 2, .top_p = 0.7}, {1, 3}},
                                                                 {{.temperature = 1, .top_k = 2, .top_p = 0.6}, {1}}};
  testing::on_each_device<SampleTokens>([&] {
    constexpr int64_t kDraws =
        100;  // the rarest kept id has probability 1/16; draws are Philox's, the same in every run
    std::vector<float> rows;
    std::vector<int32_t> streams;
    for (int32_t n = 0; n < kDraws; ++n) rows.insert(rows.end(), row.begin(), row.end()), streams.push_back(n);
    size_t turn = 0;
    for (const auto& [rule, expected] : cases) {
      if (!testing::is_run_now(turn++, 2)) continue;
      std::map<int32_t, int> counts;
      for (const int32_t token : sampled(Tensor::from(rows, {kDraws, 5}), 5, rule, Tensor::from(streams, {kDraws}),
                                         Tensor::zeros({kDraws}, DType::kI32))) {
        ++counts[token];
      }
      std::vector<int32_t> seen;
      for (const auto& [token, count] : counts) seen.push_back(token);
      EXPECT_EQ(seen, expected) << "top_k " << rule.top_k << ", top_p " << rule.top_p;
    }
  });
}

TEST(SampleTokens, MarksRowsThatAreNotFinite) {
  testing::on_each_device<SampleTokens>([] {
    const Tensor logits = Tensor::from<float>(
        {1, NAN, 0, -INFINITY, -INFINITY, -INFINITY, 0, INFINITY, 1, -INFINITY, 2, -INFINITY}, {4, 3});
    for (const double temperature : {0.0, 1.0}) {
      EXPECT_EQ(sampled(logits, 3, {.temperature = temperature}, Tensor::zeros({4}, DType::kI32),
                        Tensor::zeros({4}, DType::kI32)),
                (std::vector<int32_t>{-1, -1, -1, 1}));
    }
  });
}

TEST(AdvanceSequences, FeedsTheTokensAndCounts) {
  testing::on_each_device<AdvanceSequences>([] {
    const auto of = [](std::vector<int32_t> v) { return Tensor::from(v, {static_cast<int64_t>(v.size())}); };
    const Tensor ids = of({0, 0}), positions = of({4, 9}), k_count = of({5, 10}), rows = of({4, 29});
    run(AdvanceSequences{
        .tokens = of({7, 3}), .ids = ids, .positions = positions, .k_count = k_count, .cache_rows = rows});
    EXPECT_EQ(to_doubles(ids), (std::vector<double>{7, 3}));
    EXPECT_EQ(to_doubles(positions), (std::vector<double>{5, 10}));
    EXPECT_EQ(to_doubles(k_count), (std::vector<double>{6, 11}));
    EXPECT_EQ(to_doubles(rows), (std::vector<double>{5, 30}));
  });
}

}  // namespace
}  // namespace lightmoe
