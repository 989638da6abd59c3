# LightMoE build. Wildcards and pattern rules: adding a file edits nothing.
#   make            program and bench into build/
#   make demo       the whole story on the small checkpoint the repository carries
#   make demo-sim   a slice of it with the GPU's kernels, on the simulator
#   make test       unit, golden and fault tests, and the architecture lint
#   make bench      benchmarks, JSON into build/bench/
#   make sim | sim-race | sim-asan | sim-check     device tests on the GPU simulator, plain and in its checking builds
#   make lint | format | setup | asan | fuzz | cuda | cuda-budget
#   make gpu-build | gpu-check     everything a GPU must prove, packed for a bare machine, and run there
# Variables: MODE=release|asan|debug|fuzz  CUDA=1 (GPU kernels too)  ARCH=native  CXX=g++|clang++  SHORT=1 (demo)  FUZZ_SECONDS=5 (for each target)

# As many jobs as there are cores unless -j says otherwise.
ifeq ($(MAKELEVEL),0)
  MAKEFLAGS += -j$(shell nproc)
endif

MODE ?= release
ARCH ?= native
NVCC ?= $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
ifeq ($(origin CXX),default)
  CXX := g++
endif
CCACHE ?= $(shell command -v ccache 2>/dev/null)

BUILD := build$(if $(filter-out release,$(MODE)),/$(MODE))$(if $(filter 1,$(CUDA)),/with-cuda)$(if $(findstring clang,$(CXX)),/clang)
LIBRARY_DIRS := runtime kernels kernels/device/simulator autograd loaders model compress
LIBRARY_SOURCES := $(wildcard $(addsuffix /*.cpp,$(LIBRARY_DIRS)) kernels/*.cu)
TEST_SOURCES := $(wildcard tests/*.cpp tests/*.cu tests/support/*.cpp)
BENCH_SOURCES := $(wildcard bench/*.cpp)
CLI_SOURCES := $(wildcard cli/*.cpp)
DEMO_SOURCES := $(wildcard demo/*.cpp)
FUZZ_SOURCES := $(wildcard tests/fuzz/*.cpp)
CUDA_SOURCES := $(wildcard kernels/*.cu)

# A .cu file becomes kernels of the simulator (any host compiler) and, with CUDA=1, of the GPU (nvcc); both link into one binary.
objects = $(patsubst %.cpp,$(BUILD)/obj/%.o,$(filter %.cpp,$(1))) $(patsubst %.cu,$(BUILD)/obj/%.sim.o,$(filter %.cu,$(1))) \
  $(if $(filter 1,$(CUDA)),$(patsubst %.cu,$(BUILD)/obj/%.cuda.o,$(filter %.cu,$(1))))

PACKAGES := g++ pkg-config libcli11-dev nlohmann-json3-dev libfmt-dev libpcre2-dev libutf8proc-dev \
  libxxhash-dev libopenblas-openmp-dev libtomlplusplus-dev libgtest-dev libbenchmark-dev
FUZZ_PACKAGES := clang libclang-rt-dev libomp-dev
FUZZ_SECONDS ?= 5

VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
# PCRE2 and utf8proc read tokenizers, xxhash seals files, OpenBLAS (OpenMP build: one thread pool) multiplies.
LDLIBS := -lfmt -lpcre2-8 -lutf8proc -lxxhash -l:libopenblas.so.0 -ldl -lpthread
OPENBLAS_DIR := $(firstword $(wildcard /usr/lib/*/openblas-openmp))
LDFLAGS += -fopenmp $(if $(OPENBLAS_DIR),-L$(OPENBLAS_DIR) -Wl$(comma)-rpath$(comma)$(OPENBLAS_DIR))
comma := ,

CUDA_HOME ?= $(patsubst %/bin/nvcc,%,$(NVCC))
# NVTX is headers alone, so builds without CUDA name their ranges for Nsight, too, where the toolkit is.
ifeq ($(CUDA),1)
$(BUILD)/obj/runtime/cuda_%.o: CPPFLAGS += -DLIGHTMOE_CUDA -isystem $(CUDA_HOME)/include
endif
NVTX_INCLUDE := $(if $(wildcard $(CUDA_HOME)/include/nvtx3/nvToolsExt.h),-isystem $(CUDA_HOME)/include)
$(BUILD)/obj/runtime/cuda_nvtx.o: CPPFLAGS += $(if $(NVTX_INCLUDE),-DLIGHTMOE_NVTX $(NVTX_INCLUDE))
NVCC_FLAGS := -std=c++20 -O3 -lineinfo --expt-relaxed-constexpr -Werror all-warnings -Xcompiler -Wall,-Wextra,-fopenmp
CUDA_ARCHITECTURES := -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a
ifeq ($(CUDA),1)
  LDLIBS += -L$(CUDA_HOME)/lib64 -Wl$(comma)-rpath$(comma)$(CUDA_HOME)/lib64 -lcudart -lcublasLt -lcublas
