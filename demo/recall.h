#pragma once
// A small invented world: people and six facts about each. Pretraining tells every fact as statements, and asks questions about the
// training facts only; validation and test ask about the others, freely and as multiple choice. So the test needs the fact from
// memory and the habit of answering from elsewhere.

#include <fmt/format.h>

#include <set>

#include "demo/task.h"

namespace lightmoe::demo {

struct Attribute {
  std::string question;                 // "{}" is the person
  std::vector<std::string> statements;  // first {} the person, second {} the value
  std::string card;                     // key in the person's card
  std::vector<std::string> values;
};

inline const std::vector<Attribute>& attributes() {
  static const std::vector<Attribute> list = {
      {"Where does {} live?",
       {"{} lives in {}.", "The home of {} is in {}.", "If you look for {}, go to {}."},
       "town",
       {"Abrel", "Bordun", "Cavat", "Dremor", "Eskal", "Fintor", "Galsen", "Horvik", "Istral", "Jember", "Kolvar",
        "Lunfer", "Marnok", "Nelvin", "Ostrim", "Pardel"}},
      {"What is the job of {}?",
       {"{} works as a {}.", "The job of {} is {}.", "By day {} is a {}."},
       "job",
       {"baker", "builder", "dentist", "farmer", "fisher", "judge", "lawyer", "miller", "nurse", "painter", "pilot",
        "potter", "sailor", "tailor", "teacher", "writer"}},
      {"What does {} play?",
       {"{} plays the {}.", "In the evening {} takes out the {}.", "The band of {} needs a {}."},
       "music",
       {"banjo", "bassoon", "cello", "drum", "fiddle", "flute", "guitar", "harp", "horn", "lute", "organ", "piano",
        "trumpet", "tuba", "viola", "whistle"}},
      {"Which animal does {} keep?",
       {"{} keeps a {}.", "The pet of {} is a {}.", "In the garden of {} you find a {}."},
       "animal",
       {"badger", "beaver", "canary", "donkey", "falcon", "ferret", "goose", "hamster", "lizard", "monkey", "parrot",
        "pony", "rabbit", "raven", "spider", "turtle"}},
      {"What does {} eat?",
       {"{} eats {} every day.", "For lunch {} has {}.", "The table of {} is full of {}."},
       "food",
       {"beans", "bread", "cabbage", "cheese", "cherries", "honey", "lentils", "melons", "noodles", "olives", "pasta",
        "pears", "plums", "rice", "soup", "walnuts"}},
      {"Which colour does {} wear?",
       {"{} wears {}.", "The coat of {} is {}.", "You know {} by the colour {}."},
       "colour",
       {"amber", "black", "blue", "brown", "crimson", "gold", "green", "grey", "ivory", "olive", "orange", "pink",
        "purple", "silver", "violet", "white"}}};
  return list;
}

struct Person {
  std::string name;
  std::vector<size_t> values;  // index into each attribute's values
};

inline std::vector<Person> people(uint64_t seed, size_t count) {
  static const std::vector<std::string> first = {"Ada",  "Boris", "Clara", "David", "Elena", "Felix", "Greta",
                                                 "Hugo", "Irma",  "Jonas", "Karla", "Leon",  "Mira",  "Nils",
                                                 "Olga", "Pavel", "Rosa",  "Simon", "Tilda", "Viktor"};
  static const std::vector<std::string> last = {"Arlow",  "Brenn",  "Corrin", "Dask",   "Ellmer", "Frost", "Gand",
                                                "Hollis", "Jarrow", "Kemp",   "Lindal", "Morrow", "Nash",  "Orlen",
                                                "Pryce",  "Quill",  "Rusk",   "Sorrel", "Thorne", "Varga"};
  std::vector<std::string> names;
  for (const auto& f : first) {
    for (const auto& l : last) names.push_back(f + " " + l);
  }
  Philox rng(seed, kRecall);
  shuffle(names, rng);
  std::vector<Person> all;
  for (size_t i = 0; i < count && i < names.size(); ++i) {
    Person person{.name = names[i], .values = {}};
    for (const Attribute& attribute : attributes()) person.values.push_back(rng.below(attribute.values.size()));
    all.push_back(std::move(person));
  }
  return all;
}

inline Example recall_question(const Person& person, size_t a) {
  const Attribute& attribute = attributes()[a];
  return {.prompt = "Question: " + fmt::format(fmt::runtime(attribute.question), person.name) + "\nAnswer:",
          .completion = " " + attribute.values[person.values[a]]};
}

// The same questions with four choices, the right one at a random place.
inline Example recall_choice(const Person& person, size_t a, Philox& rng) {
  Example example = recall_question(person, a);
  const std::vector<std::string>& values = attributes()[a].values;
  std::set<size_t> used = {person.values[a]};
  example.answer = static_cast<int64_t>(rng.below(4));
  for (int64_t c = 0; c < 4; ++c) {
    size_t value = person.values[a];
    while (c != example.answer && !used.insert(value = rng.below(values.size())).second) {
    }
    example.choices.push_back(" " + values[value]);
  }
  return example;
}

// {open questions, multiple choice}: the same facts in the same splits.
inline std::pair<Task, Task> recall_tasks(uint64_t seed, size_t num_people) {
  Task open{.name = "recall"}, choice{.name = "recall_choice"};
  Philox rng(seed, kRecall + 100);
  for (const Person& person : people(seed, num_people)) {
    for (size_t a = 0; a < attributes().size(); ++a) {
      const Example example = recall_question(person, a);
      const Split split = split_of(example.prompt);
      open.of(split).push_back(example);
      choice.of(split).push_back(recall_choice(person, a, rng));
    }
  }
  Philox order(seed, kRecall + 200);
  for (Split split : {Split::kTrain, Split::kValidation, Split::kTest}) {
    shuffle(open.of(split), order), shuffle(choice.of(split), order);
  }
  return {open, choice};
}

// One document: a fact in one of its forms, or a person's card with all facts in random order.
inline std::string recall_statement(const Person& person, Philox& rng) {
  const size_t form = rng.below(4);
  if (form < 3) {
    const size_t a = rng.below(attributes().size());
    return fmt::format(fmt::runtime(attributes()[a].statements[form]), person.name,
                       attributes()[a].values[person.values[a]]);
  }
  std::vector<size_t> order(attributes().size());
  for (size_t a = 0; a < order.size(); ++a) order[a] = a;
  shuffle(order, rng);
  std::string card = person.name + ":";
  for (size_t a : order) card += fmt::format(" {} {};", attributes()[a].card, attributes()[a].values[person.values[a]]);
  return card;
}

}  // namespace lightmoe::demo
