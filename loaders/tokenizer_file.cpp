#include "loaders/tokenizer_file.h"

#include <algorithm>
#include <initializer_list>
#include <unordered_set>

#include "loaders/json.h"
#include "runtime/error.h"

namespace lightmoe {
namespace {

constexpr int64_t kMaxId = int64_t{1} << 21;        // 2 M, ten times the largest vocabulary in use
constexpr size_t kMaxAddedBytes = size_t{4} << 20;  // contents of all added tokens together

// One JSON object of the file, with its place for messages. Unknown keys are refused at once.
class Section {
 public:
  Section(const Json& json, std::string where, std::initializer_list<const char*> keys)
      : json_(json), where_(std::move(where)) {
    check(json.is_object(), ErrorKind::kInput, "{}: is {}, expected an object", where_, json.type_name());
    for (const auto& [key, value] : json.items()) {
      const bool known = std::any_of(keys.begin(), keys.end(), [&key = key](const char* k) { return key == k; });
      check(known, ErrorKind::kInput, "{}: unknown key \"{}\"", where_, printable(key));
    }
  }
  const std::string& where() const { return where_; }
  std::string where(const char* key) const { return where_ + "." + key; }
  bool has(const char* key) const { return json_.contains(key) && !json_.at(key).is_null(); }
  const Json& at(const char* key) const {
    check(json_.contains(key), ErrorKind::kInput, "{}: missing", where(key));
    return json_.at(key);
  }
  bool flag(const char* key, bool fallback) const {
    if (!json_.contains(key)) return fallback;
    check(json_.at(key).is_boolean(), ErrorKind::kInput, "{}: is {}, expected true or false", where(key),
          json_.at(key).type_name());
    return json_.at(key).get<bool>();
  }
  std::string string(const char* key) const { return string_of(at(key), where(key)); }
  static std::string string_of(const Json& value, const std::string& where) {
    check(value.is_string(), ErrorKind::kInput, "{}: is {}, expected a string", where, value.type_name());
    return value.get<std::string>();
  }
  static const Json& array_of(const Json& value, const std::string& where) {
    check(value.is_array(), ErrorKind::kInput, "{}: is {}, expected an array", where, value.type_name());
    return value;
  }
  // An option this program has no code for: only the value that switches it off passes.
  void refuse_unless_off(const char* key) const {
    if (!has(key)) return;
    const Json& value = json_.at(key);
    const bool off = value == Json(false) || value == Json("") || (value.is_number() && value == Json(0));
    check(off, ErrorKind::kInput, "{}: {} is not supported", where(key), printable(value.dump(), 80));
  }

 private:
  const Json& json_;
  std::string where_;
};

std::string type_of(const Json& piece, const std::string& where) {
  check(piece.is_object() && piece.contains("type"), ErrorKind::kInput, "{}: expected an object with a \"type\"",
        where);
  return Section::string_of(piece.at("type"), where + ".type");
}

[[noreturn]] void unknown(const std::string& where, const std::string& type, const char* known) {
  fail(ErrorKind::kInput, "{}: type \"{}\" is not supported (known: {})", where, printable(type), known);
}

std::string at_index(const std::string& where, size_t i) { return fmt::format("{}[{}]", where, i); }

bool parse_nfc(const Json& json, const std::string& where) {
  if (json.is_null()) return false;
  const std::string type = type_of(json, where);
  if (type == "NFC") {
    const Section section(json, where, {"type"});
    return true;
  }
  if (type != "Sequence") unknown(where, type, "NFC, Sequence");
  const Section section(json, where, {"type", "normalizers"});
  bool nfc = false;
  const Json& parts = Section::array_of(section.at("normalizers"), section.where("normalizers"));
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parse_nfc(parts[i], at_index(section.where("normalizers"), i))) nfc = true;
  }
  return nfc;
}

SplitStep parse_regex_step(const Json& json, const std::string& where) {
  const Section section(json, where, {"type", "pattern", "behavior", "invert"});
  const Section pattern(section.at("pattern"), section.where("pattern"), {"Regex"});
  const std::string behavior = section.string("behavior");
  check(behavior == "Isolated", ErrorKind::kInput, "{}: \"{}\" is not supported (known: Isolated)",
        section.where("behavior"), printable(behavior));
  section.refuse_unless_off("invert");
  SplitStep step;
  step.kind = SplitStep::Kind::kRegex;
  step.pattern = pattern.string("Regex");
  return step;
}

