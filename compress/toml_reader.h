#pragma once
// One TOML table read key by key. What was not asked for is an error with the nearest key that was, so a mistyped key never passes
// in silence. Error(kUsage) "recipe.toml:12: ...".

#include <toml++/toml.h>

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/error.h"

namespace lightmoe {

class TomlReader {
 public:
  TomlReader(const toml::table& table, std::string file, std::string name)
      : table_(table), file_(std::move(file)), name_(std::move(name)) {}

  // Into `value` when the key is there; true then.
  bool read(const char* key, int64_t& value);
  bool read(const char* key, uint64_t& value);
  bool read(const char* key, double& value);
  bool read(const char* key, bool& value);
  bool read(const char* key, std::string& value);
  bool read(const char* key, std::vector<double>& value);
  bool read(const char* key, std::vector<int64_t>& value);
  bool read(const char* key, std::vector<std::string>& value);
  const toml::table* table(const char* key);
  const toml::array* tables(const char* key);  // [[key]]
  void require_key(const char* key);

  // Every key of the table was asked for.
  void finish() const;
  [[noreturn]] void fail_at(const std::string& key, const std::string& reason) const;
  const std::string& file() const { return file_; }

 private:
  const toml::node* find(const char* key);
  template <class T>
  bool read_list(const char* key, std::vector<T>& value, const char* what);

  const toml::table& table_;
  std::string file_, name_;
  std::vector<std::string> asked_;
};

toml::table parse_toml_file(const std::string& path);

}  // namespace lightmoe
