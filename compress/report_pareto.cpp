#include "compress/report_pareto.h"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

#include "compress/svg.h"
#include "compress/text.h"

namespace lightmoe {
namespace {

constexpr double kLabelHeight = 13, kCharacter = 6.1;  // of 11.5 px text, a little on the wide side

struct Box {
  double left, top, right, bottom;
  bool overlaps(const Box& o) const { return left < o.right && o.left < right && top < o.bottom && o.top < bottom; }
};

struct Point {
  const ReportRow* row;
  double x, y;  // pixels
};

// Families in the order of the recipe's methods.
std::vector<std::string> families_of(const Report& report) {
  std::vector<std::string> families;
  for (const std::string& method : report.method_order) {
    const auto found = report.families.find(method);
    if (found != report.families.end() && std::find(families.begin(), families.end(), found->second) == families.end())
      families.push_back(found->second);
  }
  return families;
}

bool is_shown(const ReportRow& row, bool recovered) { return row.average && row.recovered == recovered; }

// Puts labels where they cover neither another label nor a point: beside the point first, then further away with a line to it.
class Labels {
 public:
  Labels(const Box& area, const std::vector<Point>& points) : area_(area) {
    for (const Point& p : points) taken_.push_back({p.x - 5, p.y - 5, p.x + 5, p.y + 5});
  }
  // False where there is no room.
  bool place(Svg& svg, const Point& p, const std::string& text, const std::string& color) {
    const double width = kCharacter * static_cast<double>(text.size());
    for (const double distance : {9., 20., 34., 50., 70., 92.}) {
      for (const auto& [dx, dy] : kDirections) {
        const double x = p.x + dx * distance, y = p.y + dy * distance;
        const double left = dx > 0 ? x : dx < 0 ? x - width : x - width / 2;
        const Box box{left, y - kLabelHeight / 2, left + width, y + kLabelHeight / 2};
        if (!inside(box) || std::any_of(taken_.begin(), taken_.end(), [&](const Box& t) { return t.overlaps(box); }))
          continue;
        if (distance > 9) svg.line(p.x, p.y, dx == 0 ? x : dx > 0 ? left - 1 : left + width + 1, y, "class=\"lead\"");
        svg.text(left, y + 4, text, "start", fmt::format("class=\"label\" style=\"fill:{}\"", color));
        taken_.push_back(box);
        return true;
      }
    }
    return false;
  }

