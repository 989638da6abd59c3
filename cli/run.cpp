#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>

#include "cli/verb.h"
#include "compress/report.h"
#include "compress/runner.h"
#include "runtime/parallel.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string recipe, worker, only;
  bool short_form = false, dry_run = false, report_only = false, quiet = false;
  int64_t jobs = 1;
};

// Read in a signal handler, so: plain numbers, set before the handler is.
constexpr int64_t kMaxJobs = 64;
std::array<volatile pid_t, kMaxJobs> workers{};

void pass_on(int signal) {
  for (const pid_t worker : workers) {
    if (worker > 0) kill(worker, signal);
  }
}

pid_t start_worker(const std::vector<std::string>& arguments) {
  std::vector<char*> raw;
  for (const std::string& argument : arguments) raw.push_back(const_cast<char*>(argument.c_str()));
  raw.push_back(nullptr);
  // A process group of its own: a Ctrl-C reaches it once, passed on by us.
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETPGROUP);
  pid_t child = 0;
  const int error = posix_spawn(&child, "/proc/self/exe", nullptr, &attributes, raw.data(), environ);
  posix_spawnattr_destroy(&attributes);
  check(error == 0, ErrorKind::kIo, "a worker could not be started: {}", std::strerror(error));
  return child;
}

// The same command once per job, each with its share of the runs and of the threads. Small models do not fill several cores; two
// runs side by side do. Signals go on to the workers, which save and stop. Returns the first exit code that is not 0.
int run_jobs(const Options& o) {
  const std::string threads = std::to_string(std::max<int64_t>(1, num_threads() / o.jobs));
  for (int64_t i = 0; i < o.jobs; ++i) {
    std::vector<std::string> arguments = {"lightmoe",
                                          "run",
                                          o.recipe,
                                          "--worker",
                                          fmt::format("{}/{}", i, o.jobs),
                                          "--threads",
                                          threads,
                                          "--device",
                                          std::string(name_of(default_device()))};
    if (o.short_form) arguments.emplace_back("--short");
    if (o.quiet) arguments.emplace_back("--quiet");
    if (!o.only.empty()) arguments.insert(arguments.end(), {"--only", o.only});
    workers[static_cast<size_t>(i)] = start_worker(arguments);
  }
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, SIGUSR1}) ::signal(signal, pass_on);
  int code = 0;
  for (volatile pid_t& worker : workers) {
    if (worker == 0) break;
    int status = 0;
    while (waitpid(worker, &status, 0) < 0 && errno == EINTR) {
    }
    worker = -1;
    const int own = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    if (code == 0) code = own;
  }
  return code;
}

void become_worker(const std::string& text, RunnerOptions& options) {
  long long worker = -1, workers = 0;
  const bool ok = std::sscanf(text.c_str(), "%lld/%lld", &worker, &workers) == 2 && worker >= 0 && worker < workers;
  check(ok, ErrorKind::kUsage, "--worker {}: expected I/N with I from 0 to N-1", text);
  options.worker = worker;
  options.workers = workers;
  prctl(PR_SET_PDEATHSIG, SIGTERM);  // no orphans when the first process is killed outright
}

void run_recipe(const Options& o) {
  const Recipe recipe = read_recipe(o.recipe, o.short_form);
  if (o.dry_run) {
    fmt::print("{}", describe(recipe));
    return;
  }
  check(o.jobs >= 1 && o.jobs <= kMaxJobs, ErrorKind::kUsage, "--jobs {}: expected 1 to {}", o.jobs, kMaxJobs);
  RunnerOptions options{.only = o.only};
  if (!o.quiet) options.say = [](const std::string& line) { fmt::print(stderr, "{}\n", line); };
  if (!o.worker.empty()) become_worker(o.worker, options);
  if (!o.report_only) {
    chosen_runs(recipe, o.only);  // refuses what matches nothing
    if (o.worker.empty()) run_calibration(recipe, options);
    int code = 0;
    if (o.jobs > 1 && o.worker.empty())
      code = run_jobs(o);
    else
      run_stages(recipe, options, &code);
    if (code != 0 || !o.worker.empty()) return set_exit_code(code);
    measure_speeds(recipe, options);
  }
  const Report report = make_report(recipe, load_results(recipe, !o.only.empty() || o.report_only));
  write_report(report, recipe.output);
  fmt::print("{}", to_markdown(report));
  fmt::print("\nwrote {0}/report.html, {0}/report.md, {0}/report.json\n", recipe.output);
}

const RegisterVerb verb{
    {"run", "Compression", "Compare methods on tasks as a recipe says, and write the report",
     "lightmoe run recipes/demo.toml", [](Flags& app) -> VerbAction {
       auto o = std::make_shared<Options>();
       app.add_option("recipe", o->recipe, "TOML file (recipes/)")->required();
       app.add_flag("--short", o->short_form, "the recipe's [short] form");
       app.add_flag("--dry-run", o->dry_run, "say what it will do, and stop");
       app.add_flag("--report-only", o->report_only, "write the report from the results that are there");
       app.add_option("--only", o->only,
                      "regular expression: only runs TASK/METHOD-rRATIO-free or -sSEED that have a match");
       app.add_option("--jobs", o->jobs, "runs side by side, each with its share of the threads")
           ->capture_default_str();
       app.add_option("--worker", o->worker, "I/N: only every N-th run, no report (what --jobs starts)");
       app.add_flag("--quiet", o->quiet, "no progress");
       return [o] { run_recipe(*o); };
     }}};

}  // namespace
}  // namespace lightmoe::cli
