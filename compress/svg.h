#pragma once
// Just enough SVG for the report's charts: shapes appended to a string, numbers independent of the locale, text escaped.
// Colours are CSS classes or values; no script, no external reference.

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lightmoe {

std::string escape_markup(std::string_view text);  // & < > " '

// Ticks at 1, 2 or 5 times a power of ten that cover [low, high], about `count` of them.
std::vector<double> nice_ticks(double low, double high, int count);
// Powers of ten and, where few of these fit, their 2 and 5 multiples, within [low, high]; low > 0.
std::vector<double> log_ticks(double low, double high);
std::string tick_text(double value, double step);

// Value to pixel, linear or logarithmic.
struct SvgScale {
  double low = 0, high = 1;  // values
  double from = 0, to = 1;   // pixels
  bool logarithmic = false;
  double operator()(double value) const;
};

enum class SvgMarker { kCircle, kSquare, kDiamond, kTriangle, kTriangleDown, kPlus, kCross, kRing };

class Svg {
 public:
  Svg(double width, double height, std::string_view title);  // title: read aloud by screen readers
  void rect(double x, double y, double width, double height, std::string_view attributes);
  void line(double x1, double y1, double x2, double y2, std::string_view attributes);
  void polyline(const std::vector<std::pair<double, double>>& points, std::string_view attributes);
  void area(const std::vector<std::pair<double, double>>& points, double base,
            std::string_view attributes);  // down to y = base
  void circle(double x, double y, double radius, std::string_view attributes);
  void marker(SvgMarker marker, double x, double y, double radius, std::string_view color);
  // anchor: start, middle, end.
  void text(double x, double y, std::string_view text, std::string_view anchor, std::string_view attributes = "");
  void tooltip(std::string_view text);  // of the shape appended last
  std::string str() const;              // the whole element

 private:
  std::string head_, body_;
};

}  // namespace lightmoe