 private:
  static constexpr std::array<std::pair<double, double>, 8> kDirections = {
      {{1, 0}, {-1, 0}, {.8, -.6}, {.8, .6}, {-.8, -.6}, {-.8, .6}, {0, -1}, {0, 1}}};
  bool inside(const Box& box) const {
    return box.left >= area_.left && box.right <= area_.right && box.top >= area_.top && box.bottom <= area_.bottom;
  }
  Box area_;
  std::vector<Box> taken_;
};

struct Axes {
  SvgScale x, y;
  double unit = 1;
  const char* unit_name = "MiB";
};

// Both panels have the same sizes, each its own scores.
Axes axes_of(const Report& report, bool recovered, double width, double panel_height) {
  Axes axes;
  if (report.original_bytes >= 0x1p30)
    axes.unit = 0x1p30, axes.unit_name = "GiB";
  else
    axes.unit = 0x1p20;
  double x_low = 1e300, x_high = 0, y_low = 100, y_high = 0;
  for (const ReportRow& row : report.rows) {
    if (!row.average) continue;
    x_low = std::min(x_low, row.file_bytes / axes.unit), x_high = std::max(x_high, row.file_bytes / axes.unit);
    if (row.recovered != recovered) continue;
    y_low = std::min(y_low, 100 * row.average->mean), y_high = std::max(y_high, 100 * row.average->mean);
  }
  const double x_pad = std::max(.09 * (x_high - x_low), .02 * x_high), y_pad = std::max(.07 * (y_high - y_low), 1.);
  axes.x = {.low = x_low - x_pad, .high = x_high + x_pad, .from = 56, .to = width - 12};
  axes.y = {
      .low = std::max(y_low - y_pad, -1.), .high = std::min(y_high + y_pad, 101.), .from = panel_height - 26, .to = 26};
  return axes;
}

void draw_frame(Svg& svg, const Axes& axes, double top, const std::string& title) {
  const auto at = [top](double y) { return top + y; };
  const std::vector<double> xs = nice_ticks(axes.x.low, axes.x.high, 8), ys = nice_ticks(axes.y.low, axes.y.high, 6);
  const double x_step = xs.size() > 1 ? xs[1] - xs[0] : 1, y_step = ys.size() > 1 ? ys[1] - ys[0] : 1;
  for (const double v : ys) {
    svg.line(axes.x.from, at(axes.y(v)), axes.x.to, at(axes.y(v)), "class=\"grid\"");
    svg.text(axes.x.from - 8, at(axes.y(v)) + 4, tick_text(v, y_step), "end", "class=\"axis\"");
  }
  for (const double v : xs) svg.text(axes.x(v), at(axes.y.from) + 16, tick_text(v, x_step), "middle", "class=\"axis\"");
  svg.line(axes.x.from, at(axes.y.from), axes.x.to, at(axes.y.from), "class=\"base\"");
  svg.text(axes.x.from, at(14), title, "start", "class=\"name\"");
}

void draw_panel(Svg& svg, const Report& report, const Axes& axes, double top, bool recovered) {
  std::vector<Point> points, front;
  for (const ReportRow& row : report.rows) {
    if (is_shown(row, recovered))
      points.push_back({&row, axes.x(row.file_bytes / axes.unit), top + axes.y(100 * row.average->mean)});
  }
  const std::vector<size_t> best = pareto_front(report, recovered);
  std::vector<std::pair<double, double>> steps;
  for (const size_t i : best) {
    for (const Point& p : points) {
      if (p.row != &report.rows[i]) continue;
      front.push_back(p);
      if (!steps.empty()) steps.emplace_back(p.x, steps.back().second);
      steps.emplace_back(p.x, p.y);
    }
  }
  if (steps.size() > 1) svg.polyline(steps, "class=\"front\"");
  for (const Point& p : points) {
    const std::string color = family_color(report, p.row->method);
    const bool is_front = std::any_of(front.begin(), front.end(), [&](const Point& f) { return f.row == p.row; });
    svg.circle(p.x, p.y, is_front ? 5.5 : 4,
               fmt::format("style=\"fill:{0};stroke:{0}\" fill-opacity=\"{1}\"", color, is_front ? ".95" : ".35"));
    svg.tooltip(fmt::format("{} at {}: {} %, {}", p.row->label(), ratio_text(p.row->ratio),
                            cell_text(nullptr, *p.row->average), human_bytes(static_cast<int64_t>(p.row->file_bytes))));
  }
  // The front first, then of every family and ratio the best, while there is room.
  Labels labels({axes.x.from, top + axes.y.to - 10, axes.x.to, top + axes.y.from}, points);
  std::set<std::pair<std::string, double>> named;
  std::set<const ReportRow*> done;
  for (const Point& p : front) {
    labels.place(svg, p, p.row->method, family_color(report, p.row->method));
    named.insert({report.families.at(p.row->method), p.row->ratio}), done.insert(p.row);
  }
  std::stable_sort(points.begin(), points.end(), [](const Point& a, const Point& b) { return a.y < b.y; });
  for (const Point& p : points) {
    const bool is_first = named.insert({report.families.at(p.row->method), p.row->ratio}).second;
    if (is_first && done.insert(p.row).second) labels.place(svg, p, p.row->method, family_color(report, p.row->method));
  }
}

// The row's average, bold where it is the best of its column.
std::string matrix_cell(const ReportRow* row, double best) {
  if (row == nullptr || !row->average) return "<td>-</td>";
  return fmt::format("<td{}>{}</td>", row->average->mean == best ? " class=\"best\"" : "",
                     fmt::format("{:.1f}", 100 * row->average->mean));
}

// Methods by ratios, each ratio without and with training; the best of the last column first.
std::string matrix(const Report& report) {
  std::set<double> ratios;
  for (const ReportRow& row : report.rows) {
    if (row.ratio > 0) ratios.insert(row.ratio);
  }
  const auto find = [&](const std::string& method, double ratio, bool recovered) -> const ReportRow* {
    for (const ReportRow& row : report.rows) {
      if (row.method == method && row.ratio == ratio && row.recovered == recovered) return &row;
    }
    return nullptr;
  };
  std::string html = "<div class=\"scroll\"><table class=\"matrix\">\n<tr><th></th>";
  std::map<std::pair<double, bool>, double> best;
  for (const double ratio : ratios) {
    html += fmt::format("<th>{}<br>free</th><th>{}<br>trained</th>", ratio_text(ratio), ratio_text(ratio));
    for (const ReportRow& row : report.rows) {
      if (row.ratio == ratio && row.average)
        best[{ratio, row.recovered}] = std::max(best[{ratio, row.recovered}], row.average->mean);
    }
  }
  html += "</tr>\n";
  std::vector<std::pair<double, std::string>> order;
  for (const std::string& method : report.method_order) {
    double key = -1;
    for (const bool recovered : {true, false}) {
      const ReportRow* row = find(method, *ratios.rbegin(), recovered);
      if (row != nullptr && row->average && key < 0) key = row->average->mean;
    }
    if (find(method, 0, true) == nullptr && find(method, 0, false) == nullptr) order.emplace_back(-key, method);
  }
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [key, method] : order) {
    html += fmt::format("<tr><td><span class=\"dot\" style=\"background:{}\"></span>{}</td>",
                        family_color(report, method), escape_markup(method));
    for (const double ratio : ratios) {
      for (const bool recovered : {false, true}) {
        html += matrix_cell(find(method, ratio, recovered), best[{ratio, recovered}]);
      }
    }
    html += "</tr>\n";
  }
  return html + "</table></div>\n";
}

}  // namespace

