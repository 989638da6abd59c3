#pragma once
// Commands of an office and of a town in the form of demo/intent.h: what the base model has learned about such requests before it
// meets the smart home. No intent, wording or opening is shared; some of the things named are.

#include "demo/intent.h"
#include "demo/recall.h"

namespace lightmoe::demo {

inline const std::vector<std::string>& command_values(const std::string& slot) {
  static const std::vector<std::string> people = {"Ada",  "Boris", "Clara", "David", "Elena", "Felix", "Greta",
                                                  "Hugo", "Irma",  "Jonas", "Karla", "Leon",  "Mira",  "Nils"};
  static const std::vector<std::string> hours = {"7", "8", "9", "10", "11", "12", "13", "14", "15", "16", "17", "18"};
  return slot == "person"   ? people
         : slot == "hour"   ? hours
         : slot == "town"   ? attributes()[0].values
         : slot == "music"  ? attributes()[2].values
         : slot == "animal" ? attributes()[3].values
         : slot == "food"   ? attributes()[4].values
         : slot == "colour" ? attributes()[5].values
                            : slot_values(slot);
}

inline const std::vector<Intent>& commands() {
  static const std::vector<Intent> list = {
      {"call_up", {"person"}, {"call {0}", "ring {0} up", "get {0} on the phone", "i have to speak with {0}"}},
      {"write", {"person", "day"}, {"write to {0} about {1}", "send {0} a letter {1}", "{0} wants a letter {1}"}},
      {"meet",
       {"person", "hour"},
       {"meet {0} at {1}", "at {1} comes {0}", "i see {0} at {1} sharp", "we sit down with {0} at {1}"}},
      {"ride",
       {"town", "day"},
       {"i ride to {0} {1}", "bring me to {0} {1}", "find the way to {0} for {1}", "{1} we go to {0}"}},
      {"sleep_in", {"town"}, {"find me a bed in {0}", "where can one sleep in {0}", "the night is long in {0}"}},
      {"paint",
       {"room", "colour"},
       {"paint the {0} {1}", "the walls of the {0} become {1}", "i like the {0} more in {1}", "{1} suits the {0}"}},
      {"measure_up",
       {"room"},
       {"how long is the {0}", "how many steps across the {0}", "find out the size of the {0}"}},
      {"sell_off", {"item", "day"}, {"sell all the {0} {1}", "get rid of the {0} by {1}", "{1} the {0} must go"}},
      {"learn",
       {"music", "genre"},
       {"teach me {1} with the {0}", "how does one learn {1} on a {0}", "show me the {0} for {1}"}},
      {"feed", {"animal"}, {"feed the {0}", "the {0} is hungry", "what does a {0} get today"}},
      {"cook",
       {"food", "minutes"},
       {"cook the {0} {1} minutes", "let the {0} stand on the fire for {1} minutes",
        "after {1} minutes the {0} is done"}},
      {"guard", {"door"}, {"watch the {0} door", "who stands by the {0} door", "keep an eye on the {0} door"}},
      {"measure_down", {"value"}, {"note {0} degrees", "the glass says {0} degrees", "write down {0} as the heat"}}};
  return list;
}

inline Example command_example(Philox& rng) {
  static const std::vector<std::string> starts = {"", "would you ", "my dear, ", "quick, ", "tell them: ", "so "};
  static const std::vector<std::string> ends = {"", " soon", " if you can", " they said", " again", " as always"};
  const Intent& command = pick(commands(), rng);
  std::vector<std::string> values;
  std::string answer = " " + command.name;
  for (const std::string& slot : command.slots) {
    values.push_back(pick(command_values(slot), rng));
    answer += " " + values.back();
  }
  const std::string core = fmt::format(fmt::runtime(pick(command.wordings, rng)), values[0], values.back());
  const std::string &end = pick(ends, rng), &start = pick(starts, rng);
  return {.prompt = "Say: " + start + core + end + "\nIntent:", .completion = answer};
}

}  // namespace lightmoe::demo
