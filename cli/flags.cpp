#include "cli/flags.h"

#include <CLI/CLI.hpp>
#include <filesystem>
#include <optional>

namespace lightmoe::cli {

Flag Flag::group(const std::string& heading) { return Flag(option_->group(heading)); }
Flag Flag::required() { return Flag(option_->required()); }
Flag Flag::expected(int values) { return Flag(option_->expected(values)); }
Flag Flag::allow_extra_args(bool allow) { return Flag(option_->allow_extra_args(allow)); }
Flag Flag::capture_default_str() { return Flag(option_->capture_default_str()); }

template <class T>
Flag Flags::add_option(const std::string& names, T& value, const std::string& description) {
  return Flag(app_.add_option(names, value, description));
}
template Flag Flags::add_option(const std::string&, int&, const std::string&);
template Flag Flags::add_option(const std::string&, int64_t&, const std::string&);
template Flag Flags::add_option(const std::string&, uint64_t&, const std::string&);
template Flag Flags::add_option(const std::string&, double&, const std::string&);
template Flag Flags::add_option(const std::string&, std::string&, const std::string&);
template Flag Flags::add_option(const std::string&, std::filesystem::path&, const std::string&);
template Flag Flags::add_option(const std::string&, std::optional<int64_t>&, const std::string&);
template Flag Flags::add_option(const std::string&, std::optional<double>&, const std::string&);
template Flag Flags::add_option(const std::string&, std::vector<int64_t>&, const std::string&);
template Flag Flags::add_option(const std::string&, std::vector<double>&, const std::string&);
template Flag Flags::add_option(const std::string&, std::vector<std::string>&, const std::string&);
template Flag Flags::add_option(const std::string&, std::vector<std::filesystem::path>&, const std::string&);

Flag Flags::add_flag(const std::string& names, bool& value, const std::string& description) {
  return Flag(app_.add_flag(names, value, description));
}
Flag Flags::add_bytes(const std::string& names, uint64_t& value, const std::string& description) {
  return Flag(app_.add_option(names, value, description)->transform(CLI::AsSizeValue(true)));
}
void Flags::description(const std::string& text) { app_.description(text); }

}  // namespace lightmoe::cli
