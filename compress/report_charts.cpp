#include "compress/report_charts.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include "compress/svg.h"
#include "compress/text.h"

namespace lightmoe {
namespace {

constexpr const char* kAxis = "class=\"axis\"";
constexpr const char* kGrid = "class=\"grid\"";

struct Look {
  const char* color;
  SvgMarker marker;
};

std::string method_of(const std::string& label) {
  return label.substr(0, label.find(", "));
}  // "reap, no training": reap

// Colours of Okabe and Ito's palette, told apart by people who are colour-blind. The report's own parts keep theirs in every report, the others
// take what is left in the recipe's order.
Look look_of(const Report& report, const std::string& label) {
  const std::string method = method_of(label);
  if (method != label) return {look_of(report, method).color, SvgMarker::kCross};  // its colour, a marker of its own
  if (method == report.featured) return {"var(--m1)", SvgMarker::kCircle};
  if (method == report.original) return {"var(--m0)", SvgMarker::kPlus};
  if (method == report.whole_with_adapters) return {"var(--m3)", SvgMarker::kSquare};
  static constexpr const char* colors[] = {"var(--m7)", "var(--m5)", "var(--m2)",
                                           "var(--m4)", "var(--m6)", "var(--m8)"};
  static constexpr SvgMarker markers[] = {SvgMarker::kDiamond, SvgMarker::kTriangle, SvgMarker::kTriangleDown,
                                          SvgMarker::kRing};
  size_t index = 0;
  for (const std::string& other : report.method_order) {
    if (other == method) break;
    if (other != report.featured && other != report.original && other != report.whole_with_adapters) ++index;
  }
  return {colors[index % std::size(colors)], markers[index % std::size(markers)]};
}

struct ByteUnit {
  double bytes;
  const char* name;
};
ByteUnit unit_for(double bytes) {
  if (bytes >= 0x1p30) return {0x1p30, "GiB"};
  return {0x1p20, "MiB"};
}

struct Point {
  double x = 0, y = 0, deviation = 0;
};

// The frame of a chart: plot area, scales, ticks and axis names.
struct Frame {
  double left = 62, right = 14, top = 14, bottom = 40;
  SvgScale x, y;
};

void draw_axes(Svg& svg, const Frame& f, double width, double height, const std::vector<double>& xs,
               const std::vector<double>& ys, const std::function<std::string(double)>& y_text,
               const std::string& x_name, const std::string& y_name) {
  for (const double v : ys) {
    svg.line(f.left, f.y(v), width - f.right, f.y(v), kGrid);
    svg.text(f.left - 8, f.y(v) + 4, y_text(v), "end", kAxis);
  }
  const double step = xs.size() > 1 ? xs[1] - xs[0] : 1;
  for (const double v : xs) svg.text(f.x(v), height - f.bottom + 18, tick_text(v, step), "middle", kAxis);
  svg.line(f.left, height - f.bottom, width - f.right, height - f.bottom, "class=\"base\"");
  svg.text((f.left + width - f.right) / 2, height - 6, x_name, "middle", "class=\"name\"");
  svg.text(14, (f.top + height - f.bottom) / 2, y_name, "middle",
           fmt::format("class=\"name\" transform=\"rotate(-90 14 {:.0f})\"", (f.top + height - f.bottom) / 2));
}

std::map<std::string, std::vector<Point>> quality_points(const Report& report, const ReportTask* task, double scale,
                                                         double unit) {
  std::map<std::string, std::vector<Point>> points;
  for (const ReportRow& row : report.rows) {
    const ReportCell* cell = task == nullptr ? (row.average ? &*row.average : nullptr)
                                             : &row.cells[static_cast<size_t>(task - report.tasks.data())];
    if (cell == nullptr || cell->seeds == 0 || !std::isfinite(cell->mean)) continue;
    points[row.label()].push_back({row.file_bytes / unit, scale * cell->mean, scale * cell->deviation.value_or(0)});
  }
  return points;
}

// Of the values shown; the untrained original is left out when it would flatten everything else.
bool drop_original(const Report& report, std::map<std::string, std::vector<Point>>& points) {
  const auto original = points.find(report.original);
  if (original == points.end() || points.size() < 3) return false;
  double low = 1e300, high = -1e300;
  for (const auto& [method, list] : points) {
    if (method == report.original) continue;
    for (const Point& p : list) low = std::min(low, p.y), high = std::max(high, p.y);
  }
  const double y = original->second.front().y;
  if (y > low - 1.2 * (high - low) && y < high + 1.2 * (high - low)) return false;
  points.erase(original);
  return true;
}

}  // namespace

std::string method_color(const Report& report, const std::string& method) { return look_of(report, method).color; }

std::vector<std::string> row_labels(const Report& report) {
  std::vector<std::string> labels;
  for (const std::string& method : report.method_order) {
    for (const ReportRow& row : report.rows) {
      if (row.method == method && std::find(labels.begin(), labels.end(), row.label()) == labels.end())
        labels.push_back(row.label());
    }
  }
  return labels;
}

std::string legend(const Report& report, const std::vector<std::string>& labels) {
  std::string html = "<div class=\"legend\">";
  for (const std::string& method : labels) {
    Svg svg(18, 14, method);
    svg.marker(look_of(report, method).marker, 9, 7, 5, look_of(report, method).color);
    html += "<span>" + svg.str() + escape_markup(method) + "</span>";
  }
  return html + "</div>\n";
}

std::string quality_chart(const Report& report, const ReportTask* task, double width, double height) {
  const double scale = task == nullptr || task->share ? 100 : 1;
  const ByteUnit unit = unit_for(report.original_bytes);
  auto points = quality_points(report, task, scale, unit.bytes);
  const bool dropped = drop_original(report, points);
  double x_low = report.original_bytes / unit.bytes, x_high = x_low, y_low = 1e300, y_high = -1e300;
  for (const auto& [method, list] : points) {
    for (const Point& p : list) {
      x_low = std::min(x_low, p.x), x_high = std::max(x_high, p.x);
      y_low = std::min(y_low, p.y - p.deviation), y_high = std::max(y_high, p.y + p.deviation);
    }
  }
  if (points.empty()) return "";
  // At least two points of a per cent scale, so that equal values do not become a cliff.
  const double least = scale == 100 ? 2 : .02 * std::abs(y_high) + 1e-9, span = std::max(y_high - y_low, least);
  const double y_pad = .1 * span + (span - (y_high - y_low)) / 2,
               x_pad = std::max(.06 * (x_high - x_low), .02 * x_high);
  const bool percent = scale == 100;
  const std::string name = task == nullptr ? "average of all tasks" : task->title;
  Svg svg(width, height, fmt::format("{}: quality against size", name));
  Frame f;
  f.x = {.low = x_low - x_pad, .high = x_high + x_pad, .from = f.left, .to = width - f.right};
  f.y = {.low = percent ? std::max(y_low - y_pad, -1.) : y_low - y_pad,
         .high = percent ? std::min(y_high + y_pad, 101.) : y_high + y_pad,
         .from = height - f.bottom,
         .to = f.top};
  const std::vector<double> ys = nice_ticks(f.y.low, f.y.high, 5);
  const double y_step = ys.size() > 1 ? ys[1] - ys[0] : 1;
  draw_axes(
      svg, f, width, height, nice_ticks(f.x.low, f.x.high, width > 450 ? 7 : 4), ys,
      [&](double v) { return tick_text(v, y_step); }, fmt::format("weights on disk, {}", unit.name),
      task == nullptr ? "average score, %"
      : task->share   ? task->metric + ", %"
                      : task->metric);
  for (const std::string& method : row_labels(report)) {
    const auto found = points.find(method);
    if (found == points.end()) continue;
    const Look look = look_of(report, method);
    std::vector<std::pair<double, double>> line;
    for (const Point& p : found->second) line.emplace_back(f.x(p.x), f.y(p.y));
    const bool main = method_of(method) == report.featured;
    if (line.size() > 1)
      svg.polyline(line, fmt::format("stroke=\"{}\" stroke-width=\"{}\" stroke-linejoin=\"round\"", look.color,
                                     main ? 2.6 : 1.6));
    if (line.size() == 1 && method != report.original) {  // a reference of full size: its level, for the eye
      svg.line(f.left, line[0].second, line[0].first, line[0].second,
               fmt::format("stroke=\"{}\" stroke-dasharray=\"2 4\" opacity=\".55\"", look.color));
    }
    for (const Point& p : found->second) {
      if (p.deviation > 0)
        svg.line(f.x(p.x), f.y(p.y - p.deviation), f.x(p.x), f.y(p.y + p.deviation),
                 fmt::format("stroke=\"{}\" stroke-width=\"1.2\"", look.color));
      svg.marker(look.marker, f.x(p.x), f.y(p.y), main ? 5.5 : 4.8, look.color);
      svg.tooltip(fmt::format("{}: {:.4g} at {:.4g} {}", method, p.y, p.x, unit.name));
    }
  }
  if (dropped) {
    const auto all = quality_points(report, task, scale, unit.bytes);
    svg.text(width - f.right, height - f.bottom - 8,
             fmt::format("{}, untrained: {:.1f}", report.original, all.at(report.original).front().y), "end",
             "class=\"note\"");
  }
  return svg.str();
}

namespace {

// Per layer and slot: the smallest ratio at which the method replaces it, 0 = never (first seed).
std::vector<std::vector<double>> replaced_at(const Report& report, const std::string& task, const std::string& method,
                                             std::vector<double>& ratios) {
  std::vector<std::vector<double>> first(static_cast<size_t>(report.num_layers),
                                         std::vector<double>(static_cast<size_t>(report.num_slots), 0));
  std::set<double> seen;
  for (const RunResult& run : report.runs) {
    if (run.task != task || run.method != method || seen.count(run.ratio) != 0) continue;
    seen.insert(run.ratio);
    for (size_t l = 0; l < run.replaced.size() && l < first.size(); ++l) {
      for (const int32_t slot : run.replaced[l]) {
        double& at = first[l][static_cast<size_t>(slot)];
        if (at == 0 || run.ratio < at) at = run.ratio;
      }
    }
  }
  ratios.assign(seen.begin(), seen.end());
  return first;
}

}  // namespace

std::string gate_heat_map(const Report& report, const ReportTask& task, const std::string& method) {
  if (task.gate_scores.empty()) return "";
  std::vector<double> ratios;
  const auto first = replaced_at(report, task.name, method, ratios);
  const size_t layers = task.gate_scores.size(), slots = task.gate_scores[0].size();
  const double cell = std::clamp(900. / static_cast<double>(slots), 12., 24.), left = 64, top = 8;
  const double width = left + cell * static_cast<double>(slots) + 160,
               height = top + cell * static_cast<double>(layers) + 24;
  Svg svg(width, height, fmt::format("{}: gate mass of each expert per layer", task.title));
  // Darkness grows with the share of the layer's gate mass relative to an even one; four times even is the darkest.
  const double even = 1 / static_cast<double>(slots);
  for (size_t l = 0; l < layers; ++l) {
    const double y = top + cell * static_cast<double>(l);
    svg.text(left - 8, y + cell / 2 + 4, fmt::format("layer {}", l), "end", kAxis);
    std::map<double, int> count;
    for (size_t s = 0; s < slots; ++s) {
      const double x = left + cell * static_cast<double>(s), g = task.gate_scores[l][s];
      const double strength = std::clamp(std::sqrt(g / even / 4), 0., 1.);
      svg.rect(x + .5, y + .5, cell - 1, cell - 1,
               fmt::format("rx=\"2\" class=\"cell\" style=\"fill-opacity:{:.3f}\"", .06 + .94 * strength));
      svg.tooltip(fmt::format("layer {}, expert {}: {:.2f} % of the gate mass{}", l, s, 100 * g,
                              first[l][s] > 0 ? ", replaced at " + ratio_text(first[l][s]) : ""));
      if (first[l][s] == 0) continue;
      ++count[first[l][s]];
      const bool smallest = first[l][s] == ratios.front();
      const char* ink = strength > .55 ? "var(--paper)" : "var(--m1)";
      svg.circle(x + cell / 2, y + cell / 2, cell * .19,
                 smallest ? fmt::format("fill=\"{}\"", ink)
                          : fmt::format("fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\"", ink));
    }
    std::string note;
    int sum = 0;
    for (const double ratio : ratios) note += fmt::format("{}{}", note.empty() ? "" : " / ", sum += count[ratio]);
    svg.text(left + cell * static_cast<double>(slots) + 10, y + cell / 2 + 4, note.empty() ? "" : note + " replaced",
             "start", kAxis);
  }
  const double y = top + cell * static_cast<double>(layers) + 16;
  const size_t every = slots > 40 ? 8 : 4;
  svg.text(left - 8, y, "expert", "end", kAxis);
  for (size_t s = 0; s < slots; s += every)
    svg.text(left + cell * (static_cast<double>(s) + .5), y, std::to_string(s), "middle", kAxis);
  return svg.str();
}

namespace {

struct Curve {
  std::string method;
  std::vector<std::pair<double, double>> loss, beta;  // step, value
  double first_bytes = 0, last_bytes = 0;
};

// Mean over a sliding window, shorter at the ends: single steps are noisy, the first one is kept as it is.
std::vector<std::pair<double, double>> smoothed(const std::vector<TrainedStep>& steps) {
  const auto n = static_cast<int64_t>(steps.size()), half = std::max<int64_t>(0, n / 60);
  std::vector<std::pair<double, double>> out;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t reach = std::min({half, i, n - 1 - i});
    double sum = 0;
    for (int64_t j = i - reach; j <= i + reach; ++j) sum += steps[static_cast<size_t>(j)].loss;
    out.emplace_back(static_cast<double>(steps[static_cast<size_t>(i)].step), sum / static_cast<double>(2 * reach + 1));
  }
  return out;
}

std::vector<Curve> curves_of(const Report& report, const std::string& task, double ratio) {
  std::vector<Curve> curves;
  for (const std::string& method : report.method_order) {
    for (const RunResult& run : report.runs) {
      if (run.task != task || run.method != method || run.curve.size() < 2 || (run.ratio != 0 && run.ratio != ratio))
        continue;
      Curve curve{.method = method, .loss = smoothed(run.curve)};
      for (const TrainedStep& s : run.curve) curve.beta.emplace_back(static_cast<double>(s.step), s.beta);
      curve.first_bytes = static_cast<double>(run.curve.front().live_bytes);
      curve.last_bytes = static_cast<double>(run.curve.back().live_bytes);
      curves.push_back(std::move(curve));
      break;  // the first seed
    }
  }
  return curves;
}

// beta as an area under the loss, on the same steps.
void draw_beta(Svg& svg, const Frame& f, const std::vector<Curve>& curves, const Report& report, double width,
               double top, double bottom) {
  const SvgScale y{.low = 0, .high = 1, .from = bottom, .to = top};
  svg.text(f.left - 8, y(1) + 4, "1", "end", kAxis);
  svg.text(f.left - 8, y(0) + 4, "0", "end", kAxis);
  svg.text(14, (top + bottom) / 2 + 4, "β", "middle", "class=\"name\"");
  svg.line(f.left, bottom, width - f.right, bottom, "class=\"base\"");
  for (const Curve& curve : curves) {
    std::vector<std::pair<double, double>> points;
    for (const auto& [step, beta] : curve.beta) points.emplace_back(f.x(step), y(beta));
    if (curve.beta.front().second <= 0) continue;
    const std::string color = method_color(report, curve.method);
    svg.area(points, bottom, fmt::format("fill=\"{}\" fill-opacity=\".13\"", color));
    svg.polyline(points, fmt::format("stroke=\"{}\" stroke-width=\"1.8\"", color));
    const auto end = std::find_if(curve.beta.begin(), curve.beta.end(), [](const auto& p) { return p.second == 0; });
    if (end == curve.beta.end() || curve.first_bytes <= curve.last_bytes) continue;
    svg.line(f.x(end->first), f.top, f.x(end->first), bottom, "class=\"mark\"");
    svg.text(f.x(end->first) + 6, top + 10,
             fmt::format("originals released: weights {} → {}", human_bytes(static_cast<int64_t>(curve.first_bytes)),
                         human_bytes(static_cast<int64_t>(curve.last_bytes))),
             "start", "class=\"note\"");
    break;
  }
}

}  // namespace

