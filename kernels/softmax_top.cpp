#include "kernels/softmax_top.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

constexpr int64_t kGrain = 16;  // rows

// f(row) for rows in parallel; pointers to a row's first element.
template <class F>
void each_row(int64_t rows, F&& f) {
  parallel_for(0, rows, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

// The k largest of a row's n values, the largest first.
template <class T>
std::vector<int32_t> top_columns(const T* z, int64_t n, int64_t k) {
  std::vector<int32_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [z](int32_t a, int32_t b) { return load(z, a) > load(z, b); });
  order.resize(static_cast<size_t>(k));
  return order;
}

template <class T>
double at(const T* row, int64_t j) {
  return static_cast<double>(load(row, j));
}
template <class T>
void put(T* row, int64_t j, double value) {
  store(row, j, static_cast<compute_t<T>>(value));
}
template <class T>
double dot(const T* a, const T* b, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += at(a, j) * at(b, j);
  return sum;
}
template <class T>
double sum_of(const T* x, int64_t n) {
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += at(x, j);
  return sum;
}

void softmax_top_cpu(const SoftmaxTop& op) {
  visit_floating("softmax_top", op.z.dtype(), [&]<class T>() {
    const int64_t n = op.z.dim(1);
    op.p.fill_zero();
    each_row(op.z.dim(0), [&](int64_t t) {
      const T* z = op.z.data<T>() + t * n;
      const std::vector<int32_t> top = top_columns(z, n, op.k);
      const auto weight = [&](int32_t j) { return std::exp(op.scale * (at(z, j) - at(z, top[0]))); };
      double sum = 0;
      for (const int32_t j : top) sum += weight(j);
      for (const int32_t j : top) put(op.p.data<T>() + t * n, j, weight(j) / sum);
    });
  });
}

void softmax_top_backward_cpu(const SoftmaxTopBackward& op) {
  visit_floating("softmax_top_backward", op.p.dtype(), [&]<class T>() {
    const int64_t n = op.p.dim(1);
    each_row(op.p.dim(0), [&](int64_t t) {
      const T *p = op.p.data<T>() + t * n, *dp = op.dp.data<T>() + t * n;
      const double mean = dot(p, dp, n);
      for (int64_t j = 0; j < n; ++j) put(op.dz.data<T>() + t * n, j, op.scale * at(p, j) * (at(dp, j) - mean));
    });
  });
}

void keep_largest_cpu(const KeepLargest& op) {
  visit_floating("keep_largest", op.x.dtype(), [&]<class T>() {
    const int64_t n = op.x.dim(1);
    op.y.fill_zero();
    each_row(op.x.dim(0), [&](int64_t t) {
      for (const int32_t j : top_columns(op.x.data<T>() + t * n, n, op.k)) put(op.y.data<T>() + t * n, j, 1);
    });
  });
}

void share_of_row_cpu(const ShareOfRow& op) {
  visit_floating("share_of_row", op.x.dtype(), [&]<class T>() {
    const int64_t n = op.x.dim(1);
    each_row(op.x.dim(0), [&](int64_t t) {
      const T* x = op.x.data<T>() + t * n;
      const double sum = sum_of(x, n);
      for (int64_t j = 0; j < n; ++j) put(op.y.data<T>() + t * n, j, sum != 0 ? at(x, j) / sum : 0);
    });
  });
}

void share_of_row_backward_cpu(const ShareOfRowBackward& op) {
  visit_floating("share_of_row_backward", op.x.dtype(), [&]<class T>() {
    const int64_t n = op.x.dim(1);
    each_row(op.x.dim(0), [&](int64_t t) {
      const T *y = op.y.data<T>() + t * n, *dy = op.dy.data<T>() + t * n;
      const double sum = sum_of(op.x.data<T>() + t * n, n), mean = dot(y, dy, n);
      for (int64_t j = 0; j < n; ++j) put(op.dx.data<T>() + t * n, j, sum != 0 ? (at(dy, j) - mean) / sum : 0);
    });
  });
}

const RegisterKernel<SoftmaxTop> register_softmax{DeviceKind::kCpu, &softmax_top_cpu};
const RegisterKernel<SoftmaxTopBackward> register_softmax_backward{DeviceKind::kCpu, &softmax_top_backward_cpu};
const RegisterKernel<KeepLargest> register_keep{DeviceKind::kCpu, &keep_largest_cpu};
const RegisterKernel<ShareOfRow> register_share{DeviceKind::kCpu, &share_of_row_cpu};
const RegisterKernel<ShareOfRowBackward> register_share_backward{DeviceKind::kCpu, &share_of_row_backward_cpu};

void check_rows(const Tensor& x, const char* name, int64_t low, int64_t k) {
  require(x.rank() == 2, "{}: {}, expected [R,N]", name, x.shape());
  require(k >= low && k <= x.dim(1), "{}: k is {}, expected {} to {}", name, k, low, x.dim(1));
}
void check_like(const Tensor& t, const char* name, const char* what, const Tensor& like) {
  require_tensor(t, name, what, like.shape(), like.dtype());
}

}  // namespace

void run(const SoftmaxTop& op) {
  check_rows(op.z, "softmax_top", 1, op.k);
  check_like(op.p, "softmax_top", "p", op.z);
  dispatch(op, op.z.device(), "softmax_top");
}

void run(const SoftmaxTopBackward& op) {
  check_rows(op.p, "softmax_top_backward", 0, 0);
  check_like(op.dp, "softmax_top_backward", "dp", op.p);
  check_like(op.dz, "softmax_top_backward", "dz", op.p);
  dispatch(op, op.p.device(), "softmax_top_backward");
}

void run(const KeepLargest& op) {
  check_rows(op.x, "keep_largest", 0, op.k);
  check_like(op.y, "keep_largest", "y", op.x);
  dispatch(op, op.x.device(), "keep_largest");
}

void run(const ShareOfRow& op) {
  check_rows(op.x, "share_of_row", 0, 0);
  check_like(op.y, "share_of_row", "y", op.x);
  dispatch(op, op.x.device(), "share_of_row");
}

void run(const ShareOfRowBackward& op) {
  check_rows(op.x, "share_of_row_backward", 0, 0);
  check_like(op.y, "share_of_row_backward", "y", op.x);
  check_like(op.dy, "share_of_row_backward", "dy", op.x);
  check_like(op.dx, "share_of_row_backward", "dx", op.x);
  dispatch(op, op.x.device(), "share_of_row_backward");
}

}  // namespace lightmoe
