#include "kernels/gemm.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "kernels/gemm_text.h"
#include "kernels/gemm_tuning.h"

namespace lightmoe {
namespace {

bool is_f32_or_bf16(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16; }

void check_dtypes(const char* op, const Tensor& a, const Tensor& b, const Tensor& c) {
  const bool small = is_f32_or_bf16(a.dtype()) && is_f32_or_bf16(b.dtype()) && is_f32_or_bf16(c.dtype());
  const bool all_f64 = a.dtype() == DType::kF64 && b.dtype() == DType::kF64 && c.dtype() == DType::kF64;
  require(small || all_f64, "{}: a {}, b {}, c {}; expected each f32 or bf16, or all f64", op, name_of(a.dtype()),
          name_of(b.dtype()), name_of(c.dtype()));
  require(a.device() == b.device() && a.device() == c.device(), "{}: a on {}, b on {}, c on {}; expected one device",
          op, name_of(a.device()), name_of(b.device()), name_of(c.device()));
}

void check_matrix(const char* op, const char* name, const Tensor& t) {
  require(t.defined(), "{}: {} is missing, expected a matrix", op, name);
  require(t.rank() == 2, "{}: {} is {}, expected a matrix", op, name, t.shape());
}

void check_window(const char* op, const char* name, const Tensor& t, int64_t column, int64_t width) {
  require(column >= 0 && column + width <= t.dim(1), "{}: columns [{}, {}) of {} {}", op, column, column + width, name,
          t.shape());
}

bool on_host(const Tensor& t) { return t.device() == DeviceKind::kCpu; }

// Offsets ascend within [0, rows]; on a GPU only their shape is checked.
void check_offsets(const char* op, const Tensor& offsets, size_t groups, int64_t rows, DeviceKind device) {
  require_tensor(offsets, op, "offsets", {static_cast<int64_t>(groups) + 1}, DType::kI32);
  require(offsets.device() == device, "{}: offsets on {}, the matrices on {}", op, name_of(offsets.device()),
          name_of(device));
  if (!on_host(offsets)) return;
  const int32_t* o = offsets.data<int32_t>();
  require(o[0] >= 0 && o[groups] <= rows && std::is_sorted(o, o + groups + 1),
          "{}: offsets [{} .. {}] must ascend within {} rows", op, o[0], o[groups], rows);
}

// R rows taken from t: identity, or an index list inside t.
void check_rows(const char* op, const char* name, const Tensor& t, const Tensor& rows, int64_t count) {
  if (!rows.defined()) {
    require(count <= t.dim(0), "{}: {} rows of {} {}", op, count, name, t.shape());
    return;
  }
  require(rows.rank() == 1 && rows.dim(0) >= count && rows.dtype() == DType::kI32,
          "{}: row list of {} is {} {}, expected [{}] i32", op, name, rows.shape(), name_of(rows.dtype()), count);
  require(rows.device() == t.device(), "{}: {} on {}, its row list on {}", op, name, name_of(t.device()),
          name_of(rows.device()));
  if (!on_host(rows)) return;
  const int32_t* r = rows.data<int32_t>();
  for (int64_t i = 0; i < count; ++i) {
    require(r[i] >= 0 && r[i] < t.dim(0), "{}: row {} of the list is {}, outside {} {}", op, i, r[i], name, t.shape());
  }
}

// The type of C, which an epilogue may have no use for, and the number of its rows.
const Tensor& written(const Tensor& c, const GemmEpilogue& e) { return c.defined() ? c : e.activated; }

// With an epilogue: `rows` of them are computed, the product's width is n.
void check_epilogue(const char* op, const GemmEpilogue& e, const Tensor& c, int64_t rows, int64_t n) {
  if (e.kind == GemmEpilogueKind::kNone) return;
  const Tensor& out = written(c, e);
  const DType accumulator = out.dtype() == DType::kF64 ? DType::kF64 : DType::kF32;
  const auto check_device = [&](const char* name, const Tensor& t) {
    require(t.device() == out.device(), "{}: {} on {}, the output on {}", op, name, name_of(t.device()),
            name_of(out.device()));
  };
  if (e.scale_rows.defined()) {
    require(e.scale_rows.rank() == 1 && e.scale_rows.dim(0) >= rows && e.scale_rows.dtype() == DType::kI32,
            "{}: scale_rows is {} {}, expected [{}] i32", op, e.scale_rows.shape(), name_of(e.scale_rows.dtype()),
            rows);
    check_device("scale_rows", e.scale_rows);
  }
  const auto check_factors = [&](const char* name, const Tensor& t) {
    require(t.dtype() == accumulator, "{}: {} is {}, expected {}", op, name, name_of(t.dtype()), name_of(accumulator));
    require(e.scale_rows.defined() || t.numel() >= rows, "{}: {} is {}, expected {} of them", op, name, t.shape(),
            rows);
    check_device(name, t);
  };
  if (e.scales.defined()) check_factors("scales", e.scales);
  if (e.dots.defined()) check_factors("dots", e.dots);
  if (e.kind == GemmEpilogueKind::kScale) {
    require(e.scales.defined(), "{}: an epilogue that scales has no scales", op);
    return;
  }
  const int64_t width = e.kind == GemmEpilogueKind::kSwiGlu ? n / 2 : n;
  const auto check_rows_of = [&](const char* name, const Tensor& t, int64_t columns) {
    require(t.rank() == 2 && t.dim(0) >= rows && t.dim(1) == columns && t.dtype() == out.dtype(),
            "{}: {} is {} {}, expected [{}, {}] {}", op, name, t.shape(), name_of(t.dtype()), rows, columns,
            name_of(out.dtype()));
    check_device(name, t);
  };
  if (e.kind == GemmEpilogueKind::kSwiGlu) {
    require(n % 2 == 0, "{}: SwiGLU of {} columns, expected an even number", op, n);
    if (c.defined()) check_rows_of("c", c, n);
    check_rows_of("activated", e.activated, width);
    return;
  }
  check_rows_of("c", c, 2 * width), check_rows_of("h", e.h, 2 * width);
  if (e.activated.defined()) check_rows_of("activated", e.activated, width);
}

// What SwiGLU, forward or backward, does not go with.
template <class Op>
void check_swiglu(const char* name, const Op& op) {
  if (op.epilogue.kind != GemmEpilogueKind::kSwiGlu && op.epilogue.kind != GemmEpilogueKind::kSwiGluBackward) return;
  require(op.alpha == 1 && op.beta == 0 && op.c_column == 0,
          "{}: SwiGLU with alpha {}, beta {}, column {} of c; expected 1, 0, 0", name, op.alpha, op.beta, op.c_column);
  require(op.trans_b || op.epilogue.kind != GemmEpilogueKind::kSwiGlu, "{}: SwiGLU wants b with its rows along k",
          name);
}

// Columns of C that the product itself has.
int64_t product_width(const GemmDesc& desc) {
  return desc.epilogue == GemmEpilogueKind::kSwiGluBackward ? 2 * desc.n : desc.n;
}

// The first matrix a group uses, nullptr when all groups are skipped. All of them have one shape and dtype.
const Tensor* first_defined(const char* op, const char* name, const std::vector<Tensor>& list) {
  const Tensor* first = nullptr;
  for (const Tensor& t : list) {
    if (!t.defined()) continue;
    if (first == nullptr) {
      check_matrix(op, name, t);
      first = &t;
    }
    require_tensor(t, op, name, first->shape(), first->dtype());
  }
  return first;
}

GemmDesc describe(GemmKind kind, const Tensor& a, const Tensor& b, const Tensor& c, GemmCompute compute) {
  return {.kind = kind,
          .device = a.device(),
          .a = a.dtype(),
          .b = b.dtype(),
          .c = c.dtype(),
          .compute = compute,
          .groups = 1,
          .alignment = 16};
}

// Narrows desc.alignment to what this operand's rows have.
void align(GemmDesc& desc, const Tensor& t, int64_t column) {
  const auto size = static_cast<uintptr_t>(size_of(t.dtype()));
  const uintptr_t starts = (reinterpret_cast<uintptr_t>(t.raw()) + static_cast<uintptr_t>(column) * size) |
                           static_cast<uintptr_t>(t.dim(1)) * size;
  while (starts % static_cast<uintptr_t>(desc.alignment) != 0) desc.alignment /= 2;
}

// --- choice ----------------------------------------------------------------------------------------

std::vector<GemmBackend>& backends() {
  static std::vector<GemmBackend> list;
  return list;
}

using PickKey = std::tuple<int, int, int, int, int, int, bool, bool, bool, int64_t, int64_t, int64_t, int64_t, int, int,
                           std::string_view, std::string_view>;
constexpr size_t kMaxPicks = 65536;  // evaluation meets a new row count with every text; some MB at the very most

struct Choice {
  std::mutex mutex;
  std::string_view forced = "auto";  // a registered name, or "auto"
  std::map<PickKey, size_t> order;   // shape and choice -> position in the list
  std::vector<std::string> lines;
};
Choice& choice() {
  static Choice state;
  return state;
}

void record(const GemmDesc& d, std::string_view picked, std::string_view refused) {
  Choice& state = choice();
  if (state.lines.size() >= kMaxPicks) return;
  const PickKey key{static_cast<int>(d.kind),
                    static_cast<int>(d.device),
                    static_cast<int>(d.a),
                    static_cast<int>(d.b),
                    static_cast<int>(d.c),
                    static_cast<int>(d.compute),
                    d.trans_a,
                    d.trans_b,
                    d.gather,
                    d.m,
                    d.n,
                    d.k,
                    d.groups,
                    d.alignment,
                    static_cast<int>(d.epilogue),
                    picked,
                    refused};
  if (!state.order.emplace(key, state.lines.size()).second) return;
  std::string line = fmt::format("{}: {}", text_of(d), picked);
  if (!refused.empty()) line += fmt::format(" ({} does not support it)", refused);
  state.lines.push_back(std::move(line));
}

}  // namespace

std::string text_of(const GemmDesc& d) {
  constexpr std::string_view kinds[] = {"dense", "grouped_m", "grouped_k"};
  constexpr std::string_view epilogues[] = {"", " scale", " swiglu", " swiglu_backward"};
  return fmt::format("{} {}{} {}x{}->{}{}{}{} m={} n={} k={} g={}", kinds[static_cast<int>(d.kind)],
                     d.trans_a ? "t" : "n", d.trans_b ? "t" : "n", name_of(d.a), name_of(d.b), name_of(d.c),
                     d.compute == GemmCompute::kBF16 ? " bf16" : "", d.gather ? " gather" : "",
                     epilogues[static_cast<int>(d.epilogue)], d.m, d.n, d.k, d.groups);
}

RegisterGemmBackend::RegisterGemmBackend(const GemmBackend& backend) { backends().push_back(backend); }
const std::vector<GemmBackend>& gemm_backends() { return backends(); }

void force_gemm_backend(std::string_view name) {
  std::string names = "auto";
  std::string_view registered = name == "auto" ? std::string_view("auto") : std::string_view();
  for (const GemmBackend& backend : backends()) {
    const std::string listed = fmt::format(", {}", backend.name);  // a name has an entry for each device
    if (names.find(listed) == std::string::npos) names += listed;
    if (backend.name == name) registered = backend.name;
  }
  check(!registered.empty(), ErrorKind::kUsage, "unknown GEMM backend '{}'; there are {}", name, names);
  const std::lock_guard<std::mutex> lock(choice().mutex);
  choice().forced = registered;
}

std::string_view forced_gemm_backend() {
  const std::lock_guard<std::mutex> lock(choice().mutex);
  return choice().forced;
}

const GemmBackend& pick_gemm(const GemmDesc& desc) {
  const std::lock_guard<std::mutex> lock(choice().mutex);
  const GemmBackend* best = nullptr;
  double best_cost = 0;
  std::string_view refused;
  const std::string_view tuned = choice().forced == "auto" ? tuned_gemm_backend(desc) : std::string_view();
  for (const GemmBackend& backend : backends()) {
    const bool forced = backend.name == choice().forced;
    if (!backend.supports(desc)) {
      if (forced) refused = backend.name;
      continue;
    }
    const double cost = forced || backend.name == tuned ? -1 : backend.cost(desc);
    if (best == nullptr || cost < best_cost) best = &backend, best_cost = cost;
  }
  if (best != nullptr && best->name == choice().forced) refused = {};  // its entry for another device refused
  check(best != nullptr, ErrorKind::kDevice, "no GEMM backend in this build does {} on {}", text_of(desc),
        name_of(desc.device));
  record(desc, best->name, refused);
  return *best;
}

std::vector<std::string> gemm_picks() {
  const std::lock_guard<std::mutex> lock(choice().mutex);
  return choice().lines;
}

GemmDesc describe(const Gemm& op) {
  GemmDesc desc = describe(GemmKind::kDense, op.a, op.b, written(op.c, op.epilogue), op.compute);
  desc.trans_a = op.trans_a, desc.trans_b = op.trans_b, desc.epilogue = op.epilogue.kind;
  desc.m = written(op.c, op.epilogue).dim(0), desc.n = op.b.dim(op.trans_b ? 0 : 1),
  desc.k = op.b.dim(op.trans_b ? 1 : 0);
  align(desc, op.a, op.a_column), align(desc, op.b, 0);
  return desc;
}

GemmDesc describe(const GroupedGemmM& op) {
  const Tensor& b = *std::find_if(op.b.begin(), op.b.end(), [](const Tensor& t) { return t.defined(); });
  GemmDesc desc = describe(GemmKind::kGroupedM, op.a, b, written(op.c, op.epilogue), op.compute);
  desc.epilogue = op.epilogue.kind;
  desc.trans_b = op.trans_b, desc.gather = op.a_rows.defined(), desc.groups = static_cast<int64_t>(op.b.size());
  desc.m = on_host(op.offsets) ? op.offsets.data<int32_t>()[desc.groups] : written(op.c, op.epilogue).dim(0);
  desc.n = b.dim(op.trans_b ? 0 : 1), desc.k = b.dim(op.trans_b ? 1 : 0);
  align(desc, op.a, op.a_column);
  for (const Tensor& matrix : op.b) {
    if (matrix.defined()) align(desc, matrix, 0);
  }
  return desc;
}

GemmDesc describe(const GroupedGemmK& op) {
  const Tensor& c = *std::find_if(op.c.begin(), op.c.end(), [](const Tensor& t) { return t.defined(); });
  GemmDesc desc = describe(GemmKind::kGroupedK, op.a, op.b, c, op.compute);
  desc.trans_a = true, desc.gather = op.a_rows.defined() || op.b_rows.defined();
  desc.groups = static_cast<int64_t>(op.c.size());
  desc.m = c.dim(0), desc.n = c.dim(1);
  desc.k =
      on_host(op.offsets) ? op.offsets.data<int32_t>()[desc.groups] : (op.a_rows.defined() ? op.a_rows : op.a).dim(0);
  align(desc, op.a, op.a_column), align(desc, op.b, op.b_column);
  return desc;
}

void run(const Gemm& op) {
  check_matrix("gemm", "a", op.a);
  check_matrix("gemm", "b", op.b);
  const Tensor& out = written(op.c, op.epilogue);
  check_matrix("gemm", "c", out);
  check_dtypes("gemm", op.a, op.b, out);
  check_swiglu("gemm", op);
  const GemmDesc desc = describe(op);
  const int64_t a_rows = op.trans_a ? desc.k : desc.m;
  require(op.a.dim(0) == a_rows, "gemm: a is {}, expected {} rows for b {}{} and c {}", op.a.shape(), a_rows,
          op.b.shape(), op.trans_b ? "^T" : "", out.shape());
  check_window("gemm", "a", op.a, op.a_column, op.trans_a ? desc.m : desc.k);
  if (op.c.defined()) check_window("gemm", "c", op.c, op.c_column, product_width(desc));
  check_epilogue("gemm", op.epilogue, op.c, desc.m, desc.n);
  const TraceRange range(TraceLevel::kOp, "gemm.dense", desc.m);
  tune_gemm(op, desc);
  pick_gemm(desc).dense(op);
}

void run(const GroupedGemmM& op) {
  constexpr const char* kName = "grouped_gemm_m";
  const Tensor* b = first_defined(kName, "b", op.b);
  if (b == nullptr) return;
  check_matrix(kName, "a", op.a);
  const Tensor& out = written(op.c, op.epilogue);
  check_matrix(kName, "c", out);
  check_dtypes(kName, op.a, *b, out);
  check_swiglu(kName, op);
  check_offsets(kName, op.offsets, op.b.size(), out.dim(0), out.device());
  const GemmDesc desc = describe(op);
  check_rows(kName, "a", op.a, op.a_rows, desc.m);
  check_window(kName, "a", op.a, op.a_column, desc.k);
  if (op.c.defined()) check_window(kName, "c", op.c, op.c_column, product_width(desc));
  check_epilogue(kName, op.epilogue, op.c, desc.m, desc.n);
  const TraceRange range(TraceLevel::kOp, "gemm.grouped_m", desc.m);
  tune_gemm(op, desc);
  pick_gemm(desc).grouped_m(op);
}

void run(const GroupedGemmK& op) {
  constexpr const char* kName = "grouped_gemm_k";
  const Tensor* c = first_defined(kName, "c", op.c);
  if (c == nullptr) return;
  check_matrix(kName, "a", op.a);
  check_matrix(kName, "b", op.b);
  check_dtypes(kName, op.a, op.b, *c);
  const auto rows_in = [](const Tensor& t, const Tensor& rows) { return (rows.defined() ? rows : t).dim(0); };
  check_offsets(kName, op.offsets, op.c.size(), std::min(rows_in(op.a, op.a_rows), rows_in(op.b, op.b_rows)),
                op.a.device());
  const GemmDesc desc = describe(op);
  check_rows(kName, "a", op.a, op.a_rows, desc.k);
  check_rows(kName, "b", op.b, op.b_rows, desc.k);
  check_window(kName, "a", op.a, op.a_column, desc.m);
  check_window(kName, "b", op.b, op.b_column, desc.n);
  const TraceRange range(TraceLevel::kOp, "gemm.grouped_k", desc.k);
  tune_gemm(op, desc);
  pick_gemm(desc).grouped_k(op);
}

}  // namespace lightmoe
