#include "kernels/attention.h"

#include <algorithm>
#include <functional>

#include "bench/op_bench.h"
#include "tests/cases/attention.h"

namespace lightmoe {
namespace {

struct Problem {
  Attention forward;
  double pairs = 0;  // (query, key) pairs that see each other
};

Problem make(const cases::AttentionCase& c, DType dtype, DType kv_dtype) {
  std::vector<int32_t> q_begin = {0}, k_begin, k_count, q_pos;
  int32_t keys = 0;
  Problem p;
  for (const auto& s : c.sequences) {
    q_begin.push_back(q_begin.back() + s.queries), k_begin.push_back(keys += s.k_gap), k_count.push_back(s.k_count),
        q_pos.push_back(s.q_pos);
    keys += s.k_count;
    for (int32_t j = 0; j < s.queries; ++j) p.pairs += std::max(0, std::min(s.k_count, s.q_pos + j + 1));
  }
  const int64_t n = static_cast<int64_t>(c.sequences.size()), rows = q_begin.back();
  p.forward = {.q = bench::random({rows, c.heads * c.head_dim}, dtype),
               .k = bench::random({keys, c.kv_heads * c.head_dim}, kv_dtype),
               .v = bench::random({keys, c.kv_heads * c.head_dim}, kv_dtype),
               .sequences = {Tensor::from(q_begin, {n + 1}), Tensor::from(k_begin, {n}), Tensor::from(k_count, {n}),
                             Tensor::from(q_pos, {n})},
               .head_dim = c.head_dim,
               .out = Tensor::empty({rows, c.heads * c.head_dim}, dtype),
               .lse = Tensor::empty({c.heads, rows}, DType::kF32)};
  return p;
}

// Of Hopper's two ways through training's passes the one on mma.sync.
std::function<void()> without_wgmma(const std::function<void()>& call) {
  return [call] {
    set_attention_takes_wgmma(false);
    call();
    set_attention_takes_wgmma(true);
  };
}

// Training's passes, or inference's, which keep no lse.
void add(const cases::AttentionCase& c, DType dtype, DType kv_dtype, bool training = true, bool wgmma = true) {
  std::string name = c.name;
  std::replace(name.begin(), name.end(), ' ', '_');
  const std::string types = dtype == kv_dtype ? fmt::format("{}", name_of(dtype))
                                              : fmt::format("{}_kv_{}", name_of(dtype), name_of(kv_dtype));
  const std::string suffix = fmt::format("/{}/{}_{}h{}kv{}d{}{}", types, name, c.heads, c.kv_heads, c.head_dim,
                                         training ? "" : "/inference", wgmma ? "" : "/mma");
  const auto chosen = [wgmma](const std::function<void()>& call) { return wgmma ? call : without_wgmma(call); };
  const double per_pair = static_cast<double>(c.heads * c.head_dim);
  bench::add("op/attention" + suffix, [=] {
    Problem p = make(c, dtype, kv_dtype);
    if (!training) p.forward.lse = {};
    return bench::Work{.bytes = bench::bytes_of({p.forward.k, p.forward.v}),
                       .flops = 4 * per_pair * p.pairs,
                       .run = chosen([=] { run(p.forward); })};
  });
  if (!training) return;
  bench::add("op/attention_backward" + suffix, [=] {
    const Problem p = make(c, dtype, kv_dtype);
    const Attention& f = p.forward;
    run(f);
    const AttentionBackward op{.q = f.q,
                               .k = f.k,
                               .v = f.v,
                               .out = f.out,
                               .lse = f.lse,
                               .dout = bench::random(f.q.shape(), dtype),
                               .sequences = f.sequences,
                               .head_dim = c.head_dim,
                               .dq = f.q.clone(),
                               .dk = f.k.clone(),
                               .dv = f.v.clone()};
    return bench::Work{.flops = 10 * per_pair * p.pairs, .run = chosen([=] { run(op); })};
  });
}

const bool registered = bench::registered([] {
  for (const auto& c : cases::attention) add(c, DType::kF32, DType::kF32);
  const std::vector<cases::AttentionSequence> one = {{1024, 1024, 0, 0}}, four = {{4096, 4096, 0, 0}},
                                              step = {{1, 4096, 4095, 0}};
  add({"1024", 16, 16, 128, one}, DType::kF32, DType::kF32);
  add({"1024", 16, 16, 128, one}, DType::kBF16, DType::kBF16);
  add({"4096", 16, 16, 128, four}, DType::kF32, DType::kF32);
  add({"decode_at_4096", 16, 16, 128, step}, DType::kF32, DType::kF32, false);
  add({"decode_at_4096", 16, 16, 128, step}, DType::kF32, DType::kBF16, false);
  add({"decode_at_4096", 16, 2, 128, step}, DType::kF32, DType::kF32, false);
  const std::vector<cases::AttentionSequence> eight(8, {4096, 4096, 0, 0});
  if (bench::is_for_gpu()) {
    for (const bool wgmma : {true, false}) {
      add({"4096", 16, 16, 128, four}, DType::kBF16, DType::kBF16, true, wgmma);
      add({"8_x_4096", 16, 16, 128, eight}, DType::kBF16, DType::kBF16, true, wgmma);
    }
    add({"4096", 16, 16, 128, four}, DType::kBF16, DType::kBF16, false);
    add({"decode_at_4096", 16, 16, 128, step}, DType::kBF16, DType::kBF16, false);
  }
  // The demo's shape: rows of packed documents of about 40 tokens, narrow heads.
  add({"packed_40", 4, 4, 32, std::vector<cases::AttentionSequence>(100, {40, 40, 0, 0})}, DType::kF32, DType::kF32);
});

}  // namespace
}  // namespace lightmoe
