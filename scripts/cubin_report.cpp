// What nvcc made of kernels, one line for each kernel and architecture: registers, static shared memory, stack, and which of the
// instructions that matter here its machine code holds. Used by scripts/check_ptxas.sh.
//   cubin_report SOURCE.cu PTXAS_LOG CUBIN...      the log of `nvcc -Xptxas -v`, and the NAME.compute_XX.cubin that --keep left
// No disassembler is needed: an instruction of sm_80 and sm_90 has 16 bytes, the low 12 bits of which are its opcode. The table was read
// off NVIDIA's nvdisasm 12.4 on kernels of this project (126 counts in 6 cubins, none different).

#include <cxxabi.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace {

struct Instruction {
  const char* name;
  std::vector<unsigned> opcodes;
};
const std::vector<Instruction> kInstructions = {
    {"HGMMA", {0x9f0, 0xdf0}},                // wgmma
    {"UTMALDG", {0x5b4}},                     // TMA load
    {"SYNCS", {0x5b2, 0x5a7, 0x9a7, 0x3b2}},  // mbarrier
    {"USETMAXREG", {0x9c8}},                  // setmaxnreg
    {"HMMA", {0x23c}},                        // mma.sync
    {"LDSM", {0x83b}},                        // ldmatrix
    {"LDGSTS", {0xfae}},                      // cp.async
    {"LDL", {0x983}},
    {"STL", {0x387, 0x987}},  // local memory: spills, or arrays that are indexed at run time
};

struct Kernel {
  std::string architecture, registers = "?", shared = "0", stack = "0";
  std::set<std::string> instructions;
};
using Kernels = std::map<std::pair<std::string, std::string>, Kernel>;  // mangled name, sm_XX

[[noreturn]] void stop(const std::string& message) {
  std::fprintf(stderr, "cubin_report: %s\n", message.c_str());
  std::exit(1);
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) stop("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

template <class T>
T at(const std::string& bytes, size_t offset) {
  T value;
  if (offset + sizeof value > bytes.size()) stop("a cubin ends early");
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

// Calls f(name, offset, size) for every section of a 64-bit ELF file.
template <class F>
void for_each_section(const std::string& elf, F&& f) {
  if (elf.size() < 64 ||
      elf.compare(0, 4,
                  "\x7f"
                  "ELF") != 0 ||
      elf[4] != 2)
    stop("not a 64-bit ELF file");
  const auto table = at<uint64_t>(elf, 40);
  const size_t size = at<uint16_t>(elf, 58), count = at<uint16_t>(elf, 60), names = at<uint16_t>(elf, 62);
  const auto offset_of = [&](size_t i) { return at<uint64_t>(elf, table + i * size + 24); };
  for (size_t i = 0; i < count; ++i) {
    const char* name = elf.c_str() + offset_of(names) + at<uint32_t>(elf, table + i * size);
    f(std::string(name), offset_of(i), at<uint64_t>(elf, table + i * size + 32));
  }
}

std::string after(const std::string& line, const std::string& key, const char* end) {
  const size_t begin = line.find(key);
  if (begin == std::string::npos) return "";
  return line.substr(begin + key.size(), line.find_first_of(end, begin + key.size()) - begin - key.size());
}

void read_log(const std::string& log, Kernels& kernels) {
  std::istringstream text(log);
  Kernel* current = nullptr;
  for (std::string line; std::getline(text, line);) {
    const std::string name = after(line, "Compiling entry function '", "'");
    if (!name.empty()) {
      const std::string architecture = after(line, "' for '", "'");
      current = &kernels[{name, architecture}];
      current->architecture = architecture;
    }
    if (current == nullptr) continue;
    const size_t stack = line.find(" bytes stack frame");
    if (stack != std::string::npos)
      current->stack = line.substr(line.find_first_not_of(' '), stack - line.find_first_not_of(' '));
    const std::string registers = after(line, "Used ", " ");
    if (registers.empty()) continue;
    current->registers = registers;
    const size_t shared = line.find(" bytes smem");
    if (shared != std::string::npos) {
      const size_t begin = line.rfind(' ', shared - 1) + 1;
      current->shared = line.substr(begin, shared - begin);
    }
    current = nullptr;
  }
}

void read_cubin(const std::string& path, const std::string& architecture, Kernels& kernels) {
  const std::string elf = read_file(path);
  for_each_section(elf, [&](const std::string& section, size_t offset, size_t size) {
    if (section.rfind(".text.", 0) != 0) return;
    const auto kernel = kernels.find({section.substr(6), architecture});
    if (kernel == kernels.end()) stop(path + ": " + section + " is not in the log");
    std::set<unsigned> present;
    for (size_t i = 0; i < size; i += 16) present.insert(at<uint64_t>(elf, offset + i) & 0xfff);
    for (const Instruction& instruction : kInstructions) {
      const auto& codes = instruction.opcodes;
      if (std::any_of(codes.begin(), codes.end(), [&](unsigned code) { return present.count(code) > 0; })) {
        kernel->second.instructions.insert(instruction.name);
      }
    }
  });
}

// "router_kernel<float, bf16>" for _ZN8lightmoe4cuda...; without the parameters, whose types follow from the template's arguments.
std::string short_name(const std::string& mangled) {
  int status = 0;
  char* demangled = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string name = status == 0 ? demangled : mangled;
  std::free(demangled);
  for (const char* noise : {"void ", "lightmoe::cuda::", "(anonymous namespace)::", "lightmoe::", "(bool)", "(int)"}) {
    for (size_t found; (found = name.find(noise)) != std::string::npos;) name.erase(found, std::strlen(noise));
  }
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += name[i] == '<' ? 1 : name[i] == '>' ? -1 : 0;
    if (name[i] == '(' && depth == 0) return name.substr(0, i);
  }
  return name;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) stop("usage: cubin_report SOURCE.cu PTXAS_LOG CUBIN...");
  Kernels kernels;
  read_log(read_file(argv[2]), kernels);
  for (int i = 3; i < argc; ++i) {
    const std::string path = argv[i];
    const std::string architecture = after(path, ".compute_", ".");
    if (architecture.empty()) stop(path + ": no .compute_XX. in the name");
    read_cubin(path, "sm_" + architecture, kernels);
  }
  std::set<std::string> lines;
  bool local = false;
  for (const auto& [key, kernel] : kernels) {
    std::string line = std::string(argv[1]) + "  " + short_name(key.first) + "  " + kernel.architecture + "  " +
                       kernel.registers + " registers";
    if (kernel.shared != "0") line += ", " + kernel.shared + " bytes static shared memory";
    if (kernel.stack != "0") line += ", " + kernel.stack + " bytes of stack";
    for (const Instruction& instruction : kInstructions) {
      if (kernel.instructions.count(instruction.name) > 0) line += std::string("  ") + instruction.name;
    }
    if (kernel.instructions.count("LDL") + kernel.instructions.count("STL") > 0) {
      std::fprintf(stderr, "local memory is used: %s\n", line.c_str());
      local = true;
    }
    if (!lines.insert(line).second) stop("two kernels have one line: " + line);
  }
  for (const std::string& line : lines) std::printf("%s\n", line.c_str());
  return local ? 1 : 0;
}
