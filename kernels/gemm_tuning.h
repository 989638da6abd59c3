#pragma once
// Choices between GEMM backends by measurement instead of by cost(), kept in a file.
//   --gemm-tuning FILE               shapes that FILE knows go to the backend that was fastest there
//   --gemm-tuning FILE --gemm-tune   a shape that it does not know is measured when it is met (each backend that supports it, at most 30 ms,
//                                    on a copy of C), and FILE is written at the end
// A shape is kind, transpositions, types, gather, alignment, n, k, groups and the rows rounded up to a power of two. FILE begins with
// validators: version of the program, device, threads, driver, plug-in with its hash. A file of other validators, or no such file at all, is
// said once and ignored (measuring replaces it). A forced backend (--gemm=NAME; evaluation, whose bits must not change) is not asked.
// FILE is written beside itself and renamed, together with what another process wrote meanwhile.

#include <functional>
#include <string>
#include <string_view>

#include "kernels/gemm.h"

namespace lightmoe {

// warn gets one line when the file is ignored. Error(kIo) when it is there and cannot be read.
void use_gemm_tuning(const std::string& file, bool measure, const std::function<void(const std::string&)>& warn);
// After the work, where something was measured. Error(kIo).
void write_gemm_tuning();
void stop_gemm_tuning();  // as if never used

// Name of the fastest backend for the shape, empty when not known.
std::string_view tuned_gemm_backend(const GemmDesc& desc);
// Measures if that is asked for and the shape is new.
void tune_gemm(const Gemm& op, const GemmDesc& desc);
void tune_gemm(const GroupedGemmM& op, const GemmDesc& desc);
void tune_gemm(const GroupedGemmK& op, const GemmDesc& desc);

}  // namespace lightmoe