endif

ASAN_WARNINGS := $(if $(findstring clang,$(CXX)),,-Wno-uninitialized -Wno-maybe-uninitialized)
CPPFLAGS += -I. $(if $(OPENBLAS_DIR),-I$(subst /lib/,/include/,$(OPENBLAS_DIR)))
CXXFLAGS += -std=c++20 -g1 -Wall -Wextra -Werror -Wno-missing-field-initializers -fopenmp -fno-math-errno -fno-trapping-math -MMD -MP
ifeq ($(MODE),release)
  CXXFLAGS += -march=$(ARCH)
  # Compile fast where no time is spent.
  OPTIMIZE = $(if $(filter $(addprefix $(BUILD)/obj/,cli/% tests/% demo/%),$@),-O1,$(if $(filter $(BUILD)/obj/kernels/%.o,$(@:.sim.o=)),-O3,-O2))
else ifeq ($(MODE),asan)
  # NOTE: with sanitizers g++ 12 takes std::regex's states and fmt's arguments for uninitialised (its manual: more false warnings with
  # -fsanitize).
  OPTIMIZE = -O1
  CXXFLAGS += -march=$(ARCH) -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer \
    $(ASAN_WARNINGS)
  LDFLAGS += -fsanitize=address,undefined
  # A quarter of the time of a test of a whole model would go into overflow checks of the register tile's counters (98 s against 72 s).
  $(BUILD)/obj/kernels/gemm_native_tile.o: CXXFLAGS += -fno-sanitize=undefined
else ifeq ($(MODE),debug)
  CXXFLAGS += -O0 -march=$(ARCH)
else ifeq ($(MODE),fuzz)
  CXXFLAGS += -O1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
  LDFLAGS += -fsanitize=fuzzer,address,undefined
else
  $(error MODE is $(MODE), expected release, asan, debug or fuzz)
endif

.PHONY: all demo demo-sim sim sim-race sim-asan sim-check test unit bench lint format setup asan fuzz fuzz-run cuda cuda-budget gpu-build gpu-check clean
.PRECIOUS: $(BUILD)/obj/%.o $(BUILD)/precompiled/runtime-%.h.gch $(BUILD)/precompiled/tests-%.h.gch
all: setup
	@$(MAKE) --no-print-directory $(BUILD)/lightmoe $(BUILD)/lightmoe-bench

# Headers that nearly every file includes, compiled once for each level of optimisation: a third of a cold build by g++ is reading them.
# Not under ccache, which would take each one for a change of everything.
ifeq ($(CCACHE)$(findstring clang,$(CXX)),)
  PRECOMPILED_release := runtime-O1 runtime-O2 runtime-O3 tests-O1
  PRECOMPILED_asan := runtime-O1
  PRECOMPILED := $(patsubst %,$(BUILD)/precompiled/%.h.gch,$(PRECOMPILED_$(MODE)))
endif
# NOTE: where std::string comes from a precompiled header, g++ 12 takes the inside of operator+ for an access out of bounds.
include_precompiled = $(if $(PRECOMPILED),-Wno-array-bounds -Wno-stringop-overflow -Wno-stringop-overread -Wno-restrict \
  -include $(BUILD)/precompiled/$(if $(filter $(BUILD)/obj/tests/%,$@),tests,runtime)$(OPTIMIZE).h)
define PRECOMPILE
	@mkdir -p $(@D)
	@echo "  CXX  $< (-$*)"
	@echo '#include "$<"' > $(@:.gch=)
	@$(CXX) $(CPPFLAGS) $(CXXFLAGS) -$* -x c++-header $(@:.gch=) -o $@
endef
$(BUILD)/precompiled/runtime-%.h.gch: runtime/precompiled.h
	$(PRECOMPILE)
$(BUILD)/precompiled/tests-%.h.gch: tests/support/precompiled.h runtime/precompiled.h
	$(PRECOMPILE)

