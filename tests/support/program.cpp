#include "tests/support/program.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#include "runtime/error.h"

namespace lightmoe::testing {
namespace {

std::string slurp(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

[[noreturn]] void become_program(const std::vector<std::string>& arguments, const ProgramOptions& options,
                                 const std::filesystem::path& out, const std::filesystem::path& err) {
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe").parent_path() / "lightmoe";
  const int out_file = open(out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  const int err_file = open(err.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
  const int nothing = open("/dev/null", O_RDONLY);
  dup2(nothing, 0);
  dup2(out_file, 1);
  dup2(err_file, 2);
  if (options.close_stdout) close(1);
  if (options.max_file_bytes > 0) {
    const rlimit limit{static_cast<rlim_t>(options.max_file_bytes), static_cast<rlim_t>(options.max_file_bytes)};
    setrlimit(RLIMIT_FSIZE, &limit);
    signal(SIGXFSZ, SIG_IGN);
  }
  for (const std::string& entry : options.environment) {
    const size_t equals = entry.find('=');
    setenv(entry.substr(0, equals).c_str(), entry.substr(equals + 1).c_str(), 1);
  }
  if (!options.directory.empty() && chdir(options.directory.c_str()) != 0) _exit(127);
  std::vector<char*> argv = {const_cast<char*>("lightmoe")};
  for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  execv(program.c_str(), argv.data());
  _exit(127);
}

// LIGHTMOE_TEST_PATIENCE: how many times longer a program may take, where it is built to be slow (`make asan`).
int patience() {
  const char* text = std::getenv("LIGHTMOE_TEST_PATIENCE");
  return text == nullptr ? 1 : std::max(1, std::atoi(text));
}

}  // namespace

ProgramResult run_lightmoe(const std::vector<std::string>& arguments, const ProgramOptions& options) {
  const ScratchDirectory scratch;
  const std::filesystem::path out = scratch.path() / "out", err = scratch.path() / "err";
  const pid_t child = fork();
  require(child >= 0, "fork failed");
  if (child == 0) become_program(arguments, options, out, err);
  ProgramResult result;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(options.deadline_seconds * patience());
  int status = 0;
  bool is_sent = !options.signal_when;
  while (waitpid(child, &status, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > deadline) {
      kill(child, SIGKILL);
      waitpid(child, &status, 0);
      result.exit_code = -2;
      result.err = slurp(err);
      return result;
    }
    if (!is_sent && options.signal_when()) {
      kill(child, options.signal);
      is_sent = true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  result.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  result.out = slurp(out);
  result.err = slurp(err);
  return result;
}

ScratchDirectory::ScratchDirectory() {
  std::string pattern = (std::filesystem::temp_directory_path() / "lightmoe-test-XXXXXX").string();
  require(mkdtemp(pattern.data()) != nullptr, "mkdtemp failed for {}", pattern);
  path_ = pattern;
}
ScratchDirectory::~ScratchDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace lightmoe::testing
