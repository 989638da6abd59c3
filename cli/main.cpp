#include <fmt/core.h>
#include <signal.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <new>

#include "cli/config_file.h"
#include "cli/verb.h"
#include "kernels/dispatch_plan.h"
#include "kernels/gemm_plugin.h"
#include "kernels/gemm_tuning.h"
#include "loaders/json.h"
#include "model/moe_op.h"
#include "runtime/device.h"
#include "runtime/error.h"
#include "runtime/nearest.h"
#include "runtime/parallel.h"
#include "runtime/trace.h"
#include "runtime/version.h"

namespace lightmoe::cli {
namespace {

std::vector<Verb>& verbs() {
  static std::vector<Verb> list;
  return list;
}
int exit_code_on_success = 0;

// Options of every verb.
struct Common {
  std::string config, device = "cpu", gemm = "auto", trace, profile_steps, gemm_tuning;
  std::string base_once = "on", moe_fused = "auto", dispatch_sort = "counting";
  int threads = 0;
  uint64_t max_gpu_memory = 0;
  bool print_config = false, log_json = false, gemm_picks = false, nvtx = false, gemm_tune = false;
};

void add_common(Flags& app, Common& common) {
  const std::string group = "Runtime";
  app.add_option("--config", common.config, "read options from a TOML file; flags win")->group(group);
  app.add_flag("--print-config", common.print_config, "print the options as TOML and stop")->group(group);
  app.add_option("--device", common.device, "cpu; sim (GPU kernels on a simulator); cuda")
      ->group(group)
      ->capture_default_str();
  app.add_bytes("--max-gpu-memory", common.max_gpu_memory, "most that sim or cuda may take, as 70GiB (0 = no limit)")
      ->group(group);
  app.add_option("--threads", common.threads, "threads (0 = all cores)")->group(group)->capture_default_str();
  app.add_option("--gemm", common.gemm, "GEMM backend by name, auto, or a plug-in (./my_gemm.so)")
      ->group(group)
      ->capture_default_str();
  app.add_flag("--gemm-picks", common.gemm_picks, "print which backend each shape got, on stderr")->group(group);
  app.add_option("--gemm-tuning", common.gemm_tuning, "file of measured choices between GEMM backends")->group(group);
  app.add_flag("--gemm-tune", common.gemm_tune, "measure shapes that the file does not know, and write it")
      ->group(group);
  app.add_option("--base-once", common.base_once,
                 "on: a stored expert runs once for each token; off: for every slot that points to it, to compare")
      ->group(group)
      ->capture_default_str();
  app.add_option("--moe-fused", common.moe_fused, "experts in few kernels: auto (on but on the CPU), on, off")
      ->group(group)
      ->capture_default_str();
  app.add_option("--dispatch-sort", common.dispatch_sort,
                 "of tokens by expert on sim and cuda: counting, radix, cub (cuda)")
      ->group(group)
      ->capture_default_str();
  app.add_option("--trace", common.trace, "write a timeline (Chrome-trace JSON) to this file")->group(group);
  app.add_flag("--nvtx", common.nvtx, "name ranges for Nsight (on by itself under nsys)")->group(group);
  app.add_option("--profile-steps", common.profile_steps, "trace and profile steps A:B alone")->group(group);
  app.add_flag("--log-json", common.log_json, "errors as one JSON object on stderr")->group(group);
}

// Which of the names an option's value is; an error lists them.
size_t one_of(const char* option, const std::string& value, const std::vector<std::string>& names) {
  const auto found = std::find(names.begin(), names.end(), value);
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  check(found != names.end(), ErrorKind::kUsage, "{} {}: expected one of {}", option, value, all);
  return static_cast<size_t>(found - names.begin());
}

void apply_execution(const Common& common, DeviceKind device) {
  constexpr MoeFusion fusions[] = {MoeFusion::kAutomatic, MoeFusion::kOn, MoeFusion::kOff};
  set_moe_execution({.base_once = one_of("--base-once", common.base_once, {"on", "off"}) == 0,
                     .fused = fusions[one_of("--moe-fused", common.moe_fused, {"auto", "on", "off"})]});
  constexpr DispatchSort sorts[] = {DispatchSort::kCounting, DispatchSort::kRadix, DispatchSort::kCub};
  const DispatchSort sort = sorts[one_of("--dispatch-sort", common.dispatch_sort, {"counting", "radix", "cub"})];
  check(sort != DispatchSort::kCub || device == DeviceKind::kCuda, ErrorKind::kUsage,
        "--dispatch-sort cub: with --device cuda only, not with {}", name_of(device));
  set_dispatch_sort(sort);
}

void apply_common(const Common& common) {
  const DeviceKind device = device_named(common.device);
  check(device_available(device), ErrorKind::kDevice, "--device {}: not in this build, or none in this machine",
        common.device);
  set_default_device(device);
  set_device_memory_limit(static_cast<int64_t>(common.max_gpu_memory));
  apply_execution(common, device);
  check(common.threads >= 0 && common.threads <= 4096, ErrorKind::kUsage, "--threads {}: expected 0 to 4096",
        common.threads);
  if (common.threads > 0) omp_set_num_threads(common.threads);
  force_gemm_backend(is_gemm_plugin_path(common.gemm) ? use_gemm_plugin(common.gemm) : std::string_view(common.gemm));
  check(!common.gemm_tune || !common.gemm_tuning.empty(), ErrorKind::kUsage,
        "--gemm-tune: name the file with --gemm-tuning");
  if (!common.gemm_tuning.empty()) {
    use_gemm_tuning(common.gemm_tuning, common.gemm_tune,
                    [](const std::string& line) { fmt::print(stderr, "{}\n", line); });
  }
  if (!common.profile_steps.empty()) profile_steps(common.profile_steps);
  if (!common.trace.empty()) trace_start();
  // nsys tells its programs where its half of NVTX is.
  if (common.nvtx || (nvtx_available() && std::getenv("NVTX_INJECTION64_PATH") != nullptr)) nvtx_start();
}

std::string one_line(std::string text) {
  std::replace(text.begin(), text.end(), '\n', ' ');
  while (!text.empty() && text.back() == ' ') text.pop_back();
  return text;
}

int report_error(int code, const std::string& message, bool as_json) {
  std::fflush(stdout);
  const std::string line = one_line(message);
  if (as_json) {
    const Json object = {{"error", {{"code", code}, {"message", line}}}};
    fmt::print(stderr, "{}\n", object.dump(-1, ' ', false, Json::error_handler_t::replace));
  } else {
    fmt::print(stderr, "error[E{}] {}\n", code, line);
  }
  return code;
}

// Names of the options and arguments that stand on the command line, found by a trial parse; what is wrong with the command line
// is said by the real one.
std::vector<std::string> given_options(const Verb& verb, std::vector<std::string> arguments) {
  CLI::App app;
  Common common;
  Flags flags(app);
  const VerbAction unused = verb.declare(flags);
  add_common(flags, common);
  for (CLI::Option* option : app.get_options()) option->required(false);
  app.allow_extras();
  std::reverse(arguments.begin(), arguments.end());
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError&) {
  }
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    if (option->count() > 0) names.push_back(option->get_single_name());
  }
  return names;
}

