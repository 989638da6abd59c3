#include "compress/svg.h"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>

namespace lightmoe {
namespace {

// Two decimals are a hundredth of a pixel; without trailing zeros.
std::string px(double value) {
  std::string text = fmt::format("{:.2f}", value);
  while (text.back() == '0') text.pop_back();
  if (text.back() == '.') text.pop_back();
  return text == "-0" ? "0" : text;
}

}  // namespace

std::string escape_markup(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::vector<double> nice_ticks(double low, double high, int count) {
  if (!(high > low)) return {low};
  const double raw = (high - low) / std::max(1, count), power = std::pow(10, std::floor(std::log10(raw)));
  double step = power * 10;
  for (const double factor : {1., 2., 5.}) {
    if (power * factor >= raw * .999) {
      step = power * factor;
      break;
    }
  }
  std::vector<double> ticks;
  for (double i = std::ceil(low / step - 1e-9); i * step <= high + step * 1e-9; ++i) ticks.push_back(i * step);
  return ticks;
}

std::vector<double> log_ticks(double low, double high) {
  std::vector<double> ticks;
  const bool dense = std::log10(high / low) < 2.2;
  for (double power = std::pow(10, std::floor(std::log10(low))); power <= high; power *= 10) {
    for (const double factor : {1., 2., 5.}) {
      if ((factor == 1 || dense) && power * factor >= low * .999 && power * factor <= high * 1.001)
        ticks.push_back(power * factor);
    }
  }
  return ticks;
}

std::string tick_text(double value, double step) {
  const int decimals = step >= 1 ? 0 : static_cast<int>(std::ceil(-std::log10(step) - 1e-9));
  const std::string text = fmt::format("{:.{}f}", value, decimals);
  return text.find_first_not_of("-0.") == std::string::npos ? "0" : text;
}

double SvgScale::operator()(double value) const {
  const double part = logarithmic ? std::log(value / low) / std::log(high / low) : (value - low) / (high - low);
  return from + part * (to - from);
}

Svg::Svg(double width, double height, std::string_view title) {
  head_ = fmt::format(
      "<svg viewBox=\"0 0 {0} {1}\" width=\"{0}\" height=\"{1}\" role=\"img\" "
      "xmlns=\"http://www.w3.org/2000/svg\">\n<title>{2}</title>\n",
      px(width), px(height), escape_markup(title));
}

void Svg::rect(double x, double y, double width, double height, std::string_view attributes) {
  body_ += fmt::format("<rect x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\" {}/>\n", px(x), px(y), px(width), px(height),
                       attributes);
}

void Svg::line(double x1, double y1, double x2, double y2, std::string_view attributes) {
  body_ +=
      fmt::format("<line x1=\"{}\" y1=\"{}\" x2=\"{}\" y2=\"{}\" {}/>\n", px(x1), px(y1), px(x2), px(y2), attributes);
}

void Svg::polyline(const std::vector<std::pair<double, double>>& points, std::string_view attributes) {
  std::string list;
  for (const auto& [x, y] : points) list += px(x) + "," + px(y) + " ";
  body_ += fmt::format("<polyline points=\"{}\" fill=\"none\" {}/>\n", list, attributes);
}

void Svg::area(const std::vector<std::pair<double, double>>& points, double base, std::string_view attributes) {
  if (points.empty()) return;
  std::string list = px(points.front().first) + "," + px(base) + " ";
  for (const auto& [x, y] : points) list += px(x) + "," + px(y) + " ";
  body_ += fmt::format("<polygon points=\"{}{},{}\" {}/>\n", list, px(points.back().first), px(base), attributes);
}

void Svg::circle(double x, double y, double radius, std::string_view attributes) {
  body_ += fmt::format("<circle cx=\"{}\" cy=\"{}\" r=\"{}\" {}/>\n", px(x), px(y), px(radius), attributes);
}

void Svg::marker(SvgMarker marker, double x, double y, double r, std::string_view color) {
  const auto polygon = [&](std::initializer_list<std::pair<double, double>> corners) {
    std::string list;
    for (const auto& [dx, dy] : corners) list += px(x + dx * r) + "," + px(y + dy * r) + " ";
    body_ += fmt::format("<polygon points=\"{}\" fill=\"{}\" class=\"halo\"/>\n", list, color);
  };
  const auto stroke = fmt::format("stroke=\"{}\" stroke-width=\"2.2\" stroke-linecap=\"round\"", color);
  switch (marker) {
    case SvgMarker::kCircle:
      circle(x, y, r, fmt::format("fill=\"{}\" class=\"halo\"", color));
      break;
    case SvgMarker::kRing:
      circle(x, y, r * .9, fmt::format("class=\"paper\" stroke=\"{}\" stroke-width=\"2\"", color));
      break;
    case SvgMarker::kSquare:
      polygon({{-.85, -.85}, {.85, -.85}, {.85, .85}, {-.85, .85}});
      break;
    case SvgMarker::kDiamond:
      polygon({{0, -1.2}, {1.2, 0}, {0, 1.2}, {-1.2, 0}});
      break;
    case SvgMarker::kTriangle:
      polygon({{0, -1.15}, {1.1, .85}, {-1.1, .85}});
      break;
    case SvgMarker::kTriangleDown:
      polygon({{0, 1.15}, {1.1, -.85}, {-1.1, -.85}});
      break;
    case SvgMarker::kPlus:
      line(x - r, y, x + r, y, stroke);
      line(x, y - r, x, y + r, stroke);
      break;
    case SvgMarker::kCross:
      line(x - .8 * r, y - .8 * r, x + .8 * r, y + .8 * r, stroke);
      line(x - .8 * r, y + .8 * r, x + .8 * r, y - .8 * r, stroke);
      break;
  }
}

void Svg::text(double x, double y, std::string_view text, std::string_view anchor, std::string_view attributes) {
  body_ += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"{}\" {}>{}</text>\n", px(x), px(y), anchor, attributes,
                       escape_markup(text));
}

void Svg::tooltip(std::string_view text) {
  const size_t end = body_.rfind("/>\n");
  if (end == std::string::npos || end + 3 != body_.size()) return;
  const size_t begin = body_.rfind('<');
  const std::string element = body_.substr(begin + 1, body_.find(' ', begin) - begin - 1);
  body_.replace(end, 3, fmt::format("><title>{}</title></{}>\n", escape_markup(text), element));
}

std::string Svg::str() const { return head_ + body_ + "</svg>\n"; }

}  // namespace lightmoe
