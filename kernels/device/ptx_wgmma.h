#pragma once
// wgmma.mma_async m64nNk16, bf16 operands, f32 accumulators: D (64xN) = A (64x16) B (16xN) [+ D]. A thread of the warpgroup holds N/2
// accumulators (layout::wgmma_d). A and B by descriptor, or A in four registers a thread (mma_m16n8k16's A, rows 16 * warp).
// `accumulate` 0 starts from zero. kBMnMajor 1: B's columns, kAMnMajor 1: A's rows lie along
// the row (descriptor_mn_major).

#include "kernels/device/simt.h"

namespace lightmoe::LIGHTMOE_DEVICE::ptx {

#if defined(__CUDACC__)

#define LIGHTMOE_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LIGHTMOE_D16(i) LIGHTMOE_D4(i), LIGHTMOE_D4(i + 4), LIGHTMOE_D4(i + 8), LIGHTMOE_D4(i + 12)
#define LIGHTMOE_D32(i) LIGHTMOE_D16(i), LIGHTMOE_D16(i + 16)
#define LIGHTMOE_D64(i) LIGHTMOE_D32(i), LIGHTMOE_D32(i + 32)
#define LIGHTMOE_D128(i) LIGHTMOE_D64(i), LIGHTMOE_D64(i + 64)
#define LIGHTMOE_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LIGHTMOE_R32 \
  LIGHTMOE_R16       \
  ", "               \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LIGHTMOE_R64                                                                 \
  LIGHTMOE_R32                                                                       \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LIGHTMOE_R128                                                                            \
  LIGHTMOE_R64                                                                                   \
  ", "                                                                                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "             \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "             \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

template <int kBMnMajor = 0, int kAMnMajor = 0>
DEVICE_FN void wgmma_m64n32k16_bf16(float (&d)[16], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" LIGHTMOE_R16
      "}, %16, %17, p, 1, 1, %19, %20;\n}"
      : LIGHTMOE_D16(0)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kAMnMajor), "n"(kBMnMajor));
}
template <int kBMnMajor = 0, int kAMnMajor = 0>
DEVICE_FN void wgmma_m64n64k16_bf16(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIGHTMOE_R32
      "}, %32, %33, p, 1, 1, %35, %36;\n}"
      : LIGHTMOE_D32(0)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kAMnMajor), "n"(kBMnMajor));
}
template <int kBMnMajor = 0, int kAMnMajor = 0>
DEVICE_FN void wgmma_m64n128k16_bf16(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIGHTMOE_R64
      "}, %64, %65, p, 1, 1, %67, %68;\n}"
      : LIGHTMOE_D64(0)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kAMnMajor), "n"(kBMnMajor));
}
template <int kBMnMajor = 0, int kAMnMajor = 0>
DEVICE_FN void wgmma_m64n256k16_bf16(float (&d)[128], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" LIGHTMOE_R128
      "}, %128, %129, p, 1, 1, %131, %132;\n}"
      : LIGHTMOE_D128(0)
      : "l"(a), "l"(b), "r"(accumulate), "n"(kAMnMajor), "n"(kBMnMajor));
}
template <int kBMnMajor = 0>
DEVICE_FN void wgmma_m64n32k16_bf16(float (&d)[16], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" LIGHTMOE_R16
      "}, {%16, %17, %18, %19}, %20, p, 1, 1, %22;\n}"
      : LIGHTMOE_D16(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kBMnMajor));
}
template <int kBMnMajor = 0>
DEVICE_FN void wgmma_m64n64k16_bf16(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" LIGHTMOE_R32
      "}, {%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
      : LIGHTMOE_D32(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kBMnMajor));
}
template <int kBMnMajor = 0>
DEVICE_FN void wgmma_m64n128k16_bf16(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LIGHTMOE_R64
      "}, {%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
      : LIGHTMOE_D64(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kBMnMajor));
}
template <int kBMnMajor = 0>
DEVICE_FN void wgmma_m64n256k16_bf16(float (&d)[128], const uint32_t (&a)[4], uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %133, 0;\nwgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" LIGHTMOE_R128
      "}, {%128, %129, %130, %131}, %132, p, 1, 1, %134;\n}"
      : LIGHTMOE_D128(0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kBMnMajor));
}

#else

#define LIGHTMOE_WGMMA(N)                                                                                  \
  template <int kBMnMajor = 0, int kAMnMajor = 0>                                                          \
  void wgmma_m64n##N##k16_bf16(float(&d)[N / 2], uint64_t a, uint64_t b, int accumulate SITE) {            \
    simulator::wgmma_bf16(d, {N, a, b, nullptr, accumulate != 0, kBMnMajor != 0, kAMnMajor != 0}, site_);  \
  }                                                                                                        \
  template <int kBMnMajor = 0>                                                                             \
  void wgmma_m64n##N##k16_bf16(float(&d)[N / 2], const uint32_t(&a)[4], uint64_t b, int accumulate SITE) { \
    simulator::wgmma_bf16(d, {N, 0, b, a, accumulate != 0, kBMnMajor != 0, false}, site_);                 \
  }
LIGHTMOE_WGMMA(32)
LIGHTMOE_WGMMA(64)
LIGHTMOE_WGMMA(128)
LIGHTMOE_WGMMA(256)
#undef LIGHTMOE_WGMMA

#endif

}  // namespace lightmoe::LIGHTMOE_DEVICE::ptx
