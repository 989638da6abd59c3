// Writes the demo's data: demo-generate_data DIRECTORY [--documents N]. The same files, byte for byte, wherever it runs.
//   DIRECTORY/TASK/{train,validation,test}.jsonl   math code recall recall_choice intent translation
//   DIRECTORY/pretrain.jsonl, pretrain_validation.jsonl
// Before anything is written, no held-out prompt may occur in training or pretraining data (check_disjoint).

#include <cstdio>
#include <filesystem>
#include <string>

#include "demo/disjoint.h"
#include "demo/pretrain.h"
#include "loaders/json.h"
#include "loaders/output.h"
#include "runtime/error.h"

namespace lightmoe::demo {
namespace {

constexpr uint64_t kSeed = 20260;

std::string to_jsonl(const std::vector<Example>& examples) {
  std::string text;
  for (const Example& e : examples) {
    Json line = {{"prompt", e.prompt}};
    if (e.choices.empty()) {
      line["completion"] = e.completion;
    } else {
      line["choices"] = e.choices;
      line["answer"] = e.answer;
    }
    text += line.dump() + "\n";
  }
  return text;
}

std::string to_jsonl(const std::vector<PretrainDocument>& documents) {
  std::string text;
  for (const PretrainDocument& d : documents) {
    text += d.text.empty() ? to_jsonl(std::vector<Example>{d.example}) : Json{{"text", d.text}}.dump() + "\n";
  }
  return text;
}

void write_task(const std::filesystem::path& directory, const Task& task) {
  std::filesystem::create_directories(directory / task.name);
  write_file_atomically(directory / task.name / "train.jsonl", to_jsonl(task.train));
  write_file_atomically(directory / task.name / "validation.jsonl", to_jsonl(task.validation));
  write_file_atomically(directory / task.name / "test.jsonl", to_jsonl(task.test));
  fmt::print("{:<14} train {:>6}  validation {:>4}  test {:>4}\n", task.name, task.train.size(), task.validation.size(),
             task.test.size());
}

void generate(const std::filesystem::path& directory, size_t num_documents) {
  const DemoData data = make_demo_data(kSeed, num_documents);
  check_disjoint(data);
  std::filesystem::create_directories(directory);
  for (const Task& task : data.tasks) write_task(directory, task);
  write_file_atomically(directory / "pretrain.jsonl", to_jsonl(data.pretrain));
  write_file_atomically(directory / "pretrain_validation.jsonl", to_jsonl(data.pretrain_validation));
  fmt::print("{:<14} train {:>6}  validation {:>4}\n", "pretrain", data.pretrain.size(),
             data.pretrain_validation.size());
}

}  // namespace
}  // namespace lightmoe::demo

int main(int argc, char** argv) {
  try {
    const std::vector<std::string> arguments(argv + 1, argv + argc);
    const bool counted = arguments.size() == 3 && arguments[1] == "--documents";
    lightmoe::check(arguments.size() == 1 || counted, lightmoe::ErrorKind::kUsage,
                    "usage: demo-generate_data DIRECTORY [--documents N]");
    lightmoe::demo::generate(arguments[0], counted ? std::stoul(arguments[2]) : lightmoe::demo::kPretrainDocuments);
    return 0;
  } catch (const lightmoe::Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return error.exit_code();
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
}
