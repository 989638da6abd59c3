#pragma once
// Products of gemm.h against their equation in double, on the default device with whatever backend is forced.

#include <set>
#include <vector>

#include "kernels/gemm.h"
#include "tests/cases/gemm.h"
#include "tests/support/devices.h"

namespace lightmoe::testing {

struct GemmTypes {
  DType a, b, c;
  GemmCompute compute;
};
inline const std::vector<GemmTypes> kGemmTypes = {
    {DType::kF32, DType::kF32, DType::kF32, GemmCompute::kF32},
    {DType::kF32, DType::kF32, DType::kF32, GemmCompute::kBF16},
    {DType::kF32, DType::kBF16, DType::kF32, GemmCompute::kF32},
    {DType::kF32, DType::kBF16, DType::kBF16, GemmCompute::kBF16},
    {DType::kBF16, DType::kF32, DType::kBF16, GemmCompute::kF32},
    {DType::kBF16, DType::kBF16, DType::kF32, GemmCompute::kBF16},
    {DType::kBF16, DType::kBF16, DType::kBF16, GemmCompute::kF32},
    {DType::kF64, DType::kF64, DType::kF64, GemmCompute::kF32},
};
struct GemmScales {
  double alpha, beta;
};
inline const std::vector<GemmScales> kGemmScales = {{1, 0}, {1, 1}, {-0.5, 0}, {0.75, -2}, {0, 0}, {0, 1}};

// Columns of a wider matrix: none, at odd places, or at places where 16-byte accesses are possible (rows then are padded to 8 elements).
enum class Window { kNone, kOdd, kAligned };
struct GroupedVariant {
  bool gather;
  Window window;
  bool skip, trans_b;  // skip: every third group is undefined
};

void check_dense(const cases::GemmCase& c, const GemmTypes& t, bool trans_a, bool trans_b, const GemmScales& s,
                 Window window);
void check_grouped_m(const cases::GroupedCase& c, const GemmTypes& t, const GroupedVariant& v, const GemmScales& s);
// repeat: two groups for each C.
void check_grouped_k(const cases::GroupedCase& c, const GemmTypes& t, const GroupedVariant& v, const GemmScales& s,
                     bool repeat);
void check_one_output(const GemmTypes& t, int64_t groups);  // all groups add to one C
Tensor offsets_of(const std::vector<int64_t>& rows);

// Names of the backends that compute something on this device.
std::set<std::string_view> backends_of(DeviceKind device);

template <class Body>
void on_each_backend(Body&& body) {
  for (const DeviceKind device : devices()) {
    const DeviceScope on(device);
    for (const std::string_view name : backends_of(device)) {
      SCOPED_TRACE(::testing::Message() << name_of(device) << " " << name);
      const GemmBackendScope scope(name);
      body();
    }
  }
}

}  // namespace lightmoe::testing