std::string training_chart(const Report& report, const ReportTask& task, double ratio, double width, double height) {
  const std::vector<Curve> curves = curves_of(report, task.name, ratio);
  if (curves.empty()) return "";
  double low = 1e300, high = 0, last = 2;
  for (const Curve& curve : curves) {
    for (const auto& [step, loss] : curve.loss) {
      if (loss > 0) low = std::min(low, loss), high = std::max(high, loss);
      last = std::max(last, step);
    }
  }
  low = std::max(low, high * 1e-5);
  Svg svg(width, height, fmt::format("{}: training loss and beta over steps", task.title));
  const double beta_height = 46, gap = 16;
  Frame f;
  f.x = {.low = 1, .high = last, .from = f.left, .to = width - f.right};
  f.y = {.low = low / 1.15,
         .high = high * 1.15,
         .from = height - f.bottom - beta_height - gap,
         .to = f.top,
         .logarithmic = true};
  for (const double v : log_ticks(f.y.low, f.y.high)) {
    svg.line(f.left, f.y(v), width - f.right, f.y(v), kGrid);
    svg.text(f.left - 8, f.y(v) + 4, fmt::format("{:g}", v), "end", kAxis);
  }
  svg.text(14, (f.top + f.y.from) / 2, "training loss", "middle",
           fmt::format("class=\"name\" transform=\"rotate(-90 14 {:.0f})\"", (f.top + f.y.from) / 2));
  svg.line(f.left, f.y.from, width - f.right, f.y.from, "class=\"base\"");
  const std::vector<double> xs = nice_ticks(0, last, width > 450 ? 8 : 5);
  const double step = xs.size() > 1 ? xs[1] - xs[0] : 1;
  for (const double v : xs) {
    if (v >= 1) svg.text(f.x(v), height - f.bottom + 18, tick_text(v, step), "middle", kAxis);
  }
  svg.text((f.left + width - f.right) / 2, height - 6, "step", "middle", "class=\"name\"");
  for (const Curve& curve : curves) {
    std::vector<std::pair<double, double>> points;
    for (const auto& [s, loss] : curve.loss) points.emplace_back(f.x(s), f.y(std::max(loss, low)));
    const bool main = curve.method == report.featured;
    svg.polyline(points, fmt::format("stroke=\"{}\" stroke-width=\"{}\" stroke-linejoin=\"round\" opacity=\"{}\"",
                                     method_color(report, curve.method), main ? 2.6 : 1.6, main ? 1 : .85));
  }
  draw_beta(svg, f, curves, report, width, height - f.bottom - beta_height, height - f.bottom);
  return svg.str();
}

}  // namespace lightmoe
