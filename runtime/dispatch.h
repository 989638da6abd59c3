#pragma once
// One op, several executions. An op is a plain struct of tensors and scalars (RmsNorm, Gemm, ...)
// and a function run(const Op&) in kernels/<op>.cpp, which checks its arguments once and calls
// dispatch. Each execution registers itself beside its code, so there is no central list:
//   op.cpp   static const RegisterKernel<RmsNorm> cpu{DeviceKind::kCpu, &rms_norm_cpu};
//   op.cu    the same with kSim or kCuda, whichever compiler builds it.

#include "runtime/error.h"
#include "runtime/memory.h"
#include "runtime/trace.h"

namespace lightmoe {

template <class Op>
struct KernelTable {
  using Function = void (*)(const Op&);
  static inline Function by_device[kNumDeviceKinds] = {};
};

template <class Op>
struct RegisterKernel {
  RegisterKernel(DeviceKind device, typename KernelTable<Op>::Function function) {
    KernelTable<Op>::by_device[static_cast<int>(device)] = function;
  }
};

template <class Op>
bool has_kernel(DeviceKind device) {
  return KernelTable<Op>::by_device[static_cast<int>(device)] != nullptr;
}

template <class Op>
void dispatch(const Op& op, DeviceKind device, const char* name) {
  const auto function = KernelTable<Op>::by_device[static_cast<int>(device)];
  check(function != nullptr, ErrorKind::kDevice, "{}: no kernel for device {} in this build", name, name_of(device));
  const TraceRange range(TraceLevel::kOp, name);
  function(op);
}

}  // namespace lightmoe
