#pragma once
// Quality against size over many methods: one picture whose points are coloured by what the replaced slots become, with labels on the
// points that nothing smaller beats, and the numbers of all of them in a table beside it.

#include <string>

#include "compress/report.h"

namespace lightmoe {

// A CSS variable of the page; the same for all methods of a family.
std::string family_color(const Report& report, const std::string& method);
// Indices into report.rows of the rows that no row of at most their size beats or equals, by size; trained or untrained ones.
std::vector<size_t> pareto_front(const Report& report, bool recovered);
// Two panels, one under the other: without training, with recovery. "" where no row has an average.
std::string pareto_chart(const Report& report, double width, double panel_height);
// Heading, legend of the families, picture and table; "" where there are no compressed rows with averages.
std::string pareto_section(const Report& report);

}  // namespace lightmoe
