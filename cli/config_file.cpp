#include "cli/config_file.h"

#include <fmt/core.h>
#include <CLI/CLI.hpp>

#include <toml++/toml.h>
#include <algorithm>

#include "runtime/error.h"
#include "runtime/nearest.h"

namespace lightmoe::cli {
namespace {

std::string scalar_text(const toml::node& node, const std::string& where) {
  if (const auto* text = node.as_string()) return text->get();
  if (const auto* number = node.as_integer()) return fmt::format("{}", number->get());
  if (const auto* number = node.as_floating_point()) return fmt::format("{}", number->get());
  if (const auto* flag = node.as_boolean()) return flag->get() ? "true" : "false";
  fail(ErrorKind::kUsage, "{}: expected a string, a number, true or false, or a list of these", where);
}

void append_option(const CLI::Option& option, const std::string& key, const toml::node& node, const std::string& where,
                   std::vector<std::string>& arguments) {
  const bool is_flag = option.get_items_expected_max() == 0;
  if (is_flag) {
    const auto* flag = node.as_boolean();
    check(flag != nullptr, ErrorKind::kUsage, "{}: expected true or false", where);
    arguments.push_back(fmt::format("--{}={}", key, flag->get() ? "true" : "false"));
    return;
  }
  if (!option.get_lnames().empty()) arguments.push_back("--" + key);
  if (const auto* list = node.as_array()) {
    check(!list->empty(), ErrorKind::kUsage, "{}: the list is empty", where);
    for (const toml::node& item : *list) arguments.push_back(scalar_text(item, where));
  } else {
    arguments.push_back(scalar_text(node, where));
  }
}

}  // namespace

std::vector<std::string> long_option_names(const CLI::App& verb) {
  std::vector<std::string> names;
  for (const CLI::Option* option : verb.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back(name);
  }
  return names;
}

// What a config file calls an option (its long name) or a positional argument (its name in the help).
static const CLI::Option* find_key(const CLI::App& verb, const std::string& key) {
  for (const CLI::Option* option : verb.get_options()) {
    if (option->get_single_name() == key) return option;
  }
  return nullptr;
}

std::vector<std::string> arguments_from_config(const std::string& path, const CLI::App& verb,
                                               const std::string& verb_name, const std::vector<std::string>& given) {
  toml::table file;
  try {
    file = toml::parse_file(path);
  } catch (const toml::parse_error& error) {
    fail(ErrorKind::kUsage, "{}:{}:{}: {}", path, error.source().begin.line, error.source().begin.column,
         error.description());
  }
  std::vector<std::string> arguments, positional;
  const auto take = [&](const toml::table& table, bool top) {
    for (const auto& [key_node, node] : table) {
      const std::string key(key_node.str());
      const std::string where = fmt::format("{}:{}: {}", path, node.source().begin.line, key);
      if (top && node.is_table()) continue;
      const CLI::Option* option = find_key(verb, key);
      if (option == nullptr) {
        const std::string near = nearest(key, long_option_names(verb));
        fail(ErrorKind::kUsage, "{}: unknown key for `{}`{}", where, verb_name,
             near.empty() ? "" : fmt::format("; did you mean {}?", near));
      }
      check(key != "config", ErrorKind::kUsage, "{}: a config file cannot name another", where);
      if (std::find(given.begin(), given.end(), key) == given.end())
        append_option(*option, key, node, where, option->get_lnames().empty() ? positional : arguments);
    }
  };
  take(file, true);
  if (const toml::table* table = file[verb_name].as_table()) take(*table, false);
  if (!positional.empty()) arguments.emplace_back("--");  // else an option that takes several values would take them
  arguments.insert(arguments.end(), positional.begin(), positional.end());
  return arguments;
}

std::string config_from_arguments(const CLI::App& verb) {
  std::string text;
  for (const CLI::Option* option : verb.get_options()) {
    if (option->count() == 0) continue;
    const std::string& name = option->get_single_name();
    if (name == "config" || name == "print-config" || name == "help") continue;
    const auto quoted = [](const std::string& value) {
      char* end = nullptr;
      const bool number = !value.empty() && (std::strtod(value.c_str(), &end), *end == '\0');
      if (number || value == "true" || value == "false") return value;
      std::string escaped = "\"";
      for (const char c : value) escaped += c == '"' || c == '\\' ? std::string{'\\', c} : std::string{c};
      return escaped + "\"";
    };
    const std::vector<std::string> values = option->results();
    if (values.size() == 1) {
      text += fmt::format("{} = {}\n", name, quoted(values[0]));
    } else {
      text += name + " = [";
      for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + quoted(values[i]);
      text += "]\n";
    }
  }
  return text;
}

}  // namespace lightmoe::cli
