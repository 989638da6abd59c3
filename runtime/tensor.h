#pragma once
// A handle to contiguous row-major memory with a shape and a dtype. Copying a Tensor copies the
// handle; views (slice, reshape) share the buffer. No arithmetic here: kernels/ has it.

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "runtime/dtype.h"
#include "runtime/error.h"
#include "runtime/memory.h"

namespace lightmoe {

class Shape {
 public:
  static constexpr int kMaxRank = 4;
  Shape() = default;
  Shape(std::initializer_list<int64_t> dims);
  explicit Shape(const std::vector<int64_t>& dims);
  int rank() const { return rank_; }
  int64_t operator[](int i) const { return dims_[static_cast<size_t>(i < 0 ? i + rank_ : i)]; }
  int64_t numel() const;
  bool operator==(const Shape& other) const;
  std::string str() const;  // "[2, 13, 64]"

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

}  // namespace lightmoe

// A Shape is an argument of require and fail as it is: its text is made only when the check fails.
// NOTE: require(ok, "{}", x.shape().str()) makes the string, half a microsecond, on every call.
// NOTE: written a character at a time, for fmt::format_to without fmt/format.h does not link under clang.
template <>
struct fmt::formatter<lightmoe::Shape> {
  constexpr auto parse(fmt::format_parse_context& context) { return context.begin(); }
  template <class Context>
  auto format(const lightmoe::Shape& shape, Context& context) const {
    auto out = context.out();
    for (char character : shape.str()) *out++ = character;
    return out;
  }
};

namespace lightmoe {

class Tensor {
 public:
  Tensor() = default;  // undefined

  // Uninitialised / zeroed memory booked under the current MemoryScope.
  static Tensor empty(const Shape& shape, DType dtype, DeviceKind device = default_device());
  static Tensor zeros(const Shape& shape, DType dtype, DeviceKind device = default_device());
  // Memory owned by somebody else, who must outlive the handle.
  static Tensor borrow(void* data, const Shape& shape, DType dtype, DeviceKind device = DeviceKind::kCpu);
  template <class T>
  static Tensor from(const std::vector<T>& values, const Shape& shape);

  bool defined() const { return data_ != nullptr || defined_empty_; }
  explicit operator bool() const { return defined(); }
  const Shape& shape() const { return shape_; }
  int rank() const { return shape_.rank(); }
  int64_t dim(int i) const { return shape_[i]; }  // negative counts from the end
  int64_t numel() const { return shape_.numel(); }
  DType dtype() const { return dtype_; }
  DeviceKind device() const { return device_; }
  int64_t bytes() const { return numel() * static_cast<int64_t>(size_of(dtype_)); }

  void* raw() const { return data_; }
  template <class T>
  T* data() const {
    if (dtype_ != dtype_of<T>) [[unlikely]]
      fail_dtype(dtype_of<T>);
    return static_cast<T*>(data_);
  }

  Tensor reshape(const Shape& shape) const;        // same number of elements
  Tensor slice(int64_t begin, int64_t end) const;  // along dimension 0
  Tensor row(int64_t i) const;                     // slice without dimension 0
  Tensor clone() const;                            // own memory, current MemoryScope
  Tensor to(DType dtype) const;                    // converted copy (floating types); clone if equal
  Tensor on(DeviceKind device) const;              // this tensor if it is there, else a copy
  void copy_from(const Tensor& source) const;      // same shape; converts floating dtypes
  void fill_zero() const;
  bool shares_buffer_with(const Tensor& other) const { return buffer_ && buffer_ == other.buffer_; }
  void reset() { *this = Tensor(); }

 private:
  [[noreturn]] void fail_dtype(DType asked) const;
  std::shared_ptr<Buffer> buffer_;
  void* data_ = nullptr;
  Shape shape_;
  DType dtype_ = DType::kF32;
  DeviceKind device_ = DeviceKind::kCpu;
  bool defined_empty_ = false;  // zero elements, yet a real tensor
};

template <class T>
Tensor Tensor::from(const std::vector<T>& values, const Shape& shape) {
  require(static_cast<int64_t>(values.size()) == shape.numel(), "Tensor::from: {} values for {}", values.size(), shape);
  Tensor t = empty(shape, dtype_of<T>);
  copy_memory(t.data<T>(), t.device(), values.data(), DeviceKind::kCpu, static_cast<size_t>(t.bytes()));
  return t;
}

// Door check of an op: throws Error(kInternal) "op: name is [..] f32, expected [..] bf16".
void require_tensor(const Tensor& t, const char* op, const char* name, const Shape& shape, DType dtype);

}  // namespace lightmoe
