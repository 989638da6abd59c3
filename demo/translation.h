#pragma once
// English -> Esperanto by a small grammar of our own; Esperanto's regular endings make the reference exact:
// nouns -o, adjectives -a, plural -j, object -n, verbs -as (present) -is (past) -os (future), mal- for the opposite.
// The pairs are not in pretraining; a little text in either language alone is, as a low-resource language would be.

#include <fmt/format.h>

#include <set>

#include "demo/task.h"

namespace lightmoe::demo {

struct Noun {
  std::string one, many, root;
};
struct Adjective {
  std::string english, stem;
};
struct Verb {
  std::string base, third, past, root;
};
struct Sentence {
  std::string english, esperanto;
};

inline const std::vector<Noun>& nouns() {
  static const std::vector<Noun> list = {{"dog", "dogs", "hund"},           {"cat", "cats", "kat"},
                                         {"horse", "horses", "ĉeval"},      {"bird", "birds", "bird"},
                                         {"fish", "fishes", "fiŝ"},         {"friend", "friends", "amik"},
                                         {"boy", "boys", "knab"},           {"king", "kings", "reĝ"},
                                         {"doctor", "doctors", "kuracist"}, {"teacher", "teachers", "instruist"},
                                         {"house", "houses", "dom"},        {"book", "books", "libr"},
                                         {"flower", "flowers", "flor"},     {"tree", "trees", "arb"},
                                         {"ship", "ships", "ŝip"},          {"table", "tables", "tabl"},
                                         {"apple", "apples", "pom"},        {"letter", "letters", "leter"},
                                         {"lamp", "lamps", "lamp"},         {"window", "windows", "fenestr"}};
  return list;
}
inline const std::vector<Adjective>& adjectives() {
  static const std::vector<Adjective> list = {{"big", "granda"},  {"small", "malgranda"}, {"good", "bona"},
                                              {"bad", "malbona"}, {"new", "nova"},        {"old", "malnova"},
                                              {"warm", "varma"},  {"cold", "malvarma"},   {"red", "ruĝa"},
                                              {"green", "verda"}, {"happy", "feliĉa"},    {"beautiful", "bela"}};
  return list;
}
inline const std::vector<Verb>& verbs() {
  static const std::vector<Verb> list = {{"see", "sees", "saw", "vid"},
                                         {"love", "loves", "loved", "am"},
                                         {"have", "has", "had", "hav"},
                                         {"seek", "seeks", "sought", "serĉ"},
                                         {"buy", "buys", "bought", "aĉet"},
                                         {"find", "finds", "found", "trov"},
                                         {"hear", "hears", "heard", "aŭd"},
                                         {"draw", "draws", "drew", "desegn"},
                                         {"bring", "brings", "brought", "alport"},
                                         {"know", "knows", "knew", "kon"}};
  return list;
}

struct Phrase {
  std::string english, esperanto;
  bool third_person = true;  // the verb takes -s
};

// "the small dogs" / "la malgrandaj hundoj"; ending "n" for the object.
inline Phrase noun_phrase(Philox& rng, const std::string& object_ending) {
  const Noun& noun = pick(nouns(), rng);
  const bool plural = rng.below(3) == 0, definite = rng.below(2) == 0, described = rng.below(2) == 0;
  const std::string ending = (plural ? "j" : "") + object_ending;
  Phrase phrase{.english = definite ? "the " : "", .esperanto = definite ? "la " : "", .third_person = !plural};
  std::string article = "a ";
  if (described) {
    const Adjective& adjective = pick(adjectives(), rng);
    if (adjective.english[0] == 'o') article = "an ";
    if (!definite && !plural) phrase.english += article;
    phrase.english += adjective.english + " ";
    phrase.esperanto += adjective.stem + ending + " ";
  } else if (!definite && !plural) {
    phrase.english += noun.one[0] == 'a' ? "an " : "a ";
  }
  phrase.english += plural ? noun.many : noun.one;
  phrase.esperanto += noun.root + "o" + ending;
  return phrase;
}

inline Phrase subject(Philox& rng) {
  static const std::vector<Phrase> pronouns = {{"I", "mi", false},  {"you", "vi", false}, {"he", "li", true},
                                               {"she", "ŝi", true}, {"we", "ni", false},  {"they", "ili", false}};
  return rng.below(3) == 0 ? pick(pronouns, rng) : noun_phrase(rng, "");
}

// First letters are ASCII or one of the two accented ones the lexicon has.
inline std::string capitalised(std::string text) {
  static const std::vector<std::pair<std::string, std::string>> accented = {{"ĉ", "Ĉ"}, {"ŝ", "Ŝ"}};
  for (const auto& [small, large] : accented) {
    if (text.rfind(small, 0) == 0) return large + text.substr(small.size());
  }
  text[0] = static_cast<char>(text[0] >= 'a' && text[0] <= 'z' ? text[0] - 'a' + 'A' : text[0]);
  return text;
}

inline Sentence sentence(Philox& rng) {
  const Phrase who = subject(rng), what = noun_phrase(rng, "n");
  const Verb& verb = pick(verbs(), rng);
  const bool negated = rng.below(6) == 0;
  std::string english, esperanto = negated ? "ne " : "";
  switch (rng.below(3)) {
    case 0:
      english = negated            ? (who.third_person ? "does not " : "do not ") + verb.base
                : who.third_person ? verb.third
                                   : verb.base;
      esperanto += verb.root + "as";
      break;
    case 1:
      english = negated ? "did not " + verb.base : verb.past;
      esperanto += verb.root + "is";
      break;
    default:
      english = (negated ? "will not " : "will ") + verb.base;
      esperanto += verb.root + "os";
  }
  return {.english = capitalised(who.english + " " + english + " " + what.english + "."),
          .esperanto = capitalised(who.esperanto + " " + esperanto + " " + what.esperanto + ".")};
}

inline Task translation_task(uint64_t seed, size_t num_train) {
  Task task{.name = "translation"};
  Philox rng(seed, kTranslation);
  std::set<std::string> seen;
  while (task.train.size() < num_train) {
    const Sentence drawn = sentence(rng);
    if (!seen.insert(drawn.english).second) continue;
    task.of(split_of(drawn.english))
        .push_back({.prompt = "English: " + drawn.english + "\nEsperanto:", .completion = " " + drawn.esperanto});
  }
  return task;
}

}  // namespace lightmoe::demo
