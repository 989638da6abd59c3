#pragma once
// English -> Esperanto by a small grammar of our own; Esperanto's regular endings make the reference exact:
// nouns -o, adjectives -a, plural -j, object -n, verbs -as (present) -is (past) -os (future), mal- for the opposite.
// Pretraining has a little text in either language alone, as a low-resource language would have, and pairs of two kinds: with Novan, a
// language made up here (other roots and endings, the same order of words), and with Esperanto where every noun, adjective and verb is
// one of the first of its list. Every sentence of the task has a word whose translation was not in such a pair, and no sentence of
// the task occurs in pretraining, in any of the languages.

#include <fmt/core.h>

#include <set>

#include "demo/task.h"

namespace lightmoe::demo {

struct Noun {
  std::string one, many, root, novan;
};
struct Adjective {
  std::string english, stem, novan;
};
struct Verb {
  std::string base, third, past, root, novan;
};
struct Sentence {
  std::string english, esperanto, novan;
  bool known = true;  // pretraining may have it with its Esperanto
};
inline constexpr size_t kKnownNouns = 8, kKnownAdjectives = 4, kKnownVerbs = 4;

inline const std::vector<Noun>& nouns() {
  static const std::vector<Noun> list = {{"dog", "dogs", "hund", "tup"},
                                         {"cat", "cats", "kat", "gral"},
                                         {"horse", "horses", "ĉeval", "merd"},
                                         {"bird", "birds", "bird", "fosk"},
                                         {"fish", "fishes", "fiŝ", "lib"},
                                         {"friend", "friends", "amik", "narv"},
                                         {"boy", "boys", "knab", "jek"},
                                         {"king", "kings", "reĝ", "dolm"},
                                         {"doctor", "doctors", "kuracist", "sakr"},
                                         {"teacher", "teachers", "instruist", "wint"},
                                         {"house", "houses", "dom", "brof"},
                                         {"book", "books", "libr", "pagl"},
                                         {"flower", "flowers", "flor", "zild"},
                                         {"tree", "trees", "arb", "kust"},
                                         {"ship", "ships", "ŝip", "rond"},
                                         {"table", "tables", "tabl", "vab"},
                                         {"apple", "apples", "pom", "chol"},
                                         {"letter", "letters", "leter", "tirp"},
                                         {"lamp", "lamps", "lamp", "quon"},
                                         {"window", "windows", "fenestr", "hesk"}};
  return list;
}
inline const std::vector<Adjective>& adjectives() {
  static const std::vector<Adjective> list = {
      {"big", "granda", "gro"},  {"small", "malgranda", "pik"}, {"good", "bona", "vel"},
      {"bad", "malbona", "dus"}, {"new", "nova", "nak"},        {"old", "malnova", "tor"},
      {"warm", "varma", "bri"},  {"cold", "malvarma", "fes"},   {"red", "ruĝa", "lom"},
      {"green", "verda", "waz"}, {"happy", "feliĉa", "jup"},    {"beautiful", "bela", "sil"}};
  return list;
}
inline const std::vector<Verb>& verbs() {
  static const std::vector<Verb> list = {{"see", "sees", "saw", "vid", "mor"},
                                         {"love", "loves", "loved", "am", "tas"},
                                         {"have", "has", "had", "hav", "gul"},
                                         {"seek", "seeks", "sought", "serĉ", "nif"},
                                         {"buy", "buys", "bought", "aĉet", "peb"},
                                         {"find", "finds", "found", "trov", "zar"},
                                         {"hear", "hears", "heard", "aŭd", "kol"},
                                         {"draw", "draws", "drew", "desegn", "wud"},
                                         {"bring", "brings", "brought", "alport", "hin"},
                                         {"know", "knows", "knew", "kon", "bex"}};
  return list;
}

struct Phrase {
  std::string english, esperanto, novan;
  bool third_person = true;  // the verb takes -s
  bool known = true;
};

// "the small dogs" / "la malgrandaj hundoj" / "sa pikis tupes"; objects end in n, in Novan in um.
inline Phrase noun_phrase(Philox& rng, bool object) {
  const size_t n = rng.below(nouns().size());
  const Noun& noun = nouns()[n];
  const bool plural = rng.below(3) == 0, definite = rng.below(2) == 0, described = rng.below(2) == 0;
  const std::string ending = std::string(plural ? "j" : "") + (object ? "n" : "");
  const std::string novan_ending = std::string(plural ? "s" : "") + (object ? "um" : "");
  Phrase phrase{.english = definite ? "the " : "",
                .esperanto = definite ? "la " : "",
                .novan = definite ? "sa " : "",
                .third_person = !plural,
                .known = n < kKnownNouns};
  std::string article = "a ";
  if (described) {
    const size_t a = rng.below(adjectives().size());
    const Adjective& adjective = adjectives()[a];
    phrase.known = phrase.known && a < kKnownAdjectives;
    if (adjective.english[0] == 'o') article = "an ";
    if (!definite && !plural) phrase.english += article;
    phrase.english += adjective.english + " ";
    phrase.esperanto += adjective.stem + ending + " ";
    phrase.novan += adjective.novan + "i" + novan_ending + " ";
  } else if (!definite && !plural) {
    phrase.english += noun.one[0] == 'a' ? "an " : "a ";
  }
  phrase.english += plural ? noun.many : noun.one;
  phrase.esperanto += noun.root + "o" + ending;
  phrase.novan += noun.novan + "e" + novan_ending;
  return phrase;
}

inline Phrase subject(Philox& rng) {
  static const std::vector<Phrase> pronouns = {{"I", "mi", "jo", false},   {"you", "vi", "ty", false},
                                               {"he", "li", "ha", true},   {"she", "ŝi", "ho", true},
                                               {"we", "ni", "nur", false}, {"they", "ili", "zun", false}};
  return rng.below(3) == 0 ? pick(pronouns, rng) : noun_phrase(rng, false);
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
  const Phrase who = subject(rng), what = noun_phrase(rng, true);
  const size_t v = rng.below(verbs().size());
  const Verb& verb = verbs()[v];
  const bool negated = rng.below(6) == 0;
  std::string english, esperanto = negated ? "ne " : "", novan = negated ? "vok " : "";
  switch (rng.below(3)) {
    case 0:
      english = negated            ? (who.third_person ? "does not " : "do not ") + verb.base
                : who.third_person ? verb.third
                                   : verb.base;
      esperanto += verb.root + "as", novan += verb.novan + "at";
      break;
    case 1:
      english = negated ? "did not " + verb.base : verb.past;
      esperanto += verb.root + "is", novan += verb.novan + "ut";
      break;
    default:
      english = (negated ? "will not " : "will ") + verb.base;
      esperanto += verb.root + "os", novan += verb.novan + "ot";
  }
  return {.english = capitalised(who.english + " " + english + " " + what.english + "."),
          .esperanto = capitalised(who.esperanto + " " + esperanto + " " + what.esperanto + "."),
          .novan = capitalised(who.novan + " " + novan + " " + what.novan + "."),
          .known = who.known && what.known && v < kKnownVerbs};
}

// The English sentence of an example of the task.
inline std::string english_of(const Example& e) {
  const size_t begin = std::string("English: ").size();
  return e.prompt.substr(begin, e.prompt.find('\n') - begin);
}

inline Task translation_task(uint64_t seed, size_t num_train) {
  Task task{.name = "translation"};
  Philox rng(seed, kTranslation);
  std::set<std::string> seen;
  while (task.train.size() < num_train) {
    const Sentence drawn = sentence(rng);
    if (drawn.known || !seen.insert(drawn.english).second) continue;
    task.of(split_of(drawn.english))
        .push_back({.prompt = "English: " + drawn.english + "\nEsperanto:", .completion = " " + drawn.esperanto});
  }
  return task;
}

}  // namespace lightmoe::demo
