#pragma once
// The permutation of least cost: column of each row, each column once. cost [n*n], row-major. Shortest augmenting paths with
// potentials (Kuhn 1955, Jonker and Volgenant 1987), n^3 steps. Deterministic.

#include <cstdint>
#include <vector>

namespace lightmoe {

std::vector<int32_t> cheapest_assignment(const std::vector<double>& cost, int64_t n);

}  // namespace lightmoe