std::string family_color(const Report& report, const std::string& method) {
  static constexpr const char* colors[] = {"var(--m2)", "var(--m3)", "var(--m6)", "var(--m4)",
                                           "var(--m7)", "var(--m5)", "var(--m8)"};
  const auto found = report.families.find(method);
  const auto featured = report.families.find(report.featured);
  const std::string first = featured == report.families.end() ? "" : featured->second;
  if (found == report.families.end() || found->second == kWholeModel) return "var(--m0)";
  if (found->second == first) return "var(--m1)";
  size_t index = 0;
  for (const std::string& family : families_of(report)) {
    if (family == found->second) break;
    if (family != kWholeModel && family != first) ++index;
  }
  return colors[index % std::size(colors)];
}

std::vector<size_t> pareto_front(const Report& report, bool recovered) {
  std::vector<size_t> rows;
  for (size_t i = 0; i < report.rows.size(); ++i) {
    if (is_shown(report.rows[i], recovered)) rows.push_back(i);
  }
  std::stable_sort(rows.begin(), rows.end(), [&](size_t a, size_t b) {
    const ReportRow &x = report.rows[a], &y = report.rows[b];
    return x.file_bytes != y.file_bytes ? x.file_bytes < y.file_bytes : x.average->mean > y.average->mean;
  });
  std::vector<size_t> front;
  for (const size_t i : rows) {
    if (front.empty() || report.rows[i].average->mean > report.rows[front.back()].average->mean) front.push_back(i);
  }
  return front;
}

std::string pareto_chart(const Report& report, double width, double panel_height) {
  const bool any = std::any_of(report.rows.begin(), report.rows.end(), [](const ReportRow& r) { return r.average; });
  if (!any) return "";
  const Axes axes = axes_of(report, true, width, panel_height);
  const double bottom = 24;
  Svg svg(width, 2 * panel_height + bottom, "average quality against size of all methods");
  for (const bool recovered : {false, true}) {
    const double top = recovered ? panel_height : 0;
    const Axes own = axes_of(report, recovered, width, panel_height);
    if (pareto_front(report, recovered).empty()) continue;
    draw_frame(svg, own, top, recovered ? "average score, %, with recovery" : "average score, %, without training");
    draw_panel(svg, report, own, top, recovered);
  }
  svg.text((axes.x.from + axes.x.to) / 2, 2 * panel_height + bottom - 6,
           fmt::format("weights on disk, {}", axes.unit_name), "middle", "class=\"name\"");
  return svg.str();
}

std::string pareto_section(const Report& report) {
  const bool any = std::any_of(report.rows.begin(), report.rows.end(),
                               [](const ReportRow& row) { return row.ratio > 0 && !row.recovered && row.average; });
  if (!any) return "";
  std::string html =
      "<h2>All methods, quality against size</h2>\n<p class=\"soft\">Every point is one method at one ratio: the "
      "average of "
      "all tasks on the held-out test split. Dashed: what no smaller model beats; its points carry their names, and so "
      "does "
      "the best of each family at each ratio where there is room. Point at one to read it.</p>\n<div class=\"legend\">";
  for (const std::string& family : families_of(report)) {
    const auto of = std::find_if(report.families.begin(), report.families.end(),
                                 [&](const auto& entry) { return entry.second == family; });
    html += fmt::format("<span><span class=\"dot\" style=\"background:{}\"></span>{}</span>",
                        family_color(report, of->first), escape_markup(family));
  }
  html += "</div>\n<div class=\"wide\"><div class=\"card\">" + pareto_chart(report, 860, 470) +
          "</div><div class=\"card\">" + matrix(report) + "</div></div>\n";
  return html;
}

}  // namespace lightmoe
