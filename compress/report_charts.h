#pragma once
// The report's charts, each one inline SVG element.

#include <string>

#include "compress/report.h"

namespace lightmoe {

// Colour (a CSS variable of the page) and marker of a method, the same in every chart.
std::string method_color(const Report& report, const std::string& method);
std::string legend(const Report& report, const std::vector<std::string>& labels);
// Labels of the rows, each once: methods in the recipe's order, those without training beside them.
std::vector<std::string> row_labels(const Report& report);

// Test quality against the size of the weights; task null: the average over tasks. Methods with several ratios are joined.
std::string quality_chart(const Report& report, const ReportTask* task, double width, double height);
// Gate mass of every slot, one row per layer; slots that `method` replaces are marked, filled when the smallest ratio does.
std::string gate_heat_map(const Report& report, const ReportTask& task, const std::string& method);
// Training loss over steps of every method at one ratio (references included), and beta of the annealed ones below it.
std::string training_chart(const Report& report, const ReportTask& task, double ratio, double width, double height);

}  // namespace lightmoe
