#include "compress/toml_reader.h"

#include <algorithm>

#include "loaders/output.h"
#include "runtime/nearest.h"

namespace lightmoe {

toml::table parse_toml_file(const std::string& path) {
  try {
    return toml::parse(read_file(path, int64_t{16} << 20), path);
  } catch (const toml::parse_error& error) {
    fail(ErrorKind::kUsage, "{}:{}:{}: {}", path, error.source().begin.line, error.source().begin.column,
         error.description());
  }
}

void TomlReader::fail_at(const std::string& key, const std::string& reason) const {
  const toml::node* node = table_.get(key);
  const auto line = (node != nullptr ? node->source() : table_.source()).begin.line;
  fail(ErrorKind::kUsage, "{}:{}: {}{}{}: {}", file_, line, name_, name_.empty() ? "" : ".", key, reason);
}

const toml::node* TomlReader::find(const char* key) {
  asked_.emplace_back(key);
  return table_.get(key);
}

void TomlReader::require_key(const char* key) {
  if (table_.get(key) == nullptr) fail_at(key, "is missing");
}

bool TomlReader::read(const char* key, int64_t& value) {
  const toml::node* node = find(key);
  if (node == nullptr) return false;
  if (!node->is_integer()) fail_at(key, "expected an integer");
  value = node->as_integer()->get();
  return true;
}

bool TomlReader::read(const char* key, uint64_t& value) {
  int64_t number = 0;
  if (!read(key, number)) return false;
  if (number < 0) fail_at(key, "expected 0 or more");
  value = static_cast<uint64_t>(number);
  return true;
}

bool TomlReader::read(const char* key, double& value) {
  const toml::node* node = find(key);
  if (node == nullptr) return false;
  if (!node->is_number()) fail_at(key, "expected a number");
  value = node->value<double>().value();
  return true;
}

bool TomlReader::read(const char* key, bool& value) {
  const toml::node* node = find(key);
  if (node == nullptr) return false;
  if (!node->is_boolean()) fail_at(key, "expected true or false");
  value = node->as_boolean()->get();
  return true;
}

bool TomlReader::read(const char* key, std::string& value) {
  const toml::node* node = find(key);
  if (node == nullptr) return false;
  if (!node->is_string()) fail_at(key, "expected a string");
  value = node->as_string()->get();
  return true;
}

template <class T>
bool TomlReader::read_list(const char* key, std::vector<T>& value, const char* what) {
  const toml::node* node = find(key);
  if (node == nullptr) return false;
  if (!node->is_array()) fail_at(key, fmt::format("expected a list of {}", what));
  value.clear();
  for (const toml::node& item : *node->as_array()) {
    const auto entry = item.value<T>();
    if (!entry) fail_at(key, fmt::format("expected a list of {}", what));
    value.push_back(*entry);
  }
  return true;
}

bool TomlReader::read(const char* key, std::vector<double>& value) { return read_list(key, value, "numbers"); }
bool TomlReader::read(const char* key, std::vector<int64_t>& value) { return read_list(key, value, "integers"); }
bool TomlReader::read(const char* key, std::vector<std::string>& value) { return read_list(key, value, "strings"); }

const toml::table* TomlReader::table(const char* key) {
  const toml::node* node = find(key);
  if (node == nullptr) return nullptr;
  if (!node->is_table()) fail_at(key, "expected a table");
  return node->as_table();
}

const toml::array* TomlReader::tables(const char* key) {
  const toml::node* node = find(key);
  if (node == nullptr) return nullptr;
  if (!node->is_array_of_tables()) fail_at(key, fmt::format("expected tables [[{}]]", key));
  return node->as_array();
}

void TomlReader::finish() const {
  for (const auto& [key_node, node] : table_) {
    const std::string key(key_node.str());
    if (std::find(asked_.begin(), asked_.end(), key) != asked_.end()) continue;
    const std::string near = nearest(key, asked_);
    fail_at(key, near.empty() ? "unknown key" : fmt::format("unknown key; did you mean {}?", near));
  }
}

}  // namespace lightmoe