std::string config_path(const std::vector<std::string>& arguments) {
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (arguments[i].rfind("--config=", 0) == 0) return arguments[i].substr(9);
    if (arguments[i] == "--config" && i + 1 < arguments.size()) return arguments[i + 1];
  }
  return "";
}

void print_help() {
  fmt::print(
      "lightmoe {}: make OLMoE smaller and faster by expert replacing, train it back, measure it\n\n"
      "usage: lightmoe VERB [options]      lightmoe VERB --help\n",
      version());
  std::map<std::string, std::vector<const Verb*>> groups;
  for (const Verb& verb : verbs()) groups[verb.group].push_back(&verb);
  for (auto& [group, members] : groups) {
    std::sort(members.begin(), members.end(), [](const Verb* a, const Verb* b) { return a->name < b->name; });
    fmt::print("\n{}:\n", group);
    for (const Verb* verb : members) fmt::print("  {:<12}{}\n", verb->name, verb->summary);
  }
  fmt::print(
      "\nExample: lightmoe inspect demo/base\nExit codes: 0 ok, 1 internal, 2 usage, 3 bad input file, 4 I/O, 5 "
      "memory, 6 numeric, "
      "7 resume, 9 device; 128+signal when stopped.\n");
}

// Names what on the command line no option takes, with the nearest option for a misspelt one.
void refuse_extras(const CLI::App& app) {
  const std::vector<std::string> extras = app.remaining();
  const auto option = std::find_if(extras.begin(), extras.end(), [](const auto& e) { return e.rfind("--", 0) == 0; });
  if (option != extras.end()) {
    const std::string name = option->substr(2, option->find('=') - 2);
    const std::string near = nearest(name, long_option_names(app));
    fail(ErrorKind::kUsage, "unknown option --{}{} ({} --help)", name,
         near.empty() ? "" : fmt::format("; did you mean --{}?", near), app.get_name());
  }
  check(extras.empty(), ErrorKind::kUsage, "unexpected argument {} ({} --help)", extras.empty() ? "" : extras[0],
        app.get_name());
}

