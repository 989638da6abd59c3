#pragma once
// Unicode for the tokenizer. Every std::string_view here is UTF-8; functions that need it valid say so.
// Classes are those of the Unicode general category (utf8proc); is_space is the White_Space property.

#include <cstdint>
#include <string>
#include <string_view>

namespace lightmoe::text {

// Byte offset of the first ill-formed sequence, or npos.
size_t find_invalid_utf8(std::string_view bytes);
// Each maximal ill-formed subpart becomes one U+FFFD (Unicode 15, section 3.9, "Substitution of
// Maximal Subparts"), as Rust's from_utf8_lossy does.
std::string replace_invalid_utf8(std::string_view bytes);

// Code point at `at` of valid text; moves `at` past it.
char32_t next_code_point(std::string_view text, size_t& at);
void append_utf8(char32_t code_point, std::string& out);

// Normalization form C of valid text. Linear in the text but for sorting each run of marks.
std::string nfc(std::string_view text);

bool is_letter(char32_t c);  // L*
bool is_number(char32_t c);  // N*
bool is_space(char32_t c);
bool is_word(char32_t c);  // Alphabetic, M*, Nd, Pc, Join_Control: \w of Rust's regex

// GPT-2's alphabet: one printable character for each byte, so that a vocabulary can be written as
// text. Printable Latin-1 bytes stand for themselves, the others for U+0100, U+0101, ... in order.
char32_t character_of_byte(uint8_t byte);
std::string characters_of_bytes(std::string_view bytes);
// The bytes a vocabulary entry stands for; an entry with a character outside the alphabet (an added
// token such as two spaces) stands for itself.
std::string bytes_of_characters(std::string_view entry);

}  // namespace lightmoe::text
