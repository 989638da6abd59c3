#include "compress/assignment.h"

#include <cstddef>
#include <limits>

namespace lightmoe {

// Rows enter one by one; each looks for the shortest path, in reduced costs, to a column that is free. Index 0 stands for "none".
std::vector<int32_t> cheapest_assignment(const std::vector<double>& cost, int64_t n) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const auto size = static_cast<size_t>(n) + 1;
  std::vector<double> row_potential(size, 0), column_potential(size, 0);
  std::vector<size_t> row_of(size, 0), previous(size, 0);
  for (size_t start = 1; start < size; ++start) {
    row_of[0] = start;
    size_t column = 0;
    std::vector<double> distance(size, kInfinity);
    std::vector<uint8_t> done(size, 0);
    while (row_of[column] != 0) {
      done[column] = 1;
      const size_t row = row_of[column];
      double step = kInfinity;
      size_t next = 0;
      for (size_t j = 1; j < size; ++j) {
        if (done[j]) continue;
        const double reduced = cost[(row - 1) * (size - 1) + j - 1] - row_potential[row] - column_potential[j];
        if (reduced < distance[j]) distance[j] = reduced, previous[j] = column;
        if (distance[j] < step) step = distance[j], next = j;
      }
      for (size_t j = 0; j < size; ++j) {
        if (done[j]) {
          row_potential[row_of[j]] += step;
          column_potential[j] -= step;
        } else {
          distance[j] -= step;
        }
      }
      column = next;
    }
    for (; column != 0; column = previous[column]) row_of[column] = row_of[previous[column]];
  }
  std::vector<int32_t> column_of(static_cast<size_t>(n));
  for (size_t j = 1; j < size; ++j) column_of[row_of[j] - 1] = static_cast<int32_t>(j - 1);
  return column_of;
}

}  // namespace lightmoe
