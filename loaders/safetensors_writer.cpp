// Writing safetensors: headers from the list of tensors, then the data as they come.

#include <algorithm>
#include <cstring>
#include <unordered_set>

#include "loaders/json.h"
#include "loaders/output.h"
#include "loaders/safetensors.h"
#include "loaders/safetensors_header.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr int64_t kConvertBytes = int64_t{8} << 20;

int64_t bytes_of(const TensorSpec& spec) {
  int64_t bytes = static_cast<int64_t>(size_of(spec.dtype));
  for (const int64_t dim : spec.shape) {
    require(dim >= 0 && !__builtin_mul_overflow(bytes, dim, &bytes), "SafetensorsWriter: \"{}\" has shape {}",
            spec.name, shape_text(spec.shape));
  }
  return bytes;
}

// Length prefix and JSON, padded with spaces to a multiple of 8.
std::string header_bytes(const std::vector<TensorSpec>& specs, size_t begin, size_t end,
                         const std::map<std::string, std::string>& metadata) {
  Json root = Json::object();
  Json::object_t& entries = root.get_ref<Json::object_t&>();  // names are unique: append without a linear search
  entries.emplace_back("__metadata__", Json(metadata));
  int64_t offset = 0;
  for (size_t i = begin; i < end; ++i) {
    Json entry = Json::object();
    entry["dtype"] = file_dtype_of(specs[i].dtype);
    entry["shape"] = specs[i].shape;
    entry["data_offsets"] = {offset, offset + bytes_of(specs[i])};
    offset += bytes_of(specs[i]);
    entries.emplace_back(specs[i].name, std::move(entry));
  }
  std::string text = root.dump(-1, ' ', false, Json::error_handler_t::replace);
  text.append((8 - text.size() % 8) % 8, ' ');
  require(text.size() <= kMaxHeaderBytes, "SafetensorsWriter: a header of {} bytes", text.size());
  std::string out(8, '\0');
  const uint64_t length = text.size();
  std::memcpy(out.data(), &length, sizeof length);
  return out + text;
}

}  // namespace

struct SafetensorsWriter::State {
  State(const std::filesystem::path& in, std::vector<TensorSpec> list, Options given)
      : directory(in), specs(std::move(list)), options(std::move(given)) {
    options.metadata["format"] = "pt";  // older transformers refuse files without it
    split();
    std::unordered_set<std::string> names;
    int64_t total = 0;
    for (const TensorSpec& spec : specs) {
      require(names.insert(spec.name).second && spec.name != "__metadata__",
              "SafetensorsWriter: tensor name \"{}\" twice", spec.name);
      total += bytes_of(spec);
    }
    const uint64_t free = free_bytes(directory);
    check(free == 0 || static_cast<uint64_t>(total) <= free, ErrorKind::kIo, "{}: needs {} bytes, {} are free there",
          directory.string(), total, free);
  }

  // Shard s holds specs [shard_begin[s], shard_begin[s + 1]).
  void split() {
    shard_begin = {0};
    int64_t in_shard = 0;
    for (size_t i = 0; i < specs.size(); ++i) {
      const int64_t bytes = bytes_of(specs[i]);
      if (i > shard_begin.back() && in_shard + bytes > options.max_shard_bytes) {
        shard_begin.push_back(i);
        in_shard = 0;
      }
      in_shard += bytes;
    }
    shard_begin.push_back(specs.size());
  }

  size_t num_shards() const { return shard_begin.size() - 1; }
  std::string shard_name(size_t shard) const {
    if (num_shards() == 1) return options.stem + ".safetensors";
    return fmt::format("{}-{:05}-of-{:05}.safetensors", options.stem, shard + 1, num_shards());
  }

  void open_next_shard() {
    if (file) file->close();
    file = std::make_unique<OutputFile>(directory / shard_name(shard));
    file->write(header_bytes(specs, shard_begin[shard], shard_begin[shard + 1], options.metadata));
    ++shard;
  }

  // To the tensor that takes the next byte: past complete ones, opening shards on the way.
  void settle() {
    while (current < specs.size() && done == bytes_of(specs[current])) {
      open_shards();
      ++current;
      done = 0;
    }
    open_shards();
  }
  void open_shards() {
    while (shard < num_shards() && shard_begin[shard] <= current && (shard == 0 || current < specs.size()))
      open_next_shard();
  }

  void append(const void* bytes, int64_t count) {
    const char* from = static_cast<const char*>(bytes);
    while (count > 0) {
      settle();
      require(current < specs.size(), "SafetensorsWriter: {} bytes after the last tensor", count);
      const int64_t n = std::min(count, bytes_of(specs[current]) - done);
      file->write(from, static_cast<size_t>(n));
      done += n;
      from += n;
      count -= n;
    }
  }