int run_verb(const Verb& verb, std::vector<std::string> arguments, Common& common) {
  CLI::App app(verb.summary, "lightmoe " + verb.name);
  app.footer("Example: " + verb.example);
  app.option_defaults()->always_capture_default(false);
  Flags flags(app);
  const VerbAction action = verb.declare(flags);
  add_common(flags, common);
  if (const std::string path = config_path(arguments); !path.empty()) {
    const std::vector<std::string> extra = arguments_from_config(path, app, verb.name, given_options(verb, arguments));
    arguments.insert(arguments.end(), extra.begin(), extra.end());
  }
  std::reverse(arguments.begin(), arguments.end());  // CLI11 takes them from the back
  try {
    app.parse(arguments);
  } catch (const CLI::CallForHelp&) {
    fmt::print("{}", app.help());
    return 0;
  } catch (const CLI::ParseError& error) {
    refuse_extras(app);  // first, as a misspelt option is then missing too
    fail(ErrorKind::kUsage, "{} (lightmoe {} --help)", one_line(error.what()), verb.name);
  }
  if (common.print_config) {
    fmt::print("{}", config_from_arguments(app));
    return 0;
  }
  apply_common(common);
  action();
  profile_step(-1);
  write_gemm_tuning();
  if (!common.trace.empty()) trace_write(common.trace);
  if (common.gemm_picks) {
    for (const std::string& line : gemm_picks()) fmt::print(stderr, "gemm: {}\n", line);
  }
  return exit_code_on_success;
}

int main_checked(const std::vector<std::string>& arguments, Common& common) {
  if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h" || arguments[0] == "help") {
    print_help();
    return arguments.empty() ? static_cast<int>(ErrorKind::kUsage) : 0;
  }
  if (arguments[0] == "--version" || arguments[0] == "version") {
    fmt::print("lightmoe {}\n", version());
    return 0;
  }
  std::vector<std::string> names;
  for (const Verb& verb : verbs()) {
    if (verb.name == arguments[0]) return run_verb(verb, {arguments.begin() + 1, arguments.end()}, common);
    names.push_back(verb.name);
  }
  const std::string near = nearest(arguments[0], names);
  fail(ErrorKind::kUsage, "unknown verb {}{} (lightmoe --help lists them)", arguments[0],
       near.empty() ? "" : fmt::format("; did you mean {}?", near));
}

// Output that nobody reads any more is no error; output that did not fit on the disk is.
int flush_stdout(int code) {
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return code;
  if (errno == EPIPE) return code;
  return report_error(static_cast<int>(ErrorKind::kIo), "standard output: write failed", false);
}

}  // namespace

RegisterVerb::RegisterVerb(Verb verb) { verbs().push_back(std::move(verb)); }
void set_exit_code(int code) { exit_code_on_success = code; }

int run_program(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  Common common;
  common.log_json = std::find(arguments.begin(), arguments.end(), "--log-json") != arguments.end();
  try {
    return flush_stdout(main_checked(arguments, common));
  } catch (const Error& error) {
    return report_error(error.exit_code(), error.what(), common.log_json);
  } catch (const std::bad_alloc&) {
    return report_error(static_cast<int>(ErrorKind::kMemory), "out of host memory", common.log_json);
  } catch (const std::system_error& error) {
    return errno == EPIPE ? 0 : report_error(static_cast<int>(ErrorKind::kIo), error.what(), common.log_json);
  } catch (const std::exception& error) {
    return report_error(static_cast<int>(ErrorKind::kInternal), error.what(), common.log_json);
  }
}

}  // namespace lightmoe::cli

int main(int argc, char** argv) { return lightmoe::cli::run_program(argc, argv); }
