#include "model/parameter_patterns.h"

#include <algorithm>

#include "runtime/nearest.h"

namespace lightmoe {

bool glob_match(std::string_view pattern, std::string_view name) {
  size_t p = 0, n = 0, star = std::string_view::npos, resume = 0;
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resume = n;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n])) {
      ++p;
      ++n;
    } else if (star != std::string_view::npos) {
      p = star + 1;  // the last star takes one character more
      n = ++resume;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

void select_trainable(const std::vector<ParameterPtr>& parameters, const std::vector<std::string>& train_only,
                      const std::vector<std::string>& freeze) {
  const auto check_used = [&](const char* flag, const std::vector<std::string>& patterns) {
    for (const std::string& pattern : patterns) {
      const bool used = std::any_of(parameters.begin(), parameters.end(),
                                    [&](const ParameterPtr& p) { return glob_match(pattern, p->name); });
      if (used) continue;
      std::vector<std::string> names;
      for (const ParameterPtr& p : parameters) names.push_back(p->name);
      const std::string near = nearest(pattern, names);
      fail(ErrorKind::kUsage, "{} '{}': no parameter has such a name; {} {}", flag, pattern,
           near.empty() ? "they look like" : "did you mean", near.empty() ? names[names.size() / 2] : near);
    }
  };
  check_used("--train-only", train_only);
  check_used("--freeze", freeze);
  const auto matches = [](const std::vector<std::string>& patterns, const std::string& name) {
    return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& p) { return glob_match(p, name); });
  };
  for (const ParameterPtr& p : parameters) {
    p->trainable = (train_only.empty() || matches(train_only, p->name)) && !matches(freeze, p->name);
    if (!p->trainable) p->grad.reset();
  }
}

}  // namespace lightmoe
