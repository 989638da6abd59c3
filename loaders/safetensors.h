#pragma once
// safetensors files (github.com/huggingface/safetensors, README "Format"), single and sharded.
// Reading checks every rule of the format before any tensor memory is allocated: prefix and header length (<= 100 MB, <= file),
// one JSON object starting with '{', no duplicate keys, known dtypes, non-negative dims whose product does not overflow, offsets
// that tile the data without hole or overlap, file size exact. Files are opened read-only with pread (O_NONBLOCK, regular files
// only). Errors are Error(kInput) naming file, tensor, expected and actual; system errors are Error(kIo).
// Tensor data may be unaligned in the file; reads copy.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "runtime/tensor.h"

namespace lightmoe {

struct TensorInfo {
  std::string name;
  std::string file_dtype;  // as written: "F32", "BF16", "F8_E4M3", ...
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes in the file, from its start
  uint64_t bytes() const { return end - begin; }
  int64_t numel() const;               // does not overflow: checked when the header was read
  std::optional<DType> dtype() const;  // where DType has it (BOOL is u8)
};

class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(SafetensorsFile&&) noexcept;

  const std::vector<TensorInfo>& tensors() const;  // in file order
  const TensorInfo* find(const std::string& name) const;
  const std::map<std::string, std::string>& metadata() const;
  const std::filesystem::path& path() const;
  // Whole tensor, converted to dtype when both are floating or both integer (I64 -> i32 checks the range).
  Tensor read(const std::string& name, DType dtype) const;
  Tensor read(const std::string& name) const;  // in its own dtype, where DType has it
  // Into existing memory of out's dtype; `first_row` and out.dim(0) select rows of dimension 0 (for sharded or fused tensors).
  void read_rows(const TensorInfo& info, int64_t first_row, const Tensor& out) const;
  void read_raw(const TensorInfo& info, uint64_t offset, void* out, size_t bytes) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// A checkpoint directory: model.safetensors, or model.safetensors.index.json with its shards (cross-checked both ways; shard
// names must be plain file names), or one .safetensors file given by path.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& directory_or_file);
  const std::filesystem::path& path() const { return path_; }
  std::vector<std::string> names() const;  // sorted
  bool contains(const std::string& name) const { return where_.count(name) != 0; }
  const TensorInfo& info(const std::string& name) const;  // Error(kInput) naming the missing tensor
  const SafetensorsFile& file_of(const std::string& name) const;
  Tensor read(const std::string& name, DType dtype) const { return file_of(name).read(name, dtype); }
  int64_t total_bytes() const;  // of all tensors
  const std::vector<SafetensorsFile>& files() const { return files_; }

 private:
  std::filesystem::path path_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, std::pair<size_t, const TensorInfo*>> where_;
};

struct TensorSpec {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
};

// Streaming writer. The list of tensors is known first (the header needs it), the data come in the same order, in pieces of any
// size; nothing larger than a piece is buffered. Files over max_shard_bytes are split at tensor borders into
// model-00001-of-0000N.safetensors with model.safetensors.index.json; else one model.safetensors. Metadata always has format=pt.
// finish() checks that every tensor is complete, fsyncs. A failed write throws Error(kIo) naming needed and free bytes.
class SafetensorsWriter {
 public:
  struct Options {
    std::string stem = "model";  // file name without .safetensors
    int64_t max_shard_bytes = int64_t{5} << 30;
    std::map<std::string, std::string> metadata;
  };
  SafetensorsWriter(const std::filesystem::path& directory, std::vector<TensorSpec> specs, Options options);
  ~SafetensorsWriter();
  void write(const std::string& name, const Tensor& tensor);  // converts to the spec's floating dtype
  void append_raw(const void* bytes, size_t count);           // next bytes of the current tensor, already in its dtype
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// All tensors at once into one file, atomically (temporary sibling, fsync, rename, fsync of the directory).
void write_safetensors(const std::filesystem::path& file, const std::vector<std::pair<std::string, Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace lightmoe
