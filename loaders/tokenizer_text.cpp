#include "loaders/tokenizer_text.h"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <vector>

#include "runtime/error.h"

namespace lightmoe::text {
namespace {

struct Sequence {
  size_t length;  // bytes of the sequence, or of its maximal ill-formed subpart
  bool valid;
};

// Unicode 15, table 3-7 (well-formed UTF-8 byte sequences).
Sequence sequence_at(std::string_view bytes, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t lead = byte(at);
  if (lead < 0x80) return {1, true};
  if (lead < 0xC2 || lead > 0xF4) return {1, false};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  uint8_t low = 0x80, high = 0xBF;  // of the second byte
  if (lead == 0xE0) low = 0xA0;
  if (lead == 0xED) high = 0x9F;
  if (lead == 0xF0) low = 0x90;
  if (lead == 0xF4) high = 0x8F;
  for (size_t i = 1; i < length; ++i) {
    if (at + i >= bytes.size() || byte(at + i) < low || byte(at + i) > high) return {i, false};
    low = 0x80, high = 0xBF;
  }
  return {length, true};
}

utf8proc_category_t category(char32_t c) { return utf8proc_category(static_cast<utf8proc_int32_t>(c)); }

// Below U+0300 every character is its own composed form and no mark stands.
bool is_surely_nfc(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0xCC; });
}

int combining_class(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

// NOTE: utf8proc_map would sort marks by exchanging neighbours, quadratic in a run of them.
std::vector<utf8proc_int32_t> decompose(std::string_view text) {
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const auto c = static_cast<utf8proc_int32_t>(next_code_point(text, at));
    std::array<utf8proc_int32_t, 32> parts;
    int boundary = 0;
    const auto count = utf8proc_decompose_char(c, parts.data(), parts.size(), UTF8PROC_DECOMPOSE, &boundary);
    require(count >= 0 && count <= static_cast<utf8proc_ssize_t>(parts.size()),
            "nfc: U+{:04X} decomposes into {} parts", static_cast<uint32_t>(c), count);
    points.insert(points.end(), parts.begin(), parts.begin() + count);
  }
  for (auto run = points.begin(); run != points.end();) {
    run = std::find_if(run, points.end(), [](auto c) { return combining_class(c) != 0; });
    const auto end = std::find_if(run, points.end(), [](auto c) { return combining_class(c) == 0; });
    std::stable_sort(run, end, [](auto a, auto b) { return combining_class(a) < combining_class(b); });
    run = end;
  }
  return points;
}

const std::array<char32_t, 256>& alphabet() {
  static const std::array<char32_t, 256> table = [] {
    std::array<char32_t, 256> characters{};
    char32_t next = 256;
    for (char32_t b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      characters[b] = printable ? b : next++;
    }
    return characters;
  }();
  return table;
}

constexpr size_t kAlphabetEnd = 0x144;  // one past the largest character of the alphabet

}  // namespace

size_t find_invalid_utf8(std::string_view bytes) {
  for (size_t at = 0; at < bytes.size();) {
    const Sequence s = sequence_at(bytes, at);
    if (!s.valid) return at;
    at += s.length;
  }
  return std::string_view::npos;
}

std::string replace_invalid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (size_t at = 0; at < bytes.size();) {
    const Sequence s = sequence_at(bytes, at);
    if (s.valid)
      out.append(bytes.substr(at, s.length));
    else
      append_utf8(0xFFFD, out);
    at += s.length;
  }
  return out;
}

char32_t next_code_point(std::string_view text, size_t& at) {
  const auto byte = [&](size_t i) { return static_cast<char32_t>(static_cast<uint8_t>(text[at + i])); };
  const char32_t lead = byte(0);
  const size_t length = lead < 0x80 ? 1 : lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  char32_t c = length == 1 ? lead : lead & (0x7Fu >> length);
  for (size_t i = 1; i < length; ++i) c = c << 6 | (byte(i) & 0x3F);
  at += length;
  return c;
}

void append_utf8(char32_t c, std::string& out) {
  if (c < 0x80) {
    out += static_cast<char>(c);
    return;
  }
  const int continuations = c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
  constexpr std::array<uint8_t, 4> kLead = {0, 0xC0, 0xE0, 0xF0};
  out += static_cast<char>(kLead[static_cast<size_t>(continuations)] | c >> (6 * continuations));
  for (int i = continuations - 1; i >= 0; --i) out += static_cast<char>(0x80 | (c >> (6 * i) & 0x3F));
}

std::string nfc(std::string_view text) {
  if (is_surely_nfc(text)) return std::string(text);
  std::vector<utf8proc_int32_t> points = decompose(text);
  const auto length = utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(points.size()),
                                               static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  require(length >= 0, "nfc: utf8proc returned {}", length);
  std::string out;
  out.reserve(text.size());
  for (utf8proc_ssize_t i = 0; i < length; ++i) append_utf8(static_cast<char32_t>(points[static_cast<size_t>(i)]), out);
  return out;
}

bool is_letter(char32_t c) {
  if (c < 0x80) return (c | 0x20) >= 'a' && (c | 0x20) <= 'z';
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
}

bool is_number(char32_t c) {
  if (c < 0x80) return c >= '0' && c <= '9';
  const auto k = category(c);
  return k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO;
}

bool is_space(char32_t c) {
  if (c < 0x80) return c == ' ' || (c >= '\t' && c <= '\r');
  return c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 ||
         c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_word(char32_t c) {
  if (is_letter(c) || c == 0x200C || c == 0x200D) return true;
  switch (category(c)) {
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    // Symbols that are alphabetic: circled and squared letters.
    default:
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
             (c >= 0x1F170 && c <= 0x1F189);
  }
}

char32_t character_of_byte(uint8_t byte) { return alphabet()[byte]; }

std::string characters_of_bytes(std::string_view bytes) {
  std::string out;
  for (const char b : bytes) append_utf8(character_of_byte(static_cast<uint8_t>(b)), out);
  return out;
}

std::string bytes_of_characters(std::string_view entry) {
  static const std::array<int, kAlphabetEnd> byte_of = [] {
    std::array<int, kAlphabetEnd> table;
    table.fill(-1);
    for (int b = 0; b < 256; ++b) table.at(alphabet()[static_cast<size_t>(b)]) = b;
    return table;
  }();
  std::string out;
  for (size_t at = 0; at < entry.size();) {
    const char32_t c = next_code_point(entry, at);
    if (c >= kAlphabetEnd || byte_of[c] < 0) return std::string(entry);
    out += static_cast<char>(byte_of[c]);
  }
  return out;
}

}  // namespace lightmoe::text
