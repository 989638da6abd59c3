#include "kernels/gemm_plugin.h"

#include <dlfcn.h>
#include <xxhash.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <vector>

#include "kernels/gemm_check.h"
#include "kernels/plugin/lightmoe_gemm.h"
#include "runtime/device.h"
#include "runtime/device_info.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr uint64_t kWorkspaceLimitBytes = uint64_t{256} << 20;

// The open plug-in. Backends are plain functions, so it stands here; a context is never destroyed before the process ends (its work may
// still run on a stream).
struct Plugin {
  GemmPluginInfo info;
  GemmBackend backend{};
  const lightmoe_gemm_plugin* calls = nullptr;
  void* context = nullptr;
};
Plugin& plugin() {
  static Plugin open;
  return open;
}

void check_status(int32_t status, const char* call) {
  const Plugin& p = plugin();
  check(status == 0, ErrorKind::kDevice, "{}: {} of plug-in {} failed with status {}: {}", p.info.path, call,
        p.info.name, status, status == 0 ? "" : p.calls->last_error(p.context));
}

int32_t type_of(DType dtype) { return dtype == DType::kBF16 ? LIGHTMOE_GEMM_BF16 : LIGHTMOE_GEMM_F32; }

lightmoe_gemm_problem problem_of(const GemmDesc& d) {
  lightmoe_gemm_problem p{};
  p.struct_size = sizeof p;
  p.kind = static_cast<int32_t>(d.kind);
  p.device = d.device == DeviceKind::kCuda ? LIGHTMOE_GEMM_CUDA : LIGHTMOE_GEMM_CPU;
  p.a_type = type_of(d.a), p.b_type = type_of(d.b), p.c_type = type_of(d.c);
  p.trans_a = d.trans_a, p.trans_b = d.trans_b;
  p.round_bf16 = d.compute == GemmCompute::kBF16;
  p.gather = d.gather;
  p.alignment = d.alignment;
  p.m = d.m, p.n = d.n, p.k = d.k, p.groups = d.groups;
  p.alpha = 1;
  return p;
}

bool supports(const GemmDesc& d) {
  if (d.a == DType::kF64 || d.m == 0 || d.n == 0 || d.k == 0) return false;  // nothing to multiply: built in
  if (d.device != DeviceKind::kCpu && d.device != DeviceKind::kCuda) return false;
  if (d.epilogue != GemmEpilogueKind::kNone) return false;
  const lightmoe_gemm_problem p = problem_of(d);
  const Plugin& open = plugin();
  if (open.calls->score(open.context, &p) <= 0) return false;
  uint64_t bytes = 0;
  return open.calls->workspace(open.context, &p, &bytes) == 0 && bytes <= kWorkspaceLimitBytes;
}

void* at_column(const Tensor& t, int64_t column) {
  return static_cast<char*>(t.raw()) + column * static_cast<int64_t>(size_of(t.dtype()));
}
const int32_t* rows_of(const Tensor& rows) { return rows.defined() ? rows.data<int32_t>() : nullptr; }

void enqueue(lightmoe_gemm_problem& p, const Tensor& on) {
  Plugin& open = plugin();
  uint64_t bytes = 0;
  check_status(open.calls->workspace(open.context, &p, &bytes), "workspace");
  const MemoryScope scratch(MemoryCategory::kScratch);
  const Tensor space =
      bytes > 0 ? Tensor::empty({static_cast<int64_t>(bytes) + 255}, DType::kU8, on.device()) : Tensor();
  void* aligned =
      space.defined() ? reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(space.raw()) + 255) / 256 * 256) : nullptr;
  check_status(open.calls->enqueue(open.context, &p, aligned, bytes, compute_stream(on.device())), "enqueue");
}

void multiply_dense(const Gemm& op) {
  lightmoe_gemm_problem p = problem_of(describe(op));
  p.alpha = op.alpha, p.beta = op.beta;
  p.a = at_column(op.a, op.a_column), p.lda = op.a.dim(1);
  p.b = op.b.raw(), p.ldb = op.b.dim(1);
  p.c = at_column(op.c, op.c_column), p.ldc = op.c.dim(1);
  enqueue(p, op.c);
}

