#pragma once
// The program `lightmoe VERB ...`: one file per verb in cli/, which registers itself; nobody
// includes a verb.
//
//   static const RegisterVerb verb{{"inspect", "Models", "Show what a model directory holds",
//   "lightmoe inspect MODEL",
//     [](Flags& app) -> VerbAction {
//       auto options = std::make_shared<Options>();
//       app.add_option("model", options->model, "model directory")->required();
//       return [options] { inspect(*options); };
//     }}};
//
// A verb parses, calls one function of a library below, and prints. It throws Error; main prints
// one line on stderr and exits with the documented code. Options every verb has (main adds them):
// --config --print-config --threads --gemm --device --trace --log-json.

#include <functional>
#include <string>
#include <vector>

#include "cli/flags.h"

namespace lightmoe::cli {

using VerbAction = std::function<void()>;

struct Verb {
  std::string name;
  std::string group;    // heading in --help: "Models", "Compression", "Training", "Evaluation"
  std::string summary;  // one line
  std::string example;  // one command line, shown under --help
  std::function<VerbAction(Flags&)> declare;
};

struct RegisterVerb {
  explicit RegisterVerb(Verb verb);
};

// Set by a verb that ends on purpose with a code that is no error (a run stopped by a signal: 143,
// 130, 75).
void set_exit_code(int code);

}  // namespace lightmoe::cli
