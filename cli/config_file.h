#pragma once
// --config FILE.toml: keys are a verb's long options without the dashes (rank = 16, force = true,
// data = ["a", "b"]) and its positional arguments (model = "demo/base"). A table named after the verb ([train]) may hold them too; other tables are
// for other verbs and are skipped. Flags on the command line win. An unknown key is an error with
// the nearest match.

#include <string>
#include <vector>

namespace CLI {
class App;
}

namespace lightmoe::cli {

// Command-line arguments equivalent to the file's keys, without those whose option stands in
// `given`.
std::vector<std::string> arguments_from_config(const std::string& path, const CLI::App& verb,
                                               const std::string& verb_name, const std::vector<std::string>& given);
// The verb's options as they stand after parsing, as TOML that --config reads back.
std::string config_from_arguments(const CLI::App& verb);
std::vector<std::string> long_option_names(const CLI::App& verb);

}  // namespace lightmoe::cli
