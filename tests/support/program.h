#pragma once
// Runs the program as a user would, with a deadline, and looks at exit code and output.

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

namespace lightmoe::testing {

struct ProgramResult {
  int exit_code = -1;  // 128 + signal when killed; -2 when the deadline passed (a hang)
  std::string out, err;
};
struct ProgramOptions {
  std::vector<std::string> environment;  // "NAME=value", added
  std::filesystem::path directory;       // working directory, empty = this one
  int deadline_seconds = 60;
  bool close_stdout = false;
  int64_t max_file_bytes = 0;  // RLIMIT_FSIZE
  // `signal` is sent once, when `signal_when` first says so.
  int signal = 0;
  std::function<bool()> signal_when;
};
// arguments[0] is the verb. The program is `lightmoe` beside the test binary.
ProgramResult run_lightmoe(const std::vector<std::string>& arguments, const ProgramOptions& options = {});

// A directory that is gone when the object is.
class ScratchDirectory {
 public:
  ScratchDirectory();
  ~ScratchDirectory();
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace lightmoe::testing
