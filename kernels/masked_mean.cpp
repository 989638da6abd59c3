#include "kernels/masked_mean.h"

#include <cmath>

#include "kernels/access.h"
#include "runtime/parallel.h"

namespace lightmoe {
namespace {

// What a term adds, and its derivative.
struct Entropy {
  static double value(double p) { return p > 0 ? -p * std::log(p) : 0; }
  static double slope(double p) { return p > 0 ? -(std::log(p) + 1) : 0; }
};
struct Itself {
  static double value(double x) { return x; }
  static double slope(double) { return 1; }
};

struct Rows {
  const uint8_t* mask = nullptr;
  int64_t choices = 1;  // rows of a token
  bool count(int64_t row) const { return mask == nullptr || mask[row / choices] != 0; }
};

// The sum over counted rows; the gradient, factor times the slope, where it is wanted.
template <class F, class T>
double sum_of(const Tensor& x, const Rows& rows, double factor, const Tensor& dx) {
  const int64_t n = x.dim(1);
  double sum = 0;
  for (int64_t i = 0; i < x.numel(); ++i) {
    const auto v = static_cast<double>(load(x.data<T>(), i));
    const bool counts = rows.count(i / n);
    if (counts) sum += F::value(v);
    if (dx.defined()) store(dx.data<T>(), i, static_cast<compute_t<T>>(counts ? factor * F::slope(v) : 0));
  }
  return sum;
}

// Of each tensor the sum over counted rows, times share(counted rows, columns); their sum is the loss.
template <class F, class Share>
void mean(const std::vector<Tensor>& x, const Tensor& mask, double scale, const Tensor& loss,
          const std::vector<Tensor>& dx, const Share& share) {
  Rows rows;
  if (mask.defined())
    rows = {.mask = mask.data<uint8_t>(), .choices = x[0].dim(0) / std::max<int64_t>(1, mask.numel())};
  int64_t counted = 0;
  for (int64_t r = 0; r < x[0].dim(0); ++r) counted += rows.count(r) ? 1 : 0;
  std::vector<double> sums(x.size());
  parallel_for(0, std::ssize(x), 1, [&](int64_t begin, int64_t end) {
    for (auto l = static_cast<size_t>(begin); l < static_cast<size_t>(end); ++l) {
      const double part = share(static_cast<double>(std::max<int64_t>(1, counted)), x[l].dim(1));
      const Tensor gradient = dx.empty() ? Tensor() : dx[l];
      visit_floating("masked_mean", x[l].dtype(),
                     [&]<class T>() { sums[l] = part * sum_of<F, T>(x[l], rows, scale * part, gradient); });
    }
  });
  double sum = 0;
  for (const double s : sums) sum += s;
  loss.data<double>()[0] = sum;
}

void entropy_cpu(const RouterEntropy& op) {
  const auto layers = static_cast<double>(op.probs.size());
  mean<Entropy>(op.probs, op.mask, op.scale, op.loss, op.dprobs,
                [layers](double rows, int64_t) { return 1 / (rows * layers); });
}
void mean_cpu(const MaskedMean& op) {
  const auto layers = static_cast<double>(op.x.size());
  mean<Itself>(op.x, op.mask, op.scale, op.loss, op.dx,
               [layers](double rows, int64_t columns) { return 1 / (rows * static_cast<double>(columns) * layers); });
}

const RegisterKernel<RouterEntropy> register_entropy{DeviceKind::kCpu, &entropy_cpu};
const RegisterKernel<MaskedMean> register_mean{DeviceKind::kCpu, &mean_cpu};

void check_layers(const char* name, const std::vector<Tensor>& x, const std::vector<Tensor>& dx, const Tensor& mask,
                  const Tensor& loss) {
  require(!x.empty() && x[0].rank() == 2, "{}: {} layers, expected some, of two dimensions", name, x.size());
  const DType dtype = x[0].dtype();
  require(dx.empty() || dx.size() == x.size(), "{}: {} layers of gradients, {} of values", name, dx.size(), x.size());
  for (const Tensor& t : x) require_tensor(t, name, "a layer", {x[0].dim(0), t.dim(1)}, dtype);
  for (size_t l = 0; l < dx.size(); ++l) {
    if (dx[l].defined()) require_tensor(dx[l], name, "a gradient", x[l].shape(), dtype);
  }
  if (mask.defined()) {
    require(mask.rank() == 1 && mask.dtype() == DType::kU8 &&
                (mask.numel() == 0 ? x[0].dim(0) == 0 : x[0].dim(0) % mask.numel() == 0),
            "{}: mask is {} {} beside {} rows", name, mask.shape(), name_of(mask.dtype()), x[0].dim(0));
  }
  require_tensor(loss, name, "loss", {1}, DType::kF64);
}

}  // namespace

void run(const RouterEntropy& op) {
  check_layers("router_entropy", op.probs, op.dprobs, op.mask, op.loss);
  dispatch(op, op.probs[0].device(), "router_entropy");
}

void run(const MaskedMean& op) {
  check_layers("masked_mean", op.x, op.dx, op.mask, op.loss);
  dispatch(op, op.x[0].device(), "masked_mean");
}

}  // namespace lightmoe
