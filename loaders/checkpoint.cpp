// Checkpoint: a directory of safetensors files seen as one table of tensors.

#include <algorithm>
#include <cmath>
#include <unordered_map>

#include "loaders/json.h"
#include "loaders/output.h"
#include "loaders/safetensors.h"
#include "loaders/safetensors_index.h"
#include "runtime/error.h"

namespace fs = std::filesystem;

namespace lightmoe {
namespace {

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";
constexpr size_t kMaxShards = 4096;
constexpr JsonLimits kIndexLimits{.max_bytes = int64_t{64} << 20, .max_depth = 8, .max_values = 2'000'000};

bool plain_file_name(const std::string& name) {
  return !name.empty() && name.size() <= 255 && name != "." && name != ".." &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

std::optional<uint64_t> read_total_size(const Json& root, const std::string& name) {
  const auto metadata = root.find("metadata");
  if (metadata == root.end() || metadata->is_null()) return {};
  check(metadata->is_object(), ErrorKind::kInput, "{}: metadata is {}, expected an object", name,
        metadata->type_name());
  const auto total = metadata->find("total_size");
  if (total == metadata->end()) return {};
  if (total->is_number_unsigned()) return total->get<uint64_t>();
  const double value = total->is_number_float() ? total->get<double>() : -1;  // some writers print 1.38e10
  check(value >= 0 && value < 0x1p63 && value == std::floor(value), ErrorKind::kInput,
        "{}: metadata.total_size is {}, expected a number of bytes", name, printable(total->dump()));
  return static_cast<uint64_t>(value);
}

std::string first_few(const std::vector<std::string>& names) {
  std::string text;
  for (size_t i = 0; i < std::min<size_t>(names.size(), 5); ++i) {
    text += fmt::format("{}\"{}\"", i ? ", " : "", printable(names[i]));
  }
  return names.size() > 5 ? text + ", ..." : text;
}

// Both ways: every tensor of the index is in the shard it names, and every tensor of a shard is in the index with that shard.
void cross_check(const SafetensorsIndex& index, const std::vector<SafetensorsFile>& files, const std::string& name) {
  std::vector<std::string> missing, unlisted;
  std::unordered_map<std::string, size_t> listed;
  for (const auto& [tensor, shard] : index.weight_map) {
    listed.emplace(tensor, shard);
    if (files[shard].find(tensor) == nullptr) missing.push_back(fmt::format("{} in {}", tensor, index.shards[shard]));
  }
  uint64_t total = 0;
  for (size_t shard = 0; shard < files.size(); ++shard) {
    for (const TensorInfo& info : files[shard].tensors()) {
      total += info.bytes();
      const auto found = listed.find(info.name);
      if (found == listed.end() || found->second != shard) {
        unlisted.push_back(fmt::format("{} in {}", info.name, index.shards[shard]));
      }
    }
  }
  check(missing.empty(), ErrorKind::kInput, "{}: lists {} tensors that are not in their shard: {}", name,
        missing.size(), first_few(missing));
  check(unlisted.empty(), ErrorKind::kInput, "{}: does not list {} tensors that the shards hold: {}", name,
        unlisted.size(), first_few(unlisted));
  check(!index.total_size || *index.total_size == total, ErrorKind::kInput,
        "{}: metadata.total_size is {} bytes, the shards hold {} bytes of tensors", name, index.total_size.value_or(0),
        total);
}

[[noreturn]] void no_checkpoint(const fs::path& directory) {
  std::string hint;
  if (fs::exists(directory / "pytorch_model.bin") || fs::exists(directory / "pytorch_model.bin.index.json")) {
    hint = "; pytorch_model.bin is not read, convert it to safetensors";
  } else if (fs::exists(directory / "consolidated.safetensors")) {
    hint = "; give consolidated.safetensors itself if that is the one";
  }
  fail(ErrorKind::kInput, "{}: has neither {} nor {}{}", directory.string(), kSingle, kIndex, hint);
}

}  // namespace

SafetensorsIndex parse_safetensors_index(std::string_view text, const std::string& name) {
  const Json root = parse_json(text, name, kIndexLimits);
  check(root.is_object(), ErrorKind::kInput, "{}: is {}, expected an object", name, root.type_name());
  const auto map = root.find("weight_map");
  check(map != root.end() && map->is_object(), ErrorKind::kInput, "{}: has no object \"weight_map\"", name);
  SafetensorsIndex index;
  index.total_size = read_total_size(root, name);
  std::unordered_map<std::string, size_t> numbers;
  for (const auto& [tensor, shard] : map->items()) {
    check(shard.is_string(), ErrorKind::kInput, "{}: weight_map \"{}\" is {}, expected a file name", name,
          printable(tensor), shard.type_name());
    const std::string& file = shard.get_ref<const std::string&>();
    check(plain_file_name(file), ErrorKind::kInput,
          "{}: weight_map \"{}\" names \"{}\", expected a plain file name beside the index", name, printable(tensor),
          printable(file));
    const auto [number, is_new] = numbers.emplace(file, index.shards.size());
    if (is_new) index.shards.push_back(file);
    check(index.shards.size() <= kMaxShards, ErrorKind::kInput, "{}: more than {} shards", name, kMaxShards);
    index.weight_map.emplace_back(tensor, number->second);
  }
  return index;
}

Checkpoint::Checkpoint(const fs::path& directory_or_file) : path_(directory_or_file) {
  std::error_code ignored;
  const bool directory = fs::is_directory(path_, ignored);
  if (!directory) {
    files_.emplace_back(path_);
  } else if (fs::exists(path_ / kSingle, ignored)) {
    files_.emplace_back(path_ / kSingle);
  } else if (fs::exists(path_ / kIndex, ignored)) {
    const std::string name = (path_ / kIndex).string();
    const SafetensorsIndex index = parse_safetensors_index(read_file(name, kIndexLimits.max_bytes), name);
    for (const std::string& shard : index.shards) files_.emplace_back(path_ / shard);
    cross_check(index, files_, name);
  } else {
    no_checkpoint(path_);
  }
  for (size_t i = 0; i < files_.size(); ++i) {
    for (const TensorInfo& info : files_[i].tensors()) where_.emplace(info.name, std::make_pair(i, &info));
  }
}

std::vector<std::string> Checkpoint::names() const {
  std::vector<std::string> names;
  names.reserve(where_.size());
  for (const auto& [name, place] : where_) names.push_back(name);
  return names;
}

const TensorInfo& Checkpoint::info(const std::string& name) const {
  const auto found = where_.find(name);
  check(found != where_.end(), ErrorKind::kInput, "{}: has no tensor \"{}\" ({} tensors in {} files)", path_.string(),
        printable(name), where_.size(), files_.size());
  return *found->second.second;
}

const SafetensorsFile& Checkpoint::file_of(const std::string& name) const {
  info(name);
  return files_[where_.at(name).first];
}

int64_t Checkpoint::total_bytes() const {
  int64_t total = 0;
  for (const auto& [name, place] : where_) total += static_cast<int64_t>(place.second->bytes());
  return total;
}

}  // namespace lightmoe
