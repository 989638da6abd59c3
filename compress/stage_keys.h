#pragma once
// What a stage's output depends on, as a short text that stands beside it (compress/runner.h).

#include <filesystem>
#include <string>

#include "compress/recipe.h"
#include "loaders/json_type.h"

namespace lightmoe {

std::string key_of(Json parts);
// A stage's key stands beside its output, written last.
bool is_done(const std::filesystem::path& key_file, const std::string& key);

Json to_json(const RecipeTraining& training);
Json to_json(const MethodOptions& options);

// Two workers want one output: one makes it, the other waits and finds it made.
class StageLock {
 public:
  explicit StageLock(const std::filesystem::path& file);  // Error(kIo)
  ~StageLock();
  StageLock(const StageLock&) = delete;
  StageLock& operator=(const StageLock&) = delete;

 private:
  int file_;
};

}  // namespace lightmoe