$(BUILD)/obj/%.o: %.cpp | $(PRECOMPILED)
	@mkdir -p $(@D)
	@echo "  CXX  $<"
	@$(CCACHE) $(CXX) $(CPPFLAGS) $(CXXFLAGS) $(OPTIMIZE) $(include_precompiled) -c $< -o $@

# Automatic variables start with a pattern, so that a kernel's uninitialised register is never a lucky zero.
SIM_FLAGS := -x c++ -Wno-unknown-pragmas -ftrivial-auto-var-init=pattern
$(BUILD)/obj/%.sim.o: %.cu
	@mkdir -p $(@D)
	@echo "  SIM  $<"
	@$(CCACHE) $(CXX) $(CPPFLAGS) $(CXXFLAGS) $(OPTIMIZE) $(SIM_FLAGS) -c $< -o $@

$(BUILD)/obj/%.cuda.o: %.cu
	@mkdir -p $(@D)
	@echo "  NVCC $<"
	@$(NVCC) $(NVCC_FLAGS) -I. $(CUDA_ARCHITECTURES) -MMD -MP -MF $(@:.o=.d) -c $< -o $@

# The version reaches one object only, so that a commit does not rebuild the tree.
$(BUILD)/obj/runtime/version.o: CPPFLAGS += -DLIGHTMOE_VERSION='"$(VERSION)"'
$(BUILD)/obj/runtime/version.o: $(wildcard $(shell git rev-parse --git-path HEAD --git-path index 2>/dev/null))

LIBRARY_OBJECTS := $(call objects,$(LIBRARY_SOURCES))
# Under MODE=asan the library is instrumented and what calls it is the plain build's, which `make asan` makes first.
plain_objects = $(if $(filter asan,$(MODE)),$(patsubst $(BUILD)/%,build/%,$(call objects,$(1))),$(call objects,$(1)))
$(BUILD)/lightmoe: $(LIBRARY_OBJECTS) $(call plain_objects,$(CLI_SOURCES))
	@echo "  LINK $@"
	@$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@
$(BUILD)/lightmoe-bench: $(LIBRARY_OBJECTS) $(call objects,$(BENCH_SOURCES))
	@echo "  LINK $@"
	@$(CXX) $(LDFLAGS) $^ -lbenchmark $(LDLIBS) -o $@
$(BUILD)/lightmoe-tests: $(LIBRARY_OBJECTS) $(call plain_objects,$(TEST_SOURCES))
	@echo "  LINK $@"
	@$(CXX) $(LDFLAGS) $^ -lgtest $(LDLIBS) -o $@
