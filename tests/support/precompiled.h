#pragma once
// runtime/precompiled.h, for tests.

#include <gtest/gtest.h>

#include <fstream>
#include <set>

#include "runtime/precompiled.h"