void multiply_m(const GroupedGemmM& op) {
  lightmoe_gemm_problem p = problem_of(describe(op));
  p.alpha = op.alpha, p.beta = op.beta;
  p.a = at_column(op.a, op.a_column), p.a_rows = rows_of(op.a_rows), p.lda = op.a.dim(1);
  p.c = at_column(op.c, op.c_column), p.ldc = op.c.dim(1);
  std::vector<void*> matrices;
  for (const Tensor& b : op.b) {
    matrices.push_back(b.defined() ? b.raw() : nullptr);
    if (b.defined()) p.ldb = b.dim(1);
  }
  p.matrices = matrices.data();
  p.offsets = op.offsets.data<int32_t>();
  if (op.offsets.device() == DeviceKind::kCpu) p.host_offsets = p.offsets;
  enqueue(p, op.c);
}

// Groups that share an output follow each other: the i-th group of every output in call i, so that a call's outputs are all different.
void multiply_k(const GroupedGemmK& op) {
  lightmoe_gemm_problem p = problem_of(describe(op));
  p.alpha = op.alpha;
  p.a = at_column(op.a, op.a_column), p.a_rows = rows_of(op.a_rows), p.lda = op.a.dim(1);
  p.b = at_column(op.b, op.b_column), p.b_rows = rows_of(op.b_rows), p.ldb = op.b.dim(1);
  p.offsets = op.offsets.data<int32_t>();
  if (op.offsets.device() == DeviceKind::kCpu) p.host_offsets = p.offsets;
  std::map<const void*, size_t> times;  // how often an output came before
  std::vector<std::vector<void*>> calls;
  for (size_t g = 0; g < op.c.size(); ++g) {
    if (!op.c[g].defined()) continue;
    const size_t call = times[op.c[g].raw()]++;
    if (call == calls.size()) calls.emplace_back(op.c.size(), nullptr);
    calls[call][g] = op.c[g].raw();
    p.ldc = op.c[g].dim(1);
  }
  for (size_t i = 0; i < calls.size(); ++i) {
    p.matrices = calls[i].data();
    p.beta = i == 0 ? op.beta : 1;
    enqueue(p, op.a);
  }
}

std::string name_checked(const char* name, const std::string& path) {
  const std::string text = name == nullptr ? "" : name;
  const bool legal = !text.empty() && text != "auto" &&
                     text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_-") == std::string::npos;
  check(legal, ErrorKind::kDevice, "{}: plug-in name '{}', expected lower-case letters, digits, _ and -", path, text);
  for (const GemmBackend& backend : gemm_backends()) {
    check(backend.name != text, ErrorKind::kDevice, "{}: plug-in name '{}' is that of a backend already there", path,
          text);
  }
  return text;
}

const lightmoe_gemm_plugin* entry_of(void* library, const std::string& path) {
  const auto entry = reinterpret_cast<lightmoe_gemm_plugin_entry_fn>(dlsym(library, "lightmoe_gemm_plugin_entry"));
  check(entry != nullptr, ErrorKind::kDevice, "{}: no symbol lightmoe_gemm_plugin_entry, so not a GEMM plug-in", path);
  const lightmoe_gemm_plugin* calls = entry(LIGHTMOE_GEMM_ABI_MAJOR, LIGHTMOE_GEMM_ABI_MINOR);
  check(calls != nullptr, ErrorKind::kDevice, "{}: the plug-in refuses ABI {}.{}", path, LIGHTMOE_GEMM_ABI_MAJOR,
        LIGHTMOE_GEMM_ABI_MINOR);
  check(calls->magic == LIGHTMOE_GEMM_MAGIC, ErrorKind::kDevice, "{}: magic {:#x}, expected {:#x}", path, calls->magic,
        LIGHTMOE_GEMM_MAGIC);
  check(calls->abi_major == LIGHTMOE_GEMM_ABI_MAJOR, ErrorKind::kDevice,
        "{}: built for ABI {}.{}, this program has {}.{}", path, calls->abi_major, calls->abi_minor,
        LIGHTMOE_GEMM_ABI_MAJOR, LIGHTMOE_GEMM_ABI_MINOR);
  check(calls->struct_size >= sizeof(lightmoe_gemm_plugin), ErrorKind::kDevice,
        "{}: its struct has {} bytes, expected at least {}", path, calls->struct_size, sizeof(lightmoe_gemm_plugin));
  check(calls->create && calls->destroy && calls->score && calls->workspace && calls->enqueue && calls->last_error,
        ErrorKind::kDevice, "{}: a function of the plug-in is missing", path);
  return calls;
}