# Libraries that tests load: tests/plugins/*.c.
TEST_PLUGINS := $(patsubst tests/plugins/%.c,$(BUILD)/plugins/%.so,$(wildcard tests/plugins/*.c))
$(BUILD)/lightmoe-tests: | $(TEST_PLUGINS)
$(BUILD)/plugins/%.so: tests/plugins/%.c kernels/plugin/lightmoe_gemm.h $(wildcard kernels/plugin/example/*.c)
	@mkdir -p $(@D)
	@echo "  CC   $<"
	@$(CC) -std=c11 -O2 -ffp-contract=off -Wall -Wextra -Werror -Ikernels/plugin $(NVTX_INCLUDE) -fPIC -shared -fvisibility=hidden $< -o $@
# The GPU's memory on a fake of the CUDA runtime.
$(BUILD)/obj/tests/cuda_memory_test.o: CPPFLAGS := -Itests/support/fake_cuda -DLIGHTMOE_CUDA $(CPPFLAGS)
# Op tests alone, which run on every device: the layers below autograd and the tests that use tests/support/devices.h.
DEVICE_TEST_SUPPORT := $(addprefix tests/support/,testing.cpp gemm_checks.cpp main.cpp)
DEVICE_TESTS := $(shell grep -l "tests/support/devices.h" tests/*.cpp)
MODEL_DEVICE_TESTS := $(shell grep -l '"model/' $(DEVICE_TESTS))
DEVICE_TEST_SOURCES := $(filter-out $(MODEL_DEVICE_TESTS),$(DEVICE_TESTS)) $(wildcard tests/*.cu) $(DEVICE_TEST_SUPPORT)
$(BUILD)/device-tests: $(call objects,$(filter runtime/% kernels/%,$(LIBRARY_SOURCES)) $(DEVICE_TEST_SOURCES))
	@echo "  LINK $@"
	@$(CXX) $(LDFLAGS) $^ -lgtest $(LDLIBS) -o $@
# The same tests with the simulator and the kernels built to check; everything else links as it is. race: the compiler's calls for the
# thread sanitizer go to the simulator's own detector, so that library is not linked. asan: address and undefined-behaviour sanitizers.
# The simulator itself, which every instruction goes through, is at -O3 in both.
RACE_FLAGS := -O2 -DLIGHTMOE_RACE
RACE_KERNEL_FLAGS := -fsanitize=thread
ASAN_FLAGS := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer $(ASAN_WARNINGS)
ASAN_LINK_FLAGS := -fsanitize=address,undefined
SIMULATOR_SOURCES := $(wildcard kernels/device/simulator/*.cpp)
define checking_build # name, variables' prefix
$(BUILD)/sim-$(1)/obj/%.o: %.cpp
	@mkdir -p $$(@D)
	@echo "  CXX  $$< ($(1))"
	@$$(CCACHE) $$(CXX) $$(CPPFLAGS) $$(CXXFLAGS) $$($(2)_FLAGS) -O3 -c $$< -o $$@
$(BUILD)/sim-$(1)/obj/%.sim.o: %.cu
	@mkdir -p $$(@D)
	@echo "  SIM  $$< ($(1))"
	@$$(CCACHE) $$(CXX) $$(CPPFLAGS) $$(CXXFLAGS) $$($(2)_FLAGS) $$($(2)_KERNEL_FLAGS) $$(SIM_FLAGS) -c $$< -o $$@
$(BUILD)/device-tests-$(1): $$(patsubst %.cu,$(BUILD)/sim-$(1)/obj/%.sim.o,$$(wildcard kernels/*.cu tests/*.cu)) \
    $$(SIMULATOR_SOURCES:%.cpp=$(BUILD)/sim-$(1)/obj/%.o) \
    $$(call objects,$$(filter-out $$(SIMULATOR_SOURCES) %.cu,$$(filter runtime/% kernels/%,$$(LIBRARY_SOURCES)) $$(DEVICE_TEST_SOURCES)))
	@echo "  LINK $$@"
	@$$(CXX) $$(LDFLAGS) $$($(2)_LINK_FLAGS) $$^ -lgtest $$(LDLIBS) -o $$@
endef
$(eval $(call checking_build,race,RACE))
$(eval $(call checking_build,asan,ASAN))

# Device tests on the simulator: `make sim`, `make sim-race`, `make sim-asan` with SIM_SEEDS="1 2 3"; `make sim-check` is what CI runs.
SIM_SEEDS ?= 1
# SimGuard tests a memory of its own, which the checking builds' take the place of.
SIM_RUN = for seed in $(2); do echo "$(1), seed $$seed"; LIGHTMOE_TEST_DEVICES=sim LIGHTMOE_SIM_SEED=$$seed \
  ASAN_OPTIONS=detect_leaks=0:detect_container_overflow=0 scripts/run_tests.sh $(1) --gtest_brief=1 --gtest_filter=$(3) $(TEST_ARGS) || exit 1; done
sim: $(BUILD)/device-tests
	@$(call SIM_RUN,$<,$(SIM_SEEDS),*)
sim-race: $(BUILD)/device-tests-race
	@$(call SIM_RUN,$<,$(SIM_SEEDS),-SimGuard*)
sim-asan: $(BUILD)/device-tests-asan
	@$(call SIM_RUN,$<,$(SIM_SEEDS),-SimGuard*)
sim-check:
	@$(MAKE) --no-print-directory sim SIM_SEEDS="0 1 2 3 4"
	@$(MAKE) --no-print-directory sim-race SIM_SEEDS="0 1 2"
	@$(MAKE) --no-print-directory sim-asan SIM_SEEDS="1"
# Whole models on every device.
$(BUILD)/model-device-tests: $(LIBRARY_OBJECTS) $(call objects,$(MODEL_DEVICE_TESTS) $(wildcard tests/support/*.cpp))
	@echo "  LINK $@"
	@$(CXX) $(LDFLAGS) $^ -lgtest $(LDLIBS) -o $@
# Each demo/*.cpp is a small program of its own (generators of the demo's data).
$(BUILD)/demo-%: $(BUILD)/obj/demo/%.o $(LIBRARY_OBJECTS)
	@echo "  LINK $@"
	@$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@

# NOTE: waiting OpenMP threads spin by default; where tests share the cores with other work, each parallel region then waits for
# a time slice (measured here with 12 runnable processes on 2 cores: 19.4 s against 0.4 s for one training test).
test unit asan sim sim-race sim-asan: export OMP_WAIT_POLICY ?= passive

test: setup lint
	@$(MAKE) --no-print-directory $(BUILD)/lightmoe $(BUILD)/lightmoe-tests
	@scripts/run_tests.sh $(BUILD)/lightmoe-tests $(TEST_ARGS)

# Unit tests alone, without set-up and lint: make unit TEST_ARGS=--gtest_filter='RmsNorm*'
unit: $(BUILD)/lightmoe-tests $(BUILD)/lightmoe
	@scripts/run_tests.sh $(BUILD)/lightmoe-tests $(TEST_ARGS)

# All unit tests with the library under the address and undefined-behaviour sanitizers.
asan: setup
	@$(MAKE) --no-print-directory MODE=release build/lightmoe-tests build/lightmoe
	@$(MAKE) --no-print-directory MODE=asan build/asan/lightmoe-tests build/asan/lightmoe
	@ASAN_OPTIONS=detect_leaks=0 LIGHTMOE_TEST_PATIENCE=20 scripts/run_tests.sh build/asan/lightmoe-tests $(TEST_ARGS)

# Each tests/fuzz/*.cpp with libFuzzer, FUZZ_SECONDS of each; needs clang, which nothing else does. FUZZ_LIBRARY is what reads
# files; the linker takes from it what a target calls.
FUZZ_LIBRARY := $(filter runtime/% loaders/%,$(LIBRARY_SOURCES)) autograd/schedule.cpp \
  $(addprefix model/,config.cpp slot_table.cpp parameter_table.cpp extension_registry.cpp checkpoint_state.cpp)
FUZZERS := $(patsubst tests/fuzz/%.cpp,$(BUILD)/%,$(FUZZ_SOURCES))
$(BUILD)/fuzz.a: $(call objects,$(FUZZ_LIBRARY)) Makefile
	@rm -f $@ && ar qcs $@ $(filter %.o,$^)
$(BUILD)/%_fuzz: $(BUILD)/obj/tests/fuzz/%_fuzz.o $(BUILD)/fuzz.a
	@echo "  LINK $@"
	@$(CXX) $(LDFLAGS) $^ $(LDLIBS) -o $@
fuzz:
	@scripts/setup.sh $(PACKAGES) $(FUZZ_PACKAGES)
	@$(MAKE) --no-print-directory MODE=fuzz CXX=clang++ fuzz-run
fuzz-run: $(FUZZERS)
	@scripts/fuzz.sh $(FUZZ_SECONDS) $(FUZZERS)

bench: all
	@scripts/bench.sh

demo: all
	@SHORT=$(SHORT) demo/run.sh

demo-sim: all
	@demo/sim.sh

lint:
	@scripts/lint.sh

format:
	@git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format -i

setup:
	@scripts/setup.sh $(PACKAGES)

# Every kernel compiled for both GPU generations: warnings, spills and a change of kernels/budget/registers.txt are errors
# (scripts/check_ptxas.sh); cuda-budget accepts the change. Some files alone: make cuda CUDA_SOURCES=kernels/router.cu
cuda cuda-budget:
	@if [ -z "$(NVCC)" ]; then echo "cuda: no nvcc here, skipped"; \
	else BUDGET=$(if $(filter cuda-budget,$@),update,check) scripts/check_ptxas.sh "$(NVCC)" "$(NVCC_FLAGS)" $(CUDA_SOURCES); fi

# Programs for a machine with a GPU and nothing else: kernels for sm_90a, any x86-64 processor with AVX2, libraries beside them.
# `make gpu-check` runs them there (scripts/gpu_check.sh), after building them where there is nvcc.
GPU_TREE := build/gpu-tree
gpu-build:
	@scripts/setup.sh $(PACKAGES) xz-utils
	@$(MAKE) --no-print-directory CUDA=1 ARCH=x86-64-v3 BUILD=$(GPU_TREE) CUDA_ARCHITECTURES="-gencode arch=compute_90a,code=sm_90a" \
	  $(addprefix $(GPU_TREE)/,device-tests model-device-tests lightmoe-bench lightmoe demo-generate_data)
	@scripts/gpu_pack.sh $(GPU_TREE) build/gpu $(VERSION)
gpu-check: $(if $(wildcard build/gpu/device-tests build/gpu.tar.xz),,gpu-build)
	@scripts/gpu_check.sh

clean:
	rm -rf build

-include $(shell find $(BUILD)/obj $(BUILD)/sim-race $(BUILD)/sim-asan -name '*.d' 2>/dev/null)
