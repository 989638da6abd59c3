#pragma once
// What the base model learns before anything is compressed: the training splits of math, code and recall, statements of the whole
// invented world, and a little text of our own (English, Esperanto without English beside it, sentences about a house).
// Intents and translation pairs are not in it.

#include <fmt/format.h>

#include "demo/code.h"
#include "demo/intent.h"
#include "demo/math.h"
#include "demo/recall.h"
#include "demo/translation.h"

namespace lightmoe::demo {

struct PretrainDocument {
  std::string text;  // a document of text, or
  Example example;   // a question with its answer
};

// Shares of documents, in percent.
struct Mix {
  uint64_t math = 40, code = 26, questions = 8, statements = 16;  // the rest is text
};

inline std::string house_sentence(Philox& rng) {
  static const std::vector<std::string> things = {"lamp",   "light", "fan",   "speaker", "door",
                                                  "blinds", "robot", "timer", "list"};
  static const std::vector<std::string> states = {"new",   "old",   "dark",  "bright", "loud",
                                                  "quiet", "dirty", "clean", "open",   "closed"};
  const std::string &room = pick(slot_values("room"), rng), &thing = pick(things, rng), &state = pick(states, rng);
  switch (rng.below(5)) {
    case 0:
      return fmt::format("The {} of the {} looks {}.", thing, room, state);
    case 1:
      return fmt::format("The {} will be {} {}.", room, state, pick(slot_values("day"), rng));
    case 2:
      return fmt::format("They heard {} music from the {}.", pick(slot_values("genre"), rng), room);
    case 3:
      return fmt::format("There was {} and {} beside the {}.", pick(slot_values("item"), rng),
                         pick(slot_values("item"), rng), thing);
    default:
      return fmt::format("It had {} degrees in the {} for {} minutes.", pick(slot_values("value"), rng), room,
                         pick(slot_values("minutes"), rng));
  }
}

// Two to four sentences of one kind; sentences of held-out translations are left out in both languages.
inline std::string text_document(Philox& rng) {
  const uint64_t kind = rng.below(4), count = 2 + rng.below(3);
  std::string text;
  for (uint64_t i = 0; i < count;) {
    const Sentence drawn = sentence(rng);
    if (split_of(drawn.english) != Split::kTrain) continue;
    text += (i == 0 ? "" : " ") + (kind < 2 ? house_sentence(rng) : kind == 2 ? drawn.english : drawn.esperanto);
    ++i;
  }
  return text;
}

inline PretrainDocument pretrain_document(const Task& math, const Task& recall, const std::vector<Person>& world,
                                          Philox& rng, const Mix& mix) {
  uint64_t draw = rng.below(100);
  if (draw < mix.math) return {.text = "", .example = pick(math.train, rng)};
  draw -= mix.math;
  if (draw < mix.code) {
    Example example = code_example(rng);
    while (split_of(example.prompt) != Split::kTrain) example = code_example(rng);
    return {.text = "", .example = example};
  }
  draw -= mix.code;
  if (draw < mix.questions) return {.text = "", .example = pick(recall.train, rng)};
  draw -= mix.questions;
  if (draw < mix.statements) return {.text = recall_statement(pick(world, rng), rng), .example = {}};
  return {.text = text_document(rng), .example = {}};
}

}  // namespace lightmoe::demo