void parse_steps(const Json& json, const std::string& where, std::vector<SplitStep>& steps) {
  check(!json.is_null(), ErrorKind::kInput, "{}: is null; only byte-level tokenizers are supported", where);
  const std::string type = type_of(json, where);
  check(steps.empty() || steps.back().kind != SplitStep::Kind::kByteLevel, ErrorKind::kInput,
        "{}: {} after ByteLevel is not supported", where, printable(type));
  SplitStep step;
  if (type == "ByteLevel") {
    const Section section(json, where, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
    step.use_regex = section.flag("use_regex", true);
    step.add_prefix_space = section.flag("add_prefix_space", true);
  } else if (type == "Digits") {
    const Section section(json, where, {"type", "individual_digits"});
    step.kind = SplitStep::Kind::kDigits;
    step.individual_digits = section.flag("individual_digits", false);
  } else if (type == "Split") {
    step = parse_regex_step(json, where);
  } else if (type == "Sequence") {
    const Section section(json, where, {"type", "pretokenizers"});
    const Json& parts = Section::array_of(section.at("pretokenizers"), section.where("pretokenizers"));
    for (size_t i = 0; i < parts.size(); ++i) parse_steps(parts[i], at_index(section.where("pretokenizers"), i), steps);
    return;
  } else {
    unknown(where, type, "ByteLevel, Split, Digits, Sequence");
  }
  steps.push_back(step);
}

// A post processor is accepted when it leaves the ids as they are.
void check_post_processor(const Json& json, const std::string& where) {
  if (json.is_null()) return;
  const std::string type = type_of(json, where);
  if (type == "ByteLevel") {
    const Section section(json, where, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
  } else if (type == "Sequence") {
    const Section section(json, where, {"type", "processors"});
    const Json& parts = Section::array_of(section.at("processors"), section.where("processors"));
    for (size_t i = 0; i < parts.size(); ++i) check_post_processor(parts[i], at_index(section.where("processors"), i));
  } else if (type == "TemplateProcessing") {
    const Section section(json, where, {"type", "single", "pair", "special_tokens"});
    const Json& single = Section::array_of(section.at("single"), section.where("single"));
    check(single.size() == 1 && single[0].is_object() && single[0].contains("Sequence"), ErrorKind::kInput,
          "{}: adds tokens to every text, which is not supported", section.where("single"));
  } else {
    unknown(where, type, "ByteLevel, TemplateProcessing without added tokens, Sequence");
  }
}

void check_decoder(const Json& json, const std::string& where) {
  check(!json.is_null(), ErrorKind::kInput, "{}: is null; only byte-level tokenizers are supported", where);
  const std::string type = type_of(json, where);
  if (type != "ByteLevel") unknown(where, type, "ByteLevel");
  const Section section(json, where, {"type", "add_prefix_space", "trim_offsets", "use_regex"});
}

int32_t parse_id(const Json& value, const std::string& where) {
  const bool in_range = value.is_number_integer() && value >= Json(0) && value < Json(kMaxId);
  check(in_range, ErrorKind::kInput, "{}: id {}, expected an integer from 0 to {}", where, printable(value.dump(), 40),
        kMaxId - 1);
  return value.get<int32_t>();
}

void place_token(TokenizerFile& file, int32_t id, const std::string& token, const std::string& where) {
  check(!token.empty(), ErrorKind::kInput, "{}: empty token", where);
  const auto i = static_cast<size_t>(id);
  if (file.tokens.size() <= i) file.tokens.resize(i + 1);
  check(file.tokens[i].empty(), ErrorKind::kInput, "{}: id {} belongs to \"{}\" and to \"{}\"", where, id,
        printable(file.tokens[i]), printable(token));
  file.tokens[i] = token;
}

std::pair<std::string, std::string> parse_merge(const Json& json, const std::string& where) {
  if (json.is_array()) {
    check(json.size() == 2, ErrorKind::kInput, "{}: {} parts, expected 2", where, json.size());
    return {Section::string_of(json[0], where), Section::string_of(json[1], where)};
  }
  const std::string text = Section::string_of(json, where);
  const size_t space = text.find(' ');
  check(space != std::string::npos && text.find(' ', space + 1) == std::string::npos, ErrorKind::kInput,
        "{}: \"{}\", expected two tokens and one space", where, printable(text));
  return {text.substr(0, space), text.substr(space + 1)};
}

void parse_model(const Json& json, const std::string& where, TokenizerFile& file) {
  const std::string type = type_of(json, where);
  if (type != "BPE") unknown(where, type, "BPE");
  const Section section(json, where,
                        {"type", "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                         "byte_fallback", "ignore_merges", "vocab", "merges"});
  for (const char* option : {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                             "byte_fallback", "ignore_merges"}) {
    section.refuse_unless_off(option);
  }
  const Json& vocab = section.at("vocab");
  check(vocab.is_object(), ErrorKind::kInput, "{}: is {}, expected an object", section.where("vocab"),
        vocab.type_name());
  for (const auto& [token, id] : vocab.items()) {
    const std::string place = section.where("vocab");
    place_token(file, parse_id(id, place + " \"" + printable(token, 40) + "\""), token, place);
  }
  const Json& merges = Section::array_of(section.at("merges"), section.where("merges"));
  file.merges.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    file.merges.push_back(parse_merge(merges[i], at_index(section.where("merges"), i)));
  }
}

void parse_added(const Json& json, const std::string& where, TokenizerFile& file) {
  std::unordered_set<std::string> seen, vocab(file.tokens.begin(), file.tokens.end());
  size_t bytes = 0;
  for (size_t i = 0; i < Section::array_of(json, where).size(); ++i) {
    const std::string place = at_index(where, i);
    const Section section(json[i], place,
                          {"id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"});
    AddedToken token;
    token.id = parse_id(section.at("id"), section.where("id"));
    token.content = section.string("content");
    token.special = section.flag("special", false);
    token.normalized = section.flag("normalized", !token.special);
    token.single_word = section.flag("single_word", false);
    token.lstrip = section.flag("lstrip", false);
    token.rstrip = section.flag("rstrip", false);
    check(seen.insert(token.content).second, ErrorKind::kInput, "{}: \"{}\" is added twice", place,
          printable(token.content));
    const auto id = static_cast<size_t>(token.id);
    if (vocab.count(token.content) != 0) {
      check(id < file.tokens.size() && file.tokens[id] == token.content, ErrorKind::kInput,
            "{}: \"{}\" has id {} here and another one in model.vocab", place, printable(token.content), token.id);
    } else {
      place_token(file, token.id, token.content, place);
    }
    bytes += token.content.size();
    check(bytes <= kMaxAddedBytes, ErrorKind::kInput, "{}: more than {} bytes of added tokens", place, kMaxAddedBytes);
    file.added.push_back(std::move(token));
  }
}

}  // namespace

TokenizerFile parse_tokenizer(const Json& json, const std::string& name) {
  const Section section(json, name + ": tokenizer",
                        {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
                         "post_processor", "decoder", "model"});
  const auto piece = [&](const char* key) -> const Json& {
    static const Json null;
    return json.contains(key) ? json.at(key) : null;
  };
  const auto where = [&](const char* key) { return name + ": " + key; };
  if (section.has("version")) {
    check(section.string("version") == "1.0", ErrorKind::kInput, "{}: \"{}\", expected \"1.0\"", where("version"),
          printable(section.string("version")));
  }
  for (const char* key : {"truncation", "padding"}) {
    check(!section.has(key), ErrorKind::kInput, "{}: is set, which is not supported; set it to null", where(key));
  }
  TokenizerFile file;
  file.name = name;
  file.nfc = parse_nfc(piece("normalizer"), where("normalizer"));
  parse_steps(piece("pre_tokenizer"), where("pre_tokenizer"), file.steps);
  check(!file.steps.empty() && file.steps.back().kind == SplitStep::Kind::kByteLevel, ErrorKind::kInput,
        "{}: has no ByteLevel at its end; only byte-level tokenizers are supported", where("pre_tokenizer"));
  check_post_processor(piece("post_processor"), where("post_processor"));
  check_decoder(piece("decoder"), where("decoder"));
  parse_model(section.at("model"), where("model"), file);
  if (section.has("added_tokens")) parse_added(section.at("added_tokens"), where("added_tokens"), file);
  return file;
}

}  // namespace lightmoe
