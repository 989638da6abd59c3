#include "runtime/tensor.h"

#include <cstring>

#include "runtime/device.h"

namespace lightmoe {

Shape::Shape(std::initializer_list<int64_t> dims) : Shape(std::vector<int64_t>(dims)) {}
Shape::Shape(const std::vector<int64_t>& dims) {
  require(static_cast<int>(dims.size()) <= kMaxRank, "Shape: rank {} is over {}", dims.size(), kMaxRank);
  for (const int64_t dim : dims) {
    require(dim >= 0, "Shape: negative dimension {}", dim);
    dims_[static_cast<size_t>(rank_++)] = dim;
  }
}
int64_t Shape::numel() const {
  int64_t n = 1;
  for (int i = 0; i < rank_; ++i) n *= dims_[static_cast<size_t>(i)];
  return n;
}
bool Shape::operator==(const Shape& other) const {
  return rank_ == other.rank_ && std::equal(dims_.begin(), dims_.begin() + rank_, other.dims_.begin());
}
std::string Shape::str() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) text += fmt::format("{}{}", i ? ", " : "", dims_[static_cast<size_t>(i)]);
  return text + "]";
}

Tensor Tensor::empty(const Shape& shape, DType dtype, DeviceKind device) {
  Tensor t;
  t.shape_ = shape;
  t.dtype_ = dtype;
  t.device_ = device;
  t.buffer_ = Buffer::allocate(static_cast<size_t>(t.bytes()), device, MemoryScope::current());
  t.data_ = t.buffer_->data();
  t.defined_empty_ = true;
  return t;
}
Tensor Tensor::zeros(const Shape& shape, DType dtype, DeviceKind device) {
  Tensor t = empty(shape, dtype, device);
  t.fill_zero();
  return t;
}
Tensor Tensor::borrow(void* data, const Shape& shape, DType dtype, DeviceKind device) {
  Tensor t;
  t.shape_ = shape;
  t.dtype_ = dtype;
  t.device_ = device;
  t.data_ = data;
  t.defined_empty_ = true;
  return t;
}

void Tensor::fail_dtype(DType asked) const {
  fail(ErrorKind::kInternal, "Tensor {}: holds {}, read as {}", shape_, name_of(dtype_), name_of(asked));
}

Tensor Tensor::reshape(const Shape& shape) const {
  require(shape.numel() == numel(), "reshape: {} to {}", shape_, shape);
  Tensor t = *this;
  t.shape_ = shape;
  return t;
}
Tensor Tensor::slice(int64_t begin, int64_t end) const {
  require(rank() > 0 && 0 <= begin && begin <= end && end <= dim(0), "slice: [{}, {}) of {}", begin, end, shape_);
  std::vector<int64_t> dims;
  for (int i = 0; i < rank(); ++i) dims.push_back(i == 0 ? end - begin : dim(i));
  const int64_t row_bytes = dim(0) == 0 ? 0 : bytes() / dim(0);
  Tensor t = *this;
  t.shape_ = Shape(dims);
  t.data_ = static_cast<char*>(data_) + begin * row_bytes;
  return t;
}
Tensor Tensor::row(int64_t i) const {
  Tensor t = slice(i, i + 1);
  std::vector<int64_t> dims;
  for (int d = 1; d < rank(); ++d) dims.push_back(dim(d));
  t.shape_ = Shape(dims);
  return t;
}
Tensor Tensor::clone() const {
  Tensor t = empty(shape_, dtype_, device_);
  t.copy_from(*this);
  return t;
}
Tensor Tensor::to(DType dtype) const {
  Tensor t = empty(shape_, dtype, device_);
  t.copy_from(*this);
  return t;
}
Tensor Tensor::on(DeviceKind device) const {
  if (device == device_ || !defined()) return *this;
  Tensor t = empty(shape_, dtype_, device);
  t.copy_from(*this);
  return t;
}
void Tensor::copy_from(const Tensor& source) const {
  require(source.shape_ == shape_, "copy_from: {} into {}", source.shape_, shape_);
  const auto count = static_cast<size_t>(numel());
  if (count == 0) return;
  if (dtype_ == source.dtype_) {
    return copy_memory(data_, device_, source.data_, source.device_, static_cast<size_t>(bytes()));
  }
  const bool together = device_ == source.device_;
  if (together && convert_on_device(device_, source.data_, source.dtype_, data_, dtype_, count)) return;
  if (is_host_memory(device_) && is_host_memory(source.device_)) {
    return convert(source.data_, source.dtype_, data_, dtype_, count);
  }
  copy_from(source.on(DeviceKind::kCpu).to(dtype_));
}
void Tensor::fill_zero() const { fill_memory(data_, device_, 0, static_cast<size_t>(bytes())); }

void require_tensor(const Tensor& t, const char* op, const char* name, const Shape& shape, DType dtype) {
  require(t.defined(), "{}: {} is missing, expected {} {}", op, name, shape, name_of(dtype));
  require(t.shape() == shape && t.dtype() == dtype, "{}: {} is {} {}, expected {} {}", op, name, t.shape(),
          name_of(t.dtype()), shape, name_of(dtype));
}

}  // namespace lightmoe
