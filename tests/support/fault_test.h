#pragma once
// Expectations of tests that inject a bug into a kernel and wait for the simulator's report.

#include <string>

#include "kernels/device/simulator/fiber.h"
#include "tests/support/kernel_test.h"

namespace lightmoe::testing {

#ifdef LIGHTMOE_RACE
inline constexpr bool kRaceBuild = true;
#else
inline constexpr bool kRaceBuild = false;
#endif

// Every build reports it: the kind of fault, the kernel, its block and thread or threads, and the place in a test's source.
template <class F>
void expect_fault(const std::string& kind, const std::string& kernel, F&& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::kDevice);
    const std::string text = error.what();
    for (const std::string& piece : {"sim: " + kind, "kernel " + kernel, std::string("block ("), std::string("thread"),
                                     std::string("_test.cu:")}) {
      EXPECT_NE(text.find(piece), std::string::npos) << "no '" << piece << "' in: " << text;
    }
    return;
  }
  ADD_FAILURE() << "no fault, expected " << kind << " in " << kernel;
}

// Reported by the race build; nothing is asserted of the others, whose results may be wrong or right by luck.
template <class F>
void expect_race(const std::string& kind, const std::string& kernel, F&& action) {
  if constexpr (kRaceBuild) expect_fault(kind, kernel, action);
}

// The address or undefined-behaviour sanitizer ends the process.
template <class F>
void expect_fault_under_asan(const char* text, F&& action) {
#ifdef LIGHTMOE_ASAN
  EXPECT_DEATH(action(), text);
#else
  (void)text;
  (void)action;
#endif
}

}  // namespace lightmoe::testing
