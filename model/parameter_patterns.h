#pragma once
// Which parameters train, chosen by patterns over their names: * any characters, ? one character.

#include <string>
#include <string_view>
#include <vector>

#include "autograd/parameter.h"

namespace lightmoe {

bool glob_match(std::string_view pattern, std::string_view name);

// train_only (if any): nothing but what matches one of them trains. freeze: what matches does not. A pattern that matches no
// parameter is Error(kUsage) with a name of the right kind, for a pattern that silently does nothing is worse than none.
void select_trainable(const std::vector<ParameterPtr>& parameters, const std::vector<std::string>& train_only,
                      const std::vector<std::string>& freeze);

}  // namespace lightmoe
