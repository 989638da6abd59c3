#pragma once
// What nearly every file includes, for g++ to read once (Makefile, PRECOMPILED). No file includes this one: each says itself what it
// needs, as clang's build, which is without it, checks.

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>
