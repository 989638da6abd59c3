#include <fmt/core.h>

#include <memory>

#include "cli/percent.h"
#include "cli/verb.h"
#include "loaders/json.h"
#include "model/verify.h"
#include "runtime/error.h"

namespace lightmoe::cli {
namespace {

struct Options {
  std::string model;
  bool no_hashes = false, no_values = false, json = false;
};

constexpr size_t kShown = 20;

void print_report(const VerifyReport& r) {
  for (size_t i = 0; i < std::min(kShown, r.problems.size()); ++i) fmt::print("problem: {}\n", r.problems[i]);
  if (r.problems.size() > kShown)
    fmt::print("problem: ... and {} more (--json lists all)\n", r.problems.size() - kShown);
  for (const std::string& note : r.notes) fmt::print("note: {}\n", note);
  fmt::print("{} layout: {} tensors expected, {} of them right; {} in the files, {} unexpected\n",
             r.layout.empty() ? "unknown" : r.layout, r.expected, r.matched, r.in_files, r.unexpected);
  fmt::print("{} tensors, {} values, {} bytes read; {} values not finite\n", r.scanned, r.values, r.bytes, r.nonfinite);
}

void verify(const Options& options) {
  const VerifyReport r = verify_model(
      options.model,
      {.hashes = !options.no_hashes, .values = !options.no_values, .progress = percent_on_terminal("verify")});
  if (options.json) {
    const Json out = {{"ok", r.ok()},           {"problems", r.problems},     {"notes", r.notes},
                      {"layout", r.layout},     {"expected", r.expected},     {"matched", r.matched},
                      {"in_files", r.in_files}, {"unexpected", r.unexpected}, {"scanned", r.scanned},
                      {"values", r.values},     {"nonfinite", r.nonfinite},   {"bytes", r.bytes}};
    fmt::print("{}\n", out.dump(2, ' ', false, Json::error_handler_t::replace));
  } else {
    print_report(r);
    if (r.ok()) fmt::print("{}: ok\n", options.model);
  }
  check(r.ok(), ErrorKind::kInput, "{}: {} {}; the first: {}", options.model, r.problems.size(),
        r.problems.size() == 1 ? "problem" : "problems", r.ok() ? "" : r.problems.front());
}

const RegisterVerb verb{{"verify", "Models",
                         "Check a model directory: marker, hashes, format, names and shapes, finite values",
                         "lightmoe verify demo/base", [](Flags& app) -> VerbAction {
                           auto options = std::make_shared<Options>();
                           app.add_option("model", options->model, "model directory")->required();
                           app.add_flag("--no-hashes", options->no_hashes, "do not compare hashes with the marker");
                           app.add_flag("--no-values", options->no_values, "do not look at the values");
                           app.add_flag("--json", options->json, "as one JSON object, all problems");
                           return [options] { verify(*options); };
                         }}};

}  // namespace
}  // namespace lightmoe::cli