  void write_index() const {
    int64_t total = 0;
    Json index = Json::object();
    Json map = Json::object();
    for (size_t s = 0; s < num_shards(); ++s) {
      for (size_t i = shard_begin[s]; i < shard_begin[s + 1]; ++i) {
        total += bytes_of(specs[i]);
        map.get_ref<Json::object_t&>().emplace_back(specs[i].name, shard_name(s));
      }
    }
    index["metadata"] = {{"total_size", total}};
    index["weight_map"] = std::move(map);
    OutputFile out(directory / (options.stem + ".safetensors.index.json"));
    out.write(index.dump(2) + "\n");
    out.close();
  }

  std::filesystem::path directory;
  std::vector<TensorSpec> specs;
  Options options;
  std::vector<size_t> shard_begin;
  std::unique_ptr<OutputFile> file;
  size_t shard = 0;    // shards opened so far
  size_t current = 0;  // tensor being written
  int64_t done = 0;    // its bytes so far
  bool finished = false;
};

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& directory, std::vector<TensorSpec> specs,
                                     Options options)
    : state_(std::make_unique<State>(directory, std::move(specs), std::move(options))) {}
SafetensorsWriter::~SafetensorsWriter() = default;

void SafetensorsWriter::write(const std::string& name, const Tensor& given) {
  State& s = *state_;
  const Tensor tensor = given.on(DeviceKind::kCpu);
  while (s.current < s.specs.size() && s.specs[s.current].name != name && s.done == bytes_of(s.specs[s.current])) {
    s.open_shards();
    ++s.current;
    s.done = 0;
  }
  require(s.current < s.specs.size() && s.specs[s.current].name == name && s.done == 0,
          "SafetensorsWriter: \"{}\" is out of order or incomplete before it", name);
  const TensorSpec& spec = s.specs[s.current];
  require(tensor.defined() && Shape(spec.shape) == tensor.shape(), "SafetensorsWriter: \"{}\" is {}, announced as {}",
          name, tensor.shape(), shape_text(spec.shape));
  if (tensor.dtype() == spec.dtype) return append_raw(tensor.raw(), static_cast<size_t>(tensor.bytes()));
  const int64_t from_size = static_cast<int64_t>(size_of(tensor.dtype())),
                to_size = static_cast<int64_t>(size_of(spec.dtype));
  const DType to = spec.dtype;
  const int64_t piece = kConvertBytes / to_size;
  std::vector<char> buffer(static_cast<size_t>(std::min(piece, tensor.numel()) * to_size));
  for (int64_t i = 0; i < tensor.numel(); i += piece) {
    const int64_t n = std::min(piece, tensor.numel() - i);
    convert(static_cast<const char*>(tensor.raw()) + i * from_size, tensor.dtype(), buffer.data(), to,
            static_cast<size_t>(n));
    append_raw(buffer.data(), static_cast<size_t>(n * to_size));
  }
}

void SafetensorsWriter::append_raw(const void* bytes, size_t count) {
  state_->append(bytes, static_cast<int64_t>(count));
}

void SafetensorsWriter::finish() {
  State& s = *state_;
  require(!s.finished, "SafetensorsWriter: finished twice");
  s.settle();
  require(s.current == s.specs.size(), "SafetensorsWriter: \"{}\" has {} of {} bytes",
          s.specs[std::min(s.current, s.specs.size() - 1)].name, s.done,
          s.current < s.specs.size() ? bytes_of(s.specs[s.current]) : 0);
  s.file->close();
  if (s.num_shards() > 1) s.write_index();
  s.finished = true;
}

void write_safetensors(const std::filesystem::path& file, const std::vector<std::pair<std::string, Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorSpec> specs;
  std::unordered_set<std::string> names;
  for (const auto& [name, tensor] : tensors) {
    require(names.insert(name).second && name != "__metadata__", "write_safetensors: tensor name \"{}\" twice", name);
    std::vector<int64_t> shape;
    for (int i = 0; i < tensor.rank(); ++i) shape.push_back(tensor.dim(i));
    specs.push_back({name, tensor.dtype(), shape});
  }
  std::map<std::string, std::string> all = metadata;
  all["format"] = "pt";
  write_file_atomically(file, [&](OutputFile& out) {
    out.write(header_bytes(specs, 0, specs.size(), all));
    for (const auto& [name, tensor] : tensors)
      out.write(tensor.on(DeviceKind::kCpu).raw(), static_cast<size_t>(tensor.bytes()));
  });
}

}  // namespace lightmoe
