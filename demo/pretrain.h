#pragma once
// What the base model learns before anything is compressed: the training splits of math, code and recall, statements of the whole
// invented world, commands of an office (demo/commands.h), translations into Novan and of a few words into Esperanto
// (demo/translation.h), and a little text of our own (English, Esperanto and Novan without a translation beside it, sentences about a
// house). The intents of the smart home and most words' Esperanto are not in it; the forms that they come in are.

#include <fmt/core.h>

#include <unordered_set>

#include "demo/code.h"
#include "demo/commands.h"
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
  uint64_t math = 40, code = 22, questions = 8, statements = 13, commands = 5, novan = 3,
           esperanto = 4;  // the rest is text
};

// What pretraining is made from. `translated`: the English of the translation task, all splits, left out here in every language.
struct PretrainSources {
  const Task& math;
  const Task& recall;
  std::vector<Person> world;
  std::unordered_set<std::string> translated;
};

inline std::string house_sentence(Philox& rng) {
  static const std::vector<std::string> things = {"lamp",   "light", "fan",   "speaker", "door",
                                                  "blinds", "robot", "timer", "list"};
  static const std::vector<std::string> states = {"new",   "old",   "dark",  "bright", "loud", "cool",
                                                  "quiet", "dirty", "clean", "open",   "hot",  "closed"};
  static const std::vector<std::string> others = {"lock", "unlock", "heat", "clean", "buy", "play", "cool"};
  static const std::vector<std::string> ups = {"on", "up"}, downs = {"off", "down"};
  // NOTE: every draw is a statement: compilers differ in the order of a call's arguments.
  const std::string &room = pick(slot_values("room"), rng), &thing = pick(things, rng), &state = pick(states, rng);
  switch (rng.below(8)) {
    case 0:
      return fmt::format("The {} of the {} looks {}.", thing, room, state);
    case 1:
      return fmt::format("The {} will be {} {}.", room, state, pick(slot_values("day"), rng));
    case 2:
      return fmt::format("They heard {} music from the {}.", pick(slot_values("genre"), rng), room);
    case 3: {
      const std::string &last = pick(slot_values("item"), rng), &first = pick(slot_values("item"), rng);
      return fmt::format("There was {} and {} beside the {}.", first, last, thing);
    }
    case 4: {
      const std::string &last = pick(others, rng), &first = pick(others, rng), &door = pick(slot_values("door"), rng);
      return fmt::format("Behind the {} door they {} and {}.", door, first, last);
    }
    case 5:
      return fmt::format("The {} weather was {} {}.", room, state, pick(slot_values("day"), rng));
    case 6: {
      const std::string &last = pick(downs, rng), &first = pick(ups, rng);
      return fmt::format("A {} goes {} and another goes {}.", thing, first, last);
    }
    default: {
      const std::string &minutes = pick(slot_values("minutes"), rng), &degrees = pick(slot_values("value"), rng);
      return fmt::format("It had {} degrees in the {} for {} minutes.", degrees, room, minutes);
    }
  }
}

inline Sentence other_sentence(Philox& rng, const std::unordered_set<std::string>& translated) {
  Sentence drawn = sentence(rng);
  while (translated.count(drawn.english) != 0) drawn = sentence(rng);
  return drawn;
}

// Two to four sentences of one kind; foreign ones are headed by the name of their language.
inline std::string text_document(Philox& rng, const std::unordered_set<std::string>& translated) {
  const uint64_t kind = rng.below(8), count = 2 + rng.below(3);
  std::string text = kind >= 4 ? "Esperanto:" : kind == 3 ? "Novan:" : "";
  for (uint64_t i = 0; i < count; ++i) {
    const Sentence drawn = other_sentence(rng, translated);
    if (!text.empty()) text += " ";
    text += kind < 2 ? house_sentence(rng) : kind == 2 ? drawn.english : kind == 3 ? drawn.novan : drawn.esperanto;
  }
  return text;
}

inline PretrainDocument pretrain_document(const PretrainSources& sources, Philox& rng, const Mix& mix) {
  uint64_t draw = rng.below(100);
  const auto is = [&draw](uint64_t share) {
    if (draw < share) return true;
    draw -= share;
    return false;
  };
  if (is(mix.math)) return {.text = "", .example = pick(sources.math.train, rng)};
  if (is(mix.code)) {
    Example example = code_example(rng);
    while (split_of(example.prompt) != Split::kTrain) example = code_example(rng);
    return {.text = "", .example = example};
  }
  if (is(mix.questions)) return {.text = "", .example = pick(sources.recall.train, rng)};
  if (is(mix.statements)) return {.text = recall_statement(pick(sources.world, rng), rng), .example = {}};
  if (is(mix.commands)) return {.text = "", .example = command_example(rng)};
  if (is(mix.novan)) {
    const Sentence drawn = other_sentence(rng, sources.translated);
    return {.text = "",
            .example = {.prompt = "English: " + drawn.english + "\nNovan:", .completion = " " + drawn.novan}};
  }
  if (is(mix.esperanto)) {
    Sentence drawn = sentence(rng);
    while (!drawn.known) drawn = sentence(rng);
    return {.text = "",
            .example = {.prompt = "English: " + drawn.english + "\nEsperanto:", .completion = " " + drawn.esperanto}};
  }
  return {.text = text_document(rng, sources.translated), .example = {}};
}

}  // namespace lightmoe::demo
