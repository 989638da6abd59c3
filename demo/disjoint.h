#pragma once
// All of the demo's data, and the proof that what is held out stays held out.

#include <unordered_set>

#include "demo/pretrain.h"
#include "runtime/error.h"

namespace lightmoe::demo {

inline constexpr size_t kPretrainDocuments = 120'000;
inline constexpr size_t kNumPeople = 200, kNumCode = 6000, kNumIntent = 2000, kNumTranslation = 3000;
inline constexpr size_t kMaxTest = 400, kMaxValidation = 200;

struct DemoData {
  std::vector<Task> tasks;
  std::vector<PretrainDocument> pretrain, pretrain_validation;
};

inline DemoData make_demo_data(uint64_t seed, size_t num_documents) {
  DemoData data;
  const auto [recall, choice] = recall_tasks(seed, kNumPeople);
  data.tasks = {math_task(seed), code_task(seed, kNumCode),     recall,
                choice,          intent_task(seed, kNumIntent), translation_task(seed, kNumTranslation)};
  for (Task& task : data.tasks) {
    keep_first(task.test, kMaxTest);
    keep_first(task.validation, kMaxValidation);
    require(task.train.size() >= 500 && task.validation.size() >= 40 && task.test.size() >= 100,
            "demo data: task {} has {} train, {} validation, {} test examples", task.name, task.train.size(),
            task.validation.size(), task.test.size());
  }
  PretrainSources sources{.math = data.tasks[0], .recall = recall, .world = people(seed, kNumPeople), .translated = {}};
  const Task& translation = data.tasks.back();
  for (const auto* split : {&translation.train, &translation.validation, &translation.test}) {
    for (const Example& e : *split) sources.translated.insert(english_of(e));
  }
  Philox rng(seed, kMix);
  for (size_t i = 0; i < num_documents; ++i) {
    data.pretrain.push_back(pretrain_document(sources, rng, {}));
  }
  // Held-out questions of the three tasks the base has to know, a part of each.
  for (size_t t = 0; t < 3; ++t) {
    for (size_t i = 0; i < 40; ++i)
      data.pretrain_validation.push_back({.text = "", .example = data.tasks[t].validation[i]});
  }
  return data;
}

// Throws Error(kInternal) naming the task and the text when a held-out prompt stands in a training split or in pretraining, a prompt
// twice in a task, or a sentence of the translation task, whichever split and language, in pretraining.
inline void check_disjoint(const DemoData& data) {
  std::unordered_set<std::string> pretrain;
  for (const PretrainDocument& d : data.pretrain) pretrain.insert(d.text.empty() ? d.example.prompt : d.text);
  for (const Task& task : data.tasks) {
    std::unordered_set<std::string> prompts;
    const auto insert = [&](const Example& e) {
      require(prompts.insert(e.prompt).second, "demo data: {} has the prompt '{}' twice", task.name, e.prompt);
    };
    for (const Example& e : task.train) insert(e);
    for (const auto* held_out : {&task.validation, &task.test}) {
      for (const Example& e : *held_out) {
        insert(e);
        require(pretrain.count(e.prompt) == 0, "demo data: '{}' of {} is in pretraining", e.prompt, task.name);
      }
    }
  }
  const Task& translation = data.tasks.back();
  std::unordered_set<std::string> unseen;
  for (const auto* split : {&translation.train, &translation.validation, &translation.test}) {
    for (const Example& e : *split) unseen.insert(english_of(e)), unseen.insert(e.completion.substr(1));
  }
  for (const PretrainDocument& d : data.pretrain) {
    const std::string text = d.text.empty() ? d.example.prompt : d.text;
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = text.find_first_of(".:\n", begin);
      const std::string piece = text.substr(begin, end == std::string::npos ? end : end + 1 - begin);
      require(unseen.count(piece) == 0, "demo data: a sentence of the translation task is in pretraining: {}", text);
      if (end == std::string::npos) break;
      begin = std::min(text.find_first_not_of(" \n", end + 1), text.size());
    }
  }
}

}  // namespace lightmoe::demo
