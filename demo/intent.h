#pragma once
// Smart home: an utterance -> the intent and its slots, "heat kitchen 21". Not in pretraining, which knows other commands in the same
// form (demo/commands.h). The split is by pattern (intent, wording, opening, ending): a test utterance's pattern is never seen in training, with any slots.

#include <fmt/format.h>

#include <set>

#include "demo/task.h"

namespace lightmoe::demo {

struct Intent {
  std::string name;
  std::vector<std::string> slots;     // names, filled in this order
  std::vector<std::string> wordings;  // "{0}" is the first slot's value
};

inline const std::vector<std::string>& slot_values(const std::string& slot) {
  static const std::vector<std::string> rooms = {"kitchen", "bedroom", "bathroom", "hall",   "study",
                                                 "cellar",  "attic",   "garage",   "garden", "nursery"};
  static const std::vector<std::string> doors = {"front", "back", "side", "garage", "garden", "cellar"};
  static const std::vector<std::string> genres = {"jazz", "rock", "opera", "folk", "disco", "blues", "soul", "techno"};
  static const std::vector<std::string> items = {"milk",   "bread", "rice",   "soap", "tea",
                                                 "butter", "salt",  "apples", "eggs"};
  static const std::vector<std::string> days = {"today", "tonight", "tomorrow", "monday", "friday", "sunday"};
  static const std::vector<std::string> degrees = {"16", "17", "18", "19", "20", "21", "22", "23", "24", "25"};
  static const std::vector<std::string> minutes = {"3", "5", "8", "10", "12", "15", "20", "30", "45", "60"};
  return slot == "room"    ? rooms
         : slot == "door"  ? doors
         : slot == "genre" ? genres
         : slot == "item"  ? items
         : slot == "day"   ? days
         : slot == "value" ? degrees
                           : minutes;
}

inline const std::vector<Intent>& intents() {
  static const std::vector<Intent> list = {
      {"light_on",
       {"room"},
       {"turn on the light in the {0}", "switch the {0} lamp on", "give me some light in the {0}",
        "it is too dark in the {0}", "light up the {0}"}},
      {"light_off",
       {"room"},
       {"turn off the light in the {0}", "switch the {0} lamp off", "it is too bright in the {0}", "make the {0} dark",
        "nobody needs light in the {0}"}},
      {"heat",
       {"room", "value"},
       {"set the {0} to {1} degrees", "make it {1} degrees in the {0}", "heat the {0} to {1}",
        "i want {1} degrees in the {0}", "warm the {0} up to {1} degrees"}},
      {"cool",
       {"room"},
       {"cool down the {0}", "it is too hot in the {0}", "turn on the fan in the {0}", "i need fresh air in the {0}",
        "start the {0} fan"}},
      {"play",
       {"genre", "room"},
       {"play {0} in the {1}", "put on some {0} in the {1}", "i would like to hear {0} in the {1}",
        "let the {1} speaker play {0}", "fill the {1} with {0}"}},
      {"quiet",
       {"room"},
       {"stop the music in the {0}", "make the {0} quiet", "it is too loud in the {0}", "turn off the {0} speaker",
        "no more music in the {0}"}},
      {"lock",
       {"door"},
       {"lock the {0} door", "make sure the {0} door is locked", "nobody should come in by the {0} door",
        "secure the {0} door", "put the bolt on the {0} door"}},
      {"unlock",
       {"door"},
       {"unlock the {0} door", "let me in by the {0} door", "somebody waits at the {0} door", "open up the {0} door",
        "take the bolt off the {0} door"}},
      {"blinds_up",
       {"room"},
       {"open the blinds in the {0}", "raise the {0} blinds", "let the sun into the {0}",
        "pull up the blinds in the {0}", "i want to look out of the {0}"}},
      {"blinds_down",
       {"room"},
       {"close the blinds in the {0}", "lower the {0} blinds", "keep the sun out of the {0}",
        "let down the blinds in the {0}", "nobody should look into the {0}"}},
      {"timer",
       {"minutes"},
       {"set a timer for {0} minutes", "tell me when {0} minutes are over", "wake me in {0} minutes",
        "count down {0} minutes", "i have {0} minutes left"}},
      {"buy",
       {"item"},
       {"put {0} on the list", "we are out of {0}", "we need more {0}", "buy {0}", "there is no {0} left"}},
      {"weather",
       {"day"},
       {"what is the weather like {0}", "will it rain {0}", "do i need a coat {0}", "is it cold {0}",
        "tell me about the sky {0}"}},
      {"clean",
       {"room"},
       {"clean the {0}", "the {0} is dirty", "send the robot to the {0}", "sweep the floor of the {0}",
        "there is dust in the {0}"}}};
  return list;
}

inline const std::vector<std::string>& openings() {
  static const std::vector<std::string> list = {"",     "please ",      "hey house, ", "listen, ",
                                                "ok, ", "dear house, ", "well, ",      "now "};
  return list;
}
inline const std::vector<std::string>& endings() {
  static const std::vector<std::string> list = {"", " please", " thanks", " for me", " right away", " my friend"};
  return list;
}

struct IntentExample {
  Example example;
  Split split;
};
inline IntentExample intent_example(Philox& rng) {
  const Intent& intent = pick(intents(), rng);
  const size_t wording = rng.below(intent.wordings.size());
  const std::string &opening = pick(openings(), rng), &ending = pick(endings(), rng);
  std::vector<std::string> values;
  std::string answer = " " + intent.name;
  for (const std::string& slot : intent.slots) {
    values.push_back(pick(slot_values(slot), rng));
    answer += " " + values.back();
  }
  const std::string core = fmt::format(fmt::runtime(intent.wordings[wording]), values[0], values.back());
  return {.example = {.prompt = "Say: " + opening + core + ending + "\nIntent:", .completion = answer},
          .split = split_of(fmt::format("{}/{}/{}/{}", intent.name, wording, opening, ending))};
}

inline Task intent_task(uint64_t seed, size_t num_train) {
  Task task{.name = "intent"};
  Philox rng(seed, kIntent);
  std::set<std::string> seen;
  while (task.train.size() < num_train) {
    const IntentExample drawn = intent_example(rng);
    if (seen.insert(drawn.example.prompt).second) task.of(drawn.split).push_back(drawn.example);
  }
  return task;
}

}  // namespace lightmoe::demo
