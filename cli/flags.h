#pragma once
// What a verb's options are declared with, over CLI11, which takes two seconds to compile and enters cli/flags.cpp, main.cpp and
// config_file.cpp only.

#include <cstdint>
#include <string>
#include <vector>

namespace CLI {
class App;
class Option;
}  // namespace CLI

namespace lightmoe::cli {

// A declared option: app.add_option("--steps", steps, "optimizer steps")->required()->group("Training");
class Flag {
 public:
  explicit Flag(CLI::Option* option) : option_(option) {}
  Flag* operator->() { return this; }
  Flag group(const std::string& heading);
  Flag required();
  Flag expected(int values);
  Flag allow_extra_args(bool allow);  // false: one value each time that the option stands
  Flag capture_default_str();         // --help shows the present value as the default

 private:
  CLI::Option* option_;
};

class Flags {
 public:
  explicit Flags(CLI::App& app) : app_(app) {}

  // Names "-o,--out", or "model" for an argument by position. T: a number, std::string or path, an optional or a vector of these, as
  // far as flags.cpp lists them; others do not link.
  template <class T>
  Flag add_option(const std::string& names, T& value, const std::string& description);
  Flag add_flag(const std::string& names, bool& value, const std::string& description);
  Flag add_bytes(const std::string& names, uint64_t& value, const std::string& description);  // "70GiB"
  void description(const std::string& text);  // instead of the verb's summary under --help

 private:
  CLI::App& app_;
};

}  // namespace lightmoe::cli