uint64_t hash_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  return XXH3_64bits(bytes.data(), bytes.size());
}

void log_line(const char* message) { fmt::print(stderr, "{}: {}\n", plugin().info.name, message); }

}  // namespace

bool is_gemm_plugin_path(std::string_view value) {
  return value.find('/') != std::string_view::npos || value.ends_with(".so");
}

const GemmPluginInfo* gemm_plugin_info() { return plugin().calls == nullptr ? nullptr : &plugin().info; }

int32_t gemm_plugin_score(const GemmDesc& desc) {
  const lightmoe_gemm_problem p = problem_of(desc);
  return plugin().calls->score(plugin().context, &p);
}

const GemmBackend& open_gemm_plugin(const std::string& given) {
  Plugin& open = plugin();
  check(open.calls == nullptr, ErrorKind::kDevice, "{}: plug-in {} is open already, there is one for each process",
        given, open.info.path);
  const std::string path = std::filesystem::absolute(given).lexically_normal().string();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  check(library != nullptr, ErrorKind::kDevice, "{}", library == nullptr ? dlerror() : "");
  const lightmoe_gemm_plugin* calls = entry_of(library, path);
  const auto text = [](const char* t) { return std::string(t == nullptr ? "" : t); };
  open.info = {path, name_checked(calls->name, path), text(calls->version), text(calls->licence), hash_of(path)};
  const DeviceKind device = default_device();
  check(device != DeviceKind::kSim, ErrorKind::kDevice, "{}: plug-ins work on cpu and cuda, not on the simulator",
        path);
  lightmoe_gemm_host host{};
  host.struct_size = sizeof host;
  host.device = device == DeviceKind::kCuda ? LIGHTMOE_GEMM_CUDA : LIGHTMOE_GEMM_CPU;
  host.compute_capability = device_info(device).compute_capability;
  host.threads = num_threads();
  host.workspace_limit_bytes = kWorkspaceLimitBytes;
  host.log = &log_line;
  const int32_t status = calls->create(&host, &open.context);
  check(status == 0, ErrorKind::kDevice, "{}: create failed with status {}: {}", path, status,
        status == 0 ? "" : calls->last_error(open.context));
  open.calls = calls;
  open.backend = {.name = open.info.name,
                  .supports = &supports,
                  .cost = [](const GemmDesc&) { return 0.0; },
                  .dense = &multiply_dense,
                  .grouped_m = &multiply_m,
                  .grouped_k = &multiply_k};
  return open.backend;
}

std::string_view use_gemm_plugin(const std::string& path) {
  const GemmBackend& backend = open_gemm_plugin(path);
  const GemmCheckReport report = check_gemm_backend(backend, plugin().info.path);
  check(report.checked > 0, ErrorKind::kDevice, "{}: the plug-in supports no product on {}", plugin().info.path,
        name_of(default_device()));
  check(report.wrong == 0, ErrorKind::kDevice,
        "{}: {} of {} products are wrong; the first: {} (lightmoe gemm-check {})", plugin().info.path, report.wrong,
        report.checked, report.first_wrong, path);
  const RegisterGemmBackend registered{backend};
  return backend.name;
}

}  // namespace lightmoe
