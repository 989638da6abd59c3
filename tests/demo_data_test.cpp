// The demo's generators: right answers (recomputed here by other means), held-out data really held out, the same data every time.
#include <gtest/gtest.h>

#include <cstdio>
#include <map>
#include <regex>
#include <sstream>

#include "demo/disjoint.h"

namespace lightmoe::demo {
namespace {

const DemoData& data() {
  static const DemoData d = make_demo_data(20260, 20'000);
  return d;
}
std::vector<Example> all_of(const Task& task) {
  std::vector<Example> all = task.train;
  all.insert(all.end(), task.validation.begin(), task.validation.end());
  all.insert(all.end(), task.test.begin(), task.test.end());
  return all;
}
const Task& task(const std::string& name) {
  for (const Task& t : data().tasks) {
    if (t.name == name) return t;
  }
  throw std::runtime_error("no task " + name);
}

TEST(DemoData, MathIsRight) {
  for (const Example& e : all_of(task("math"))) {
    int a = 0, b = 0;
    char sign = 0;
    ASSERT_EQ(std::sscanf(e.prompt.c_str(), "%2d%c%2d=", &a, &sign, &b), 3) << e.prompt;
    EXPECT_EQ(std::stoi(e.completion), sign == '+' ? a + b : a - b) << e.prompt;
    EXPECT_EQ(e.completion.size(), sign == '+' ? 3u : 2u);
  }
}

TEST(DemoData, CodeIsRight) {
  // Reads the digits of the list and the name of the operation, and looks for the answer by its defining property.
  for (const Example& e : all_of(task("code"))) {
    std::vector<int> list, answer;
    const size_t open = e.prompt.find('['), close = e.prompt.find(']');
    for (size_t i = open; i < close; ++i) {
      if (std::isdigit(e.prompt[i]) != 0) list.push_back(e.prompt[i] - '0');
    }
    const std::string rest = e.prompt.substr(close + 1);
    if (e.completion[0] == '[') {
      for (char c : e.completion) {
        if (std::isdigit(c) != 0) answer.push_back(c - '0');
      }
      ASSERT_EQ(answer.size(), list.size());
      if (rest.rfind("[::-1]", 0) == 0) {
        for (size_t i = 0; i < list.size(); ++i) EXPECT_EQ(answer[i], list[list.size() - 1 - i]) << e.prompt;
      } else {
        EXPECT_TRUE(std::is_sorted(answer.begin(), answer.end()) &&
                    std::is_permutation(answer.begin(), answer.end(), list.begin()))
            << e.prompt;
      }
      continue;
    }
    const int value = std::stoi(e.completion);
    int sum = 0, largest = 0, smallest = 9;
    for (int v : list) sum += v, largest = std::max(largest, v), smallest = std::min(smallest, v);
    const std::map<std::string, int> plain = {
        {"max", largest}, {"min", smallest}, {"sum", sum}, {"len", static_cast<int>(list.size())}};
    if (open == 8) {
      EXPECT_EQ(value, plain.at(e.prompt.substr(4, 3))) << e.prompt;
    } else {
      const int argument = rest[rest.find('(') + 1] - '0';
      int count = 0, first = -1;
      for (size_t i = list.size(); i-- > 0;) {
        if (list[i] == argument) ++count, first = static_cast<int>(i);
      }
      EXPECT_EQ(value, rest.rfind(".count", 0) == 0 ? count : first) << e.prompt;
    }
  }
}

TEST(DemoData, RecallAsksForStatedFacts) {
  std::map<std::string, std::string> facts;  // prompt -> answer
  for (const Example& e : all_of(task("recall"))) facts[e.prompt] = e.completion;
  for (const Example& e : all_of(task("recall_choice"))) {
    ASSERT_EQ(e.choices.size(), 4u);
    EXPECT_EQ(e.choices[static_cast<size_t>(e.answer)], facts.at(e.prompt));
    EXPECT_EQ(std::set<std::string>(e.choices.begin(), e.choices.end()).size(), 4u);
  }
  // Every held-out fact is told in pretraining, in some form that names the person and the value.
  std::map<std::string, std::string> told;  // person -> all that is said about them
  for (const Person& person : people(20260, kNumPeople)) told[person.name] = "";
  const DemoData full = make_demo_data(20260, kPretrainDocuments);
  check_disjoint(full);
  for (const PretrainDocument& d : full.pretrain) {
    for (size_t at = d.text.find(' '); at != std::string::npos; at = d.text.find(' ', at + 1)) {
      // A name is two words: look at every pair.
      const size_t begin = d.text.rfind(' ', at - 1) == std::string::npos ? 0 : d.text.rfind(' ', at - 1) + 1;
      size_t end = at + 1;
      while (end < d.text.size() && std::isalpha(d.text[end]) != 0) ++end;
      const auto found = told.find(d.text.substr(begin, end - begin));
      if (found != told.end()) found->second += " " + d.text;
    }
  }
  size_t missing = 0;
  for (const Example& e : task("recall").test) {
    for (const auto& [name, text] : told) {
      if (e.prompt.find(name) != std::string::npos && text.find(e.completion) == std::string::npos) ++missing;
    }
  }
  EXPECT_EQ(missing, 0u);
}

TEST(DemoData, EsperantoFollowsItsGrammar) {
  // Subject: no -n. Every noun ends in o, adjective in a, plus j and n; adjective and noun of a phrase agree.
  const std::regex form("^ ([^ ]+ )+([^ ]+)(as|is|os) (la )?(([^ ]+)a(j?)n )?([^ ]+)o(j?)n\\.$");
  for (const Example& e : all_of(task("translation"))) {
    std::smatch match;
    ASSERT_TRUE(std::regex_match(e.completion, match, form)) << e.completion;
    EXPECT_TRUE(!match[5].matched || match[7].str() == match[9].str()) << e.completion;
    const bool future = e.prompt.find(" will ") != std::string::npos;
    EXPECT_EQ(future, match[3].str() == "os") << e.prompt << e.completion;
    EXPECT_EQ(e.prompt.find(" not ") != std::string::npos, e.completion.find(" ne ") != std::string::npos)
        << e.prompt << e.completion;
  }
}

TEST(DemoData, PretrainingTranslatesKnownWordsOnly) {
  std::set<std::string> unknown;
  for (size_t i = kKnownNouns; i < nouns().size(); ++i) unknown.insert({nouns()[i].one, nouns()[i].many});
  for (size_t i = kKnownAdjectives; i < adjectives().size(); ++i) unknown.insert(adjectives()[i].english);
  for (size_t i = kKnownVerbs; i < verbs().size(); ++i) {
    unknown.insert({verbs()[i].base, verbs()[i].third, verbs()[i].past});
  }
  const auto has_unknown = [&](const std::string& english) {
    std::istringstream words(english.substr(0, english.size() - 1));
    for (std::string word; words >> word;) {
      if (unknown.count(word) != 0) return true;
      word[0] = static_cast<char>(std::tolower(word[0]));
      if (unknown.count(word) != 0) return true;
    }
    return false;
  };
  size_t pairs = 0;
  for (const PretrainDocument& d : data().pretrain) {
    const std::string& prompt = d.example.prompt;
    if (prompt.find("\nEsperanto:") == std::string::npos) continue;
    ++pairs;
    EXPECT_FALSE(has_unknown(english_of(d.example))) << prompt;
  }
  EXPECT_GT(pairs, 500u);
  for (const Example& e : all_of(task("translation"))) EXPECT_TRUE(has_unknown(english_of(e))) << e.prompt;
}

TEST(DemoData, IntentPatternsAndSlots) {
  for (const Example& e : all_of(task("intent"))) {
    // " NAME VALUE..." : every value stands in the utterance.
    ASSERT_EQ(e.completion[0], ' ');
    for (size_t at = e.completion.find(' ', 1); at != std::string::npos; at = e.completion.find(' ', at + 1)) {
      const size_t end = std::min(e.completion.find(' ', at + 1), e.completion.size());
      EXPECT_NE(e.prompt.find(e.completion.substr(at + 1, end - at - 1)), std::string::npos) << e.prompt;
    }
    EXPECT_GE(std::count(e.completion.begin(), e.completion.end(), ' '), 2);
  }
  // Pretraining knows other intents and other wordings.
  std::set<std::string> names, wordings;
  for (const Intent& intent : intents())
    names.insert(intent.name), wordings.insert(intent.wordings.begin(), intent.wordings.end());
  for (const Intent& command : commands()) {
    EXPECT_EQ(names.count(command.name), 0u) << command.name;
    for (const std::string& wording : command.wordings) EXPECT_EQ(wordings.count(wording), 0u) << wording;
  }
  for (const PretrainDocument& d : data().pretrain) {
    if (d.example.prompt.rfind("Say:", 0) != 0) continue;
    const std::string name = d.example.completion.substr(1, d.example.completion.find(' ', 1) - 1);
    ASSERT_EQ(names.count(name), 0u) << d.example.completion;
  }
}

TEST(DemoData, DisjointnessIsCheckedForReal) {
  EXPECT_NO_THROW(check_disjoint(data()));
  DemoData leaked = data();
  leaked.pretrain.push_back({.text = "", .example = leaked.tasks[1].test[7]});
  EXPECT_THROW(check_disjoint(leaked), Error);
  leaked = data();
  leaked.tasks[4].train.push_back(leaked.tasks[4].test[3]);
  EXPECT_THROW(check_disjoint(leaked), Error);
  // A sentence of the translation task, of either language and any split, in text or in a pair.
  const Example &held_out = data().tasks.back().test[0], &trained = data().tasks.back().train[0];
  for (const PretrainDocument& leak : std::vector<PretrainDocument>{
           {.text = "Li amas katon. " + held_out.completion.substr(1), .example = {}},
           {.text = "Esperanto: " + trained.completion.substr(1) + " Li amas katon.", .example = {}},
           {.text = "The lamp looks new. " + english_of(trained), .example = {}},
           {.text = "",
           .example = {.prompt = "English: " + english_of(held_out) + "\nNovan:", .completion = " Sa."}}}) {
    leaked = data();
    leaked.pretrain.push_back(leak);
    EXPECT_THROW(check_disjoint(leaked), Error) << leak.text << leak.example.prompt;
  }
}

TEST(DemoData, TheSameEveryTime) {
  std::string all;
  const DemoData again = make_demo_data(20260, 20'000);
  for (size_t t = 0; t < again.tasks.size(); ++t) {
    ASSERT_EQ(again.tasks[t].train.size(), data().tasks[t].train.size());
    for (size_t i = 0; i < again.tasks[t].train.size(); ++i) {
      ASSERT_EQ(again.tasks[t].train[i].prompt, data().tasks[t].train[i].prompt);
    }
    for (const Example& e : again.tasks[t].test) all += e.prompt + e.completion;
  }
  for (const PretrainDocument& d : again.pretrain) all += d.text + d.example.prompt + d.example.completion;
  // Committed results were made with these data: a change here asks for a new base model and new results.
  EXPECT_EQ(XXH3_64bits(all.data(), all.size()), 4960780045934472697u);
}

}  // namespace
}  // namespace lightmoe::demo
