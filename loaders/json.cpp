#include "loaders/json.h"

#include <algorithm>
#include <unordered_set>
#include <vector>

#include "loaders/output.h"
#include "runtime/error.h"

template class nlohmann::basic_json<nlohmann::ordered_map>;
template class nlohmann::detail::serializer<nlohmann::ordered_json>;

namespace lightmoe {
namespace {

// Reads the text and leaves the address of the last character taken in *at, so that the handler can say where it is.
struct TrackingIterator {
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;
  const char* p;
  const char** at;
  reference operator*() const { return *p; }
  TrackingIterator& operator++() {
    *at = p++;
    return *this;
  }
  TrackingIterator operator++(int) {
    const TrackingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const TrackingIterator& other) const { return p == other.p; }
  bool operator!=(const TrackingIterator& other) const { return p != other.p; }
};

class Builder final : public nlohmann::json_sax<Json> {
 public:
  Builder(std::string_view text, const std::string& name, const JsonLimits& limits)
      : text_(text), name_(name), limits_(limits), at_(text.data()) {}

  Json take() { return std::move(root_); }
  const char** position() { return &at_; }
  [[noreturn]] void fail_at(size_t offset, const std::string& reason) const {
    const std::string_view before = text_.substr(0, std::min(offset, text_.size()));
    const auto line = 1 + std::count(before.begin(), before.end(), '\n');
    const size_t last_break = before.rfind('\n');
    const size_t column = before.size() - (last_break == std::string_view::npos ? 0 : last_break + 1) + 1;
    fail(ErrorKind::kInput, "{}:{}:{}: {}", name_, line, column, reason);
  }

  bool null() override { return add(Json(nullptr)); }
  bool boolean(bool value) override { return add(Json(value)); }
  bool number_integer(number_integer_t value) override { return add(Json(value)); }
  bool number_unsigned(number_unsigned_t value) override { return add(Json(value)); }
  bool number_float(number_float_t value, const string_t&) override { return add(Json(value)); }
  bool string(string_t& value) override { return add(Json(std::move(value))); }
  bool binary(binary_t&) override { fail_here("binary value"); }
  bool start_object(std::size_t) override {
    open(Json::object());
    keys_.emplace_back();
    return true;
  }
  bool key(string_t& value) override {
    if (!keys_.back().insert(value).second) fail_here(fmt::format("duplicate key \"{}\"", printable(value)));
    key_ = std::move(value);
    return true;
  }
  bool end_object() override {
    keys_.pop_back();
    stack_.pop_back();
    return true;
  }
  bool start_array(std::size_t) override {
    open(Json::array());
    return true;
  }
  bool end_array() override {
    stack_.pop_back();
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& error) override {
    std::string reason = error.what();  // "[json.exception...] parse error at line 1, column 2: what happened"
    const size_t prefix = reason.find("column ");
    const size_t colon = reason.find(": ", prefix == std::string::npos ? 0 : prefix);
    if (prefix != std::string::npos && colon != std::string::npos) reason = reason.substr(colon + 2);
    fail_at(position > 0 ? position - 1 : 0, printable(reason, 300));
  }

 private:
  [[noreturn]] void fail_here(const std::string& reason) const {
    fail_at(static_cast<size_t>(at_ - text_.data()), reason);
  }
  bool add(Json value) {
    place(std::move(value));
    return true;
  }
  void open(Json value) {
    if (static_cast<int>(stack_.size()) >= limits_.max_depth) {
      fail_here(fmt::format("nested deeper than {} levels", limits_.max_depth));
    }
    stack_.push_back(place(std::move(value)));
  }
  Json* place(Json value) {
    if (++count_ > limits_.max_values) fail_here(fmt::format("more than {} values", limits_.max_values));
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    if (auto* array = stack_.back()->get_ptr<Json::array_t*>()) {
      array->push_back(std::move(value));
      return &array->back();
    }
    // The key is known to be new: append without ordered_map's linear search.
    auto* object = stack_.back()->get_ptr<Json::object_t*>();
    object->emplace_back(std::move(key_), std::move(value));
    return &object->back().second;
  }

  std::string_view text_;
  const std::string& name_;
  const JsonLimits& limits_;
  const char* at_;
  Json root_;
  std::vector<Json*> stack_;
  std::vector<std::unordered_set<std::string>> keys_;
  std::string key_;
  int64_t count_ = 0;
};

}  // namespace

Json parse_json(std::string_view text, const std::string& name, const JsonLimits& limits) {
  check(static_cast<int64_t>(text.size()) <= limits.max_bytes, ErrorKind::kInput,
        "{}: {} bytes of JSON, at most {} accepted", name, text.size(), limits.max_bytes);
  Builder builder(text, name, limits);
  // NOTE: nlohmann takes a NUL byte for the end of the text and would not see what follows.
  if (const size_t nul = text.find('\0'); nul != std::string_view::npos) builder.fail_at(nul, "NUL byte");
  const TrackingIterator begin{text.data(), builder.position()}, end{text.data() + text.size(), builder.position()};
  Json::sax_parse(begin, end, &builder);
  return builder.take();
}

Json read_json_file(const std::string& path, const JsonLimits& limits) {
  return parse_json(read_file(path, limits.max_bytes), path, limits);
}

}  // namespace lightmoe
