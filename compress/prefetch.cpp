#include "compress/prefetch.h"

#include <algorithm>
#include <numeric>

#include "compress/linear_algebra.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

// What one layer's router saw and chose, over all tokens so far.
struct Seen {
  std::vector<double> x, logits;  // [N*(D+1)] with a one at the end of each row, [N*E]
  std::vector<int32_t> slots;     // [N*K]
};

std::vector<Seen> run_and_look(const Olmoe& model, const std::vector<std::vector<int32_t>>& rows, int64_t at_once) {
  std::vector<Seen> seen(model.blocks.size());
  const Observer observer{
      .on_hidden = {}, .on_router = [&](const RouterView& view) {
        Seen& s = seen[static_cast<size_t>(view.layer)];
        const Tensor x = view.x.to(DType::kF64), logits = view.logits.to(DType::kF64);
        for (int64_t t = 0; t < x.dim(0); ++t) {
          const Tensor row = x.row(t);
          s.x.insert(s.x.end(), row.data<double>(), row.data<double>() + row.numel());
          s.x.push_back(1);
        }
        s.logits.insert(s.logits.end(), logits.data<double>(), logits.data<double>() + logits.numel());
        s.slots.insert(s.slots.end(), view.slots.data<int32_t>(), view.slots.data<int32_t>() + view.slots.numel());
      }};
  for (size_t first = 0; first < rows.size(); first += static_cast<size_t>(at_once)) {
    std::vector<int32_t> ids, positions, begin;
    for (size_t i = first; i < std::min(rows.size(), first + static_cast<size_t>(at_once)); ++i) {
      begin.push_back(static_cast<int32_t>(ids.size()));
      for (size_t p = 0; p < rows[i].size(); ++p) positions.push_back(static_cast<int32_t>(p));
      ids.insert(ids.end(), rows[i].begin(), rows[i].end());
    }
    begin.push_back(static_cast<int32_t>(ids.size()));
    model.forward(make_packed_batch(ids, std::vector<int32_t>(ids.size(), -100), positions, begin),
                  {.observer = &observer});
  }
  return seen;
}

Tensor matrix(const std::vector<double>& values, int64_t columns) {
  return Tensor::from(values, {static_cast<int64_t>(values.size()) / columns, columns});
}

// [D+1,E]: x W ~ logits.
Tensor fit(const Tensor& x, const Tensor& logits, double ridge) {
  const Tensor gram = with_ridge(product(x, true, x, false), ridge);
  return cholesky_solve(cholesky(gram), product(x, true, logits, false));
}

double hit_rate(const Tensor& predicted, const std::vector<int32_t>& slots, int64_t n) {
  const int64_t tokens = predicted.dim(0), k = static_cast<int64_t>(slots.size()) / tokens;
  int64_t hits = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<int32_t> set = largest(predicted.data<double>() + t * predicted.dim(1), predicted.dim(1), n);
    for (int64_t i = 0; i < k; ++i) {
      hits += std::find(set.begin(), set.end(), slots[static_cast<size_t>(t * k + i)]) != set.end() ? 1 : 0;
    }
  }
  return static_cast<double>(hits) / static_cast<double>(slots.size());
}

// Layer's router weight as [D+1,E], zero in the last row.
Tensor router_matrix(const MoeLayer& layer) {
  const Tensor w = layer.router->value.to(DType::kF64);
  const int64_t e = w.dim(0), d = w.dim(1);
  const Tensor out = Tensor::zeros({d + 1, e}, DType::kF64);
  for (int64_t i = 0; i < e; ++i) {
    for (int64_t j = 0; j < d; ++j) out.data<double>()[j * e + i] = w.data<double>()[i * d + j];
  }
  return out;
}

void check_options(const Olmoe& model, const PrefetchOptions& o) {
  const auto layers = static_cast<int64_t>(model.blocks.size());
  check(o.ahead >= 1 && o.ahead < layers, ErrorKind::kUsage, "--ahead {}: expected 1 to {} (the model has {} layers)",
        o.ahead, layers - 1, layers);
  check(o.ridge > 0, ErrorKind::kUsage, "--ridge {:g}: expected a number > 0", o.ridge);
  for (const int64_t n : o.predicted) {
    check(n >= 1 && n <= model.config.num_experts, ErrorKind::kUsage, "--predict {}: expected 1 to {} experts", n,
          model.config.num_experts);
  }
}

}  // namespace

std::vector<int32_t> largest(const double* scores, int64_t count, int64_t n) {
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  const auto better = [&](int32_t a, int32_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
  std::partial_sort(order.begin(), order.begin() + n, order.end(), better);
  order.resize(static_cast<size_t>(n));
  return order;
}

PrefetchReport measure_prefetch(const Olmoe& model, const std::vector<std::vector<int32_t>>& train,
                                const std::vector<std::vector<int32_t>>& test, const PrefetchOptions& options) {
  check_options(model, options);
  check(!train.empty() && !test.empty(), ErrorKind::kInput, "prefetch: {} rows to fit on, {} to test on", train.size(),
        test.size());
  const std::vector<Seen> fitted = run_and_look(model, train, options.batch_rows);
  const std::vector<Seen> held_out = run_and_look(model, test, options.batch_rows);
  const int64_t d = model.config.hidden_size, e = model.config.num_experts, k = model.config.num_experts_per_token;
  PrefetchReport report{.predicted = options.predicted};
  if (report.predicted.empty()) report.predicted = {k, std::min(e, 2 * k)};
  report.train_tokens = static_cast<int64_t>(fitted[0].slots.size()) / k;
  report.test_tokens = static_cast<int64_t>(held_out[0].slots.size()) / k;
  for (size_t l = static_cast<size_t>(options.ahead); l < model.blocks.size(); ++l) {
    const size_t from = l - static_cast<size_t>(options.ahead);
    const Tensor x = matrix(held_out[from].x, d + 1);
    const Tensor by_router = product(x, false, router_matrix(model.blocks[l].moe), false);
    const Tensor w = fit(matrix(fitted[from].x, d + 1), matrix(fitted[l].logits, e), options.ridge);
    const Tensor by_fit = product(x, false, w, false);
    PrefetchLayer& layer = report.layers.emplace_back();
    layer.layer = static_cast<int64_t>(l);
    for (const int64_t n : report.predicted) {
      layer.router_hits.push_back(hit_rate(by_router, held_out[l].slots, n));
      layer.linear_hits.push_back(hit_rate(by_fit, held_out[l].slots, n));
    }
  }
  return report;
}

Observer prefetch_hints(const Olmoe& model, int64_t ahead, int64_t n,
                        std::function<void(int64_t, const std::vector<int32_t>&)> hint) {
  check_options(model, {.ahead = ahead, .predicted = {n}});
  return {.on_hidden = {}, .on_router = [&model, ahead, n, hint = std::move(hint)](const RouterView& view) {
            const auto target = static_cast<size_t>(view.layer + ahead);
            if (target >= model.blocks.size()) return;
            const Tensor w = model.blocks[target].moe.router->value.to(DType::kF64);
            const Tensor logits = product(view.x.to(DType::kF64), false, w, true);
            for (int64_t t = 0; t < logits.dim(0); ++t)
              hint(view.layer + ahead, largest(logits.data<double>() + t * logits.dim(1), logits.dim(1), n));
          }};
}

}  // namespace lightmoe
