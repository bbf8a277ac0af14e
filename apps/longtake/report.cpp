#include "report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

#include "base/error.h"
#include "io/mapped_file.h"

namespace longtake::cli {
namespace {

std::string figure(double value, int digits) {
  return std::isfinite(value) ? fmt::format("{:.{}f}", value, digits) : "-";
}

std::string ms(double value) {
  return figure(value, value < 10 ? 2 : 1);
}

std::string percent(double value) {
  return std::isfinite(value) ? fmt::format("{:.1f}", 100 * value) : "-";
}

// Mean over layers and probes.
AttentionScore over(const std::vector<AttentionScore>& layers) {
  AttentionScore sum;
  for (const AttentionScore& layer : layers) sum.add(layer);
  if (sum.count > 0) return sum.mean();
  constexpr double kUnknown = NAN;
  return {kUnknown, kUnknown, kUnknown, kUnknown, kUnknown, kUnknown, kUnknown, 0};
}

struct Column {
  const char* head;
  const char* unit;
  std::string (*cell)(const MethodResult& row);
  bool is_cost;             // else quality
  const char* explanation;  // short; docs/compare.md has the whole
};

const std::vector<Column>& columns() {
  using Row = const MethodResult&;
  static const std::vector<Column> all = {
      {"method", "", [](Row r) { return r.name; }, false, ""},
      {"lock step", "dB", [](Row r) { return figure(r.lockstep_psnr.value(), 1); }, false,
       "the next frame against dense attention's, both with the same past: what the method itself "
       "costs"},
      {"rel. L2", "", [](Row r) { return figure(r.lockstep_l2.value(), 4); }, false,
       "the same of its latent"},
      {"recall", "%", [](Row r) { return percent(over(r.layers).recall); }, false,
       "of dense attention's mass, on keys that were read; of merged keys, on those that some "
       "entry stands for"},
      {"oracle", "%", [](Row r) { return percent(over(r.layers).oracle); }, false,
       "what the best choice of as many keys would have, query by query"},
      {"overlap", "%", [](Row r) { return percent(over(r.layers).overlap); }, false,
       "of the mass, where dense attention has it too"},
      {"at least", "%",
       [](Row r) {
         const AttentionScore all_layers = over(r.layers);
         return all_layers.bound < 1 ? percent(1 - all_layers.bound) : std::string("-");
       },
       false, "overlap that the cache can promise by itself"},
      {"prompt recall", "%", [](Row r) { return percent(over(r.prompt_layers).recall); }, false,
       "mass on the prompt tokens that were kept"},
      {"of", "%", [](Row r) { return percent(over(r.prompt_layers).density); }, false,
       "share of the prompt tokens that were kept"},
      {"free 64", "dB", [](Row r) { return figure(r.early_psnr.value(), 1); }, false,
       "playing on its own: against the dense run, over the first 64 frames that were made"},
      {"free", "dB", [](Row r) { return figure(r.psnr.value(), 1); }, false,
       "the same over all frames, by which rollouts have drifted apart, good ones too"},
      {"SSIM", "", [](Row r) { return figure(r.ssim.value(), 3); }, false,
       "structural similarity to the dense run"},
      {"seen land", "dB", [](Row r) { return figure(r.seen_psnr.value(), 1); }, false,
       "against the truth, where the camera is over land that it was shown"},
      {"return", "dB", [](Row r) { return figure(r.return_psnr.value(), 1); }, false,
       "between own frames of one place, more than 100 frames apart, on land that the model made "
       "up"},
      {"sharp", "", [](Row r) { return figure(r.sharpness.value(), 2); }, false,
       "mean gradient over the truth's"},
      {"density", "%", [](Row r) { return percent(r.density.value()); }, true,
       "pairs of a query and a key over those of dense attention"},
      {"ms/chunk", "", [](Row r) { return ms(r.chunk_ms); }, true,
       "time of a frame; medians over the last quarter of the frames"},
      {"denoise", "ms", [](Row r) { return ms(r.denoise_ms); }, true, "of it, the sampling steps"},
      {"select", "ms", [](Row r) { return ms(r.select_ms); }, true,
       "of those, choosing what to read"},
      {"clean", "ms", [](Row r) { return ms(r.clean_ms); }, true,
       "the pass that remembers the frame"},
      {"commit", "ms", [](Row r) { return ms(r.commit_ms); }, true,
       "of that, hashing, matching and merging"},
      {"at 100", "ms", [](Row r) { return ms(r.early_ms); }, true,
       "time of a frame about frame 100: whether time grows"},
      {"speed-up", "",
       [](Row r) { return std::isfinite(r.speed_up) ? str("x", figure(r.speed_up, 2)) : "-"; },
       true, "over dense attention at the same frames"},
      {"cache", "MiB", [](Row r) { return figure(r.cache_bytes.value() / 0x1p20, 1); }, true,
       "history held at the end"},
      {"growth", "KiB/frame", [](Row r) { return figure(r.cache_growth.value() / 0x1p10, 1); },
       true, "of the history, over the second half of the frames"},
  };
  return all;
}

// Those that have something to say of any method.
std::vector<const Column*> shown_columns(const ComparisonResult& result) {
  std::vector<const Column*> shown;
  for (const Column& column : columns()) {
    const auto says = [&](const MethodResult& row) {
      const std::string cell = column.cell(row);
      return cell != "-";
    };
    if (std::any_of(result.methods.begin(), result.methods.end(), says)) shown.push_back(&column);
  }
  return shown;
}

using nlohmann::ordered_json;

ordered_json number(double value) {
  return std::isfinite(value) ? ordered_json(value) : ordered_json();
}

ordered_json series_json(const std::vector<Mean>& series) {
  ordered_json out = ordered_json::array();
  for (const Mean& mean : series) out.push_back(number(mean.value()));
  return out;
}

ordered_json scenarios_json(const std::vector<ScenarioFigures>& scenarios,
                            double ScenarioFigures::*figure) {
  ordered_json out = ordered_json::array();
  for (const ScenarioFigures& scenario : scenarios) out.push_back(number(scenario.*figure));
  return out;
}

ordered_json score_json(const AttentionScore& score) {
  return {{"recall", number(score.recall)},
          {"oracle_recall", number(score.oracle)},
          {"overlap", number(score.overlap)},
          {"output_error", number(score.error)},
          {"moved_mass_bound", number(score.bound)},
          {"density", number(score.density)},
          {"tile_density", number(score.tile_density)}};
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else
      out += c;
  }
  return out;
}

std::string base64(std::span<const std::byte> bytes) {
  constexpr const char* kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    const size_t have = std::min<size_t>(3, bytes.size() - i);
    uint32_t word = 0;
    for (size_t k = 0; k < 3; ++k)
      word = word << 8 | (k < have ? static_cast<uint32_t>(bytes[i + k]) : 0U);
    for (size_t k = 0; k < 4; ++k) out += k <= have ? kDigits[word >> (18 - 6 * k) & 63U] : '=';
  }
  return out;
}

struct Curve {
  std::string name;
  std::vector<std::pair<double, double>> points;
  size_t method;  // says its colour and whether it is dashed
  bool dots = false;
  bool named = false;  // dots have the name beside them
};

constexpr size_t kColours = 10;  // of the palette in the page's style; then dashed ones

struct Axis {
  bool from_zero = false;
  double most = INFINITY;  // there is nothing above
};

// A round step for about four ticks over `range`.
double tick_step(double range) {
  const double raw = range / 4;
  const double power = std::pow(10, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0, 10.0}) {
    if (factor * power >= raw) return factor * power;
  }
  return 10 * power;
}

std::string plot(const std::string& title, const std::string& x_label, const std::string& y_label,
                 const std::vector<Curve>& curves, const Axis& axis) {
  constexpr double kWidth = 520, kHeight = 280, kLeft = 56, kRight = 12, kTop = 12, kBottom = 42;
  double x0 = INFINITY, x1 = -INFINITY, y0 = axis.from_zero ? 0 : INFINITY, y1 = -INFINITY;
  for (const Curve& curve : curves) {
    for (const auto& [x, y] : curve.points) {
      x0 = std::min(x0, x);
      x1 = std::max(x1, x);
      y0 = std::min(y0, y);
      y1 = std::max(y1, y);
    }
  }
  if (!(x1 >= x0)) return {};
  if (x1 == x0) x1 = x0 + 1;
  if (y1 == y0) y1 = y0 + 1;
  const double y_step = tick_step(y1 - y0), x_step = tick_step(x1 - x0);
  y0 = std::floor(y0 / y_step) * y_step;
  y1 = std::min(std::ceil(y1 / y_step) * y_step, std::max(y1, axis.most));
  const auto px = [&](double x) {
    return kLeft + (x - x0) / (x1 - x0) * (kWidth - kLeft - kRight);
  };
  const auto py = [&](double y) {
    return kHeight - kBottom - (y - y0) / (y1 - y0) * (kHeight - kTop - kBottom);
  };
  std::string svg = fmt::format(
      "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {} {}\" role=\"img\" "
      "aria-label=\"{}\">",
      escaped(title), kWidth, kHeight, escaped(title));
  for (double y = y0; y <= y1 + y_step / 2; y += y_step)
    svg += fmt::format(
        "<line class=\"grid\" x1=\"{:.1f}\" x2=\"{:.1f}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/>"
        "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\">{:g}</text>",
        kLeft, kWidth - kRight, py(y), py(y), kLeft - 6, py(y) + 4,
        std::round(y / y_step) * y_step);
  for (double x = std::ceil(x0 / x_step) * x_step; x <= x1; x += x_step)
    svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{:g}</text>", px(x),
                       kHeight - kBottom + 16, x);
  svg += fmt::format(
      "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>"
      "<text transform=\"translate(12 {:.1f}) rotate(-90)\" text-anchor=\"middle\">{}</text>",
      (kLeft + kWidth - kRight) / 2, kHeight - 6, escaped(x_label), (kTop + kHeight - kBottom) / 2,
      escaped(y_label));
  for (const Curve& curve : curves) {
    std::string path;
    for (const auto& [x, y] : curve.points) {
      path += fmt::format("{}{:.1f} {:.1f}", path.empty() ? "M" : "L", px(x), py(y));
      if (curve.dots)
        svg += fmt::format(
            "<circle class=\"c{}\" cx=\"{:.1f}\" cy=\"{:.1f}\" r=\"3.5\"><title>{}: "
            "{:.3g}, {:.3g}</title></circle>",
            curve.method % kColours, px(x), py(y), escaped(curve.name), x, y);
      if (!curve.named) continue;
      const bool left = px(x) > kWidth * 0.6;
      svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"{}\">{}</text>",
                         px(x) + (left ? -6 : 6), py(y) + 4, left ? "end" : "start",
                         escaped(curve.name));
    }
    if (!curve.dots)
      svg += fmt::format(
          "<path class=\"c{}\"{} d=\"{}\"><title>{}</title></path>", curve.method % kColours,
          curve.method < kColours ? "" : " stroke-dasharray=\"5 3\"", path, escaped(curve.name));
  }
  return svg + "</svg></figure>\n";
}

// Means of `width` frames in a row, so that a curve shows its course and not its noise.
std::vector<std::pair<double, double>> smoothed(const std::vector<Mean>& series, double scale,
                                                size_t width) {
  std::vector<std::pair<double, double>> points;
  for (size_t begin = 0; begin < series.size(); begin += width) {
    Mean mean;
    for (size_t i = begin; i < std::min(series.size(), begin + width); ++i) {
      if (series[i].count() > 0) mean.add(series[i].value());
    }
    if (mean.count() > 0)
      points.emplace_back(static_cast<double>(begin) + static_cast<double>(width) / 2,
                          scale * mean.value());
  }
  return points;
}

constexpr const char* kStyle = R"(<style>
:root{--bg:#fbfaf7;--fg:#1c1b19;--dim:#6d6a63;--rule:#dcd8cf;
--c0:#1c1b19;--c1:#c2410c;--c2:#0369a1;--c3:#15803d;--c4:#7e22ce;--c5:#a88400;--c6:#0f766e;--c7:#be185d;--c8:#4d7c0f;--c9:#4338ca}
@media(prefers-color-scheme:dark){:root{--bg:#161513;--fg:#ece9e2;--dim:#9b978d;--rule:#38352f;
--c0:#ece9e2;--c1:#fb923c;--c2:#38bdf8;--c3:#4ade80;--c4:#c084fc;--c5:#fde047;--c6:#2dd4bf;--c7:#f472b6;--c8:#a3e635;--c9:#818cf8}}
body{margin:0 auto;max-width:1180px;padding:2rem 1.2rem 4rem;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.7rem;margin:0}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}p,.dim{color:var(--dim);max-width:46rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13px}
th,td{padding:.32rem .6rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
th{font-weight:600;vertical-align:bottom}th small{display:block;font-weight:400;color:var(--dim)}
th:first-child,td:first-child{text-align:left}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:1.4rem}
figure{margin:0}figcaption{font-weight:600;font-size:13px;margin-bottom:.2rem}svg{width:100%;height:auto}
svg text{font-size:11px;fill:var(--dim)}.grid{stroke:var(--rule)}path{fill:none;stroke-width:1.8}
.videos{display:grid;grid-template-columns:repeat(auto-fill,minmax(256px,1fr));gap:.9rem}
video{width:100%;display:block;image-rendering:pixelated;border-radius:3px}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;font-size:13px;margin:.4rem 0 1rem}.key i{display:inline-block;width:1.3em;margin-right:.4em;vertical-align:middle}
.bar{display:flex;gap:.8rem;align-items:center;margin:.6rem 0}.bar input{flex:1}button{font:inherit;padding:.2rem .9rem}
code{font-size:12px;overflow-wrap:anywhere}
details{font-size:13px;color:var(--dim);margin:.5rem 0}summary{cursor:pointer}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;max-width:46rem}dt{color:var(--fg)}dd{margin:0}
)";

constexpr const char* kScript = R"(<script>
const videos=[...document.querySelectorAll('video')],play=document.getElementById('play'),seek=document.getElementById('seek');
if(play){play.onclick=()=>{const run=videos[0].paused;play.textContent=run?'pause':'play';videos.forEach(v=>{v.currentTime=videos[0].currentTime;run?v.play():v.pause()})};
seek.oninput=()=>videos.forEach(v=>v.currentTime=seek.value*v.duration);
videos[0].ontimeupdate=()=>{seek.value=videos[0].currentTime/videos[0].duration};
videos[0].onended=()=>{play.textContent='play'}}
</script>)";

// Method by method: its quality or its cost, and what the columns say.
std::string html_table(const ComparisonResult& result, bool costs) {
  std::string head, rows, notes;
  const std::vector<const Column*> shown = shown_columns(result);
  const auto is_here = [&](const Column* column) {
    return column == shown.front() || column->is_cost == costs;
  };
  for (const Column* column : shown) {
    if (!is_here(column)) continue;
    head += fmt::format("<th title=\"{}\">{}<small>{}</small></th>", column->explanation,
                        column->head, column->unit);
    if (column != shown.front())
      notes += fmt::format("<dt>{}</dt><dd>{}</dd>", column->head, column->explanation);
  }
  for (const MethodResult& row : result.methods) {
    rows += "<tr>";
    for (const Column* column : shown) {
      if (is_here(column)) rows += str("<td>", escaped(column->cell(row)), "</td>");
    }
    rows += "</tr>";
  }
  return fmt::format(
      "<h2>{}</h2><div class=\"scroll\"><table><tr>{}</tr>{}</table></div><details><summary>What "
      "the columns say</summary><dl>{}</dl></details>\n",
      costs ? "Cost" : "Quality", head, rows, notes);
}

// One dot a method, by name; nothing where speed or errors were not measured.
std::string speed_beside_error(const ComparisonResult& result) {
  const auto points_of = [&](const Mean MethodResult::*error) {
    std::vector<Curve> curves;
    for (size_t m = 1; m < result.methods.size(); ++m) {
      const MethodResult& row = result.methods[m];
      const double y = (row.*error).value();
      if (std::isfinite(row.speed_up) && std::isfinite(y))
        curves.push_back({row.name, {{row.speed_up, y}}, m, true, true});
    }
    return curves;
  };
  const std::string plots = plot("Lock step", "times as fast as dense", "dB to dense",
                                 points_of(&MethodResult::lockstep_psnr), {}) +
                            plot("Free running, first 64 frames", "times as fast as dense",
                                 "dB to dense", points_of(&MethodResult::early_psnr), {});
  if (plots.empty()) return {};
  return "<h2>Speed beside error</h2><div class=\"grid2\">" + plots + "</div>";
}

std::string threads_text(const ComparisonResult& result) {
  const std::string threads = str(result.threads, result.threads == 1 ? " thread" : " threads");
  if (result.jobs == 1) return threads;
  return str(threads, " a play, ", result.jobs,
             " plays side by side: times are those of a busy machine");
}

// What the comparison itself cost.
std::string seconds_text(const ComparisonResult& result) {
  return fmt::format(
      "{:.0f} s, in which free running took {:.0f} s, lock step {:.0f} s and judging {:.0f} s",
      result.seconds, result.free_s, result.lockstep_s, result.judged_s);
}

}  // namespace

std::string to_table(const ComparisonResult& result) {
  std::vector<std::vector<std::string>> cells = {{}, {}};
  const std::vector<const Column*> shown = shown_columns(result);
  for (const Column* column : shown) {
    cells[0].emplace_back(column->head);
    cells[1].emplace_back(column->unit);
  }
  for (const MethodResult& row : result.methods) {
    cells.emplace_back();
    for (const Column* column : shown) cells.back().push_back(column->cell(row));
  }
  std::string text;
  std::vector<size_t> widths(shown.size(), 0);
  for (const auto& line : cells) {
    for (size_t i = 0; i < line.size(); ++i) widths[i] = std::max(widths[i], line[i].size());
  }
  for (const auto& line : cells) {
    for (size_t i = 0; i < line.size(); ++i)
      text += i == 0 ? fmt::format("{:<{}}", line[i], widths[i])
                     : fmt::format("  {:>{}}", line[i], widths[i]);
    text += '\n';
  }
  return str(text, threads_text(result), '\n', seconds_text(result), '\n');
}

std::string to_json(const ComparisonResult& result) {
  ordered_json methods = ordered_json::array();
  for (const MethodResult& row : result.methods) {
    const auto by_layer = [](const std::vector<AttentionScore>& layers) {
      ordered_json out = ordered_json::array();
      for (const AttentionScore& layer : layers) {
        if (layer.count > 0) out.push_back(score_json(layer.mean()));
      }
      return out;
    };
    ordered_json by_scenario;
    for (const auto& [key, figure] : {std::pair("lockstep_psnr", &ScenarioFigures::lockstep_psnr),
                                      std::pair("psnr_first_64", &ScenarioFigures::early_psnr),
                                      std::pair("psnr", &ScenarioFigures::psnr),
                                      std::pair("seen_land_psnr", &ScenarioFigures::seen_psnr),
                                      std::pair("return_psnr", &ScenarioFigures::return_psnr),
                                      std::pair("sharpness", &ScenarioFigures::sharpness)})
      by_scenario[key] = scenarios_json(row.scenarios, figure);
    methods.push_back({{"name", row.name},
                       {"options", row.options},
                       {"lockstep",
                        {{"probes", row.lockstep_psnr.count()},
                         {"psnr", number(row.lockstep_psnr.value())},
                         {"ssim", number(row.lockstep_ssim.value())},
                         {"relative_l2", number(row.lockstep_l2.value())},
                         {"attention", score_json(over(row.layers))},
                         {"layers", by_layer(row.layers)},
                         {"prompt", score_json(over(row.prompt_layers))},
                         {"prompt_layers", by_layer(row.prompt_layers)}}},
                       {"free",
                        {{"psnr", number(row.psnr.value())},
                         {"psnr_first_64", number(row.early_psnr.value())},
                         {"ssim", number(row.ssim.value())},
                         {"seen_land_psnr", number(row.seen_psnr.value())},
                         {"return_psnr", number(row.return_psnr.value())},
                         {"return_pairs", row.return_psnr.count()},
                         {"sharpness", number(row.sharpness.value())}}},
                       {"chunk_ms", number(row.chunk_ms)},
                       {"denoise_ms", number(row.denoise_ms)},
                       {"select_ms", number(row.select_ms)},
                       {"clean_ms", number(row.clean_ms)},
                       {"commit_ms", number(row.commit_ms)},
                       {"decode_ms", number(row.decode_ms)},
                       {"frame_100_ms", number(row.early_ms)},
                       {"speed_up", number(row.speed_up)},
                       {"density", number(row.density.value())},
                       {"cache_bytes", number(row.cache_bytes.value())},
                       {"cache_entries", number(row.cache_entries.value())},
                       {"cache_growth_bytes", number(row.cache_growth.value())},
                       {"merged_keys", row.merged_keys},
                       {"evicted_keys", row.evicted_keys},
                       {"by_scenario", by_scenario},
                       {"series",
                        {{"ms", series_json(row.series.ms)},
                         {"cache_bytes", series_json(row.series.cache_bytes)},
                         {"merged_keys", series_json(row.series.merged_keys)},
                         {"psnr", series_json(row.series.psnr)},
                         {"lockstep_psnr", series_json(row.series.lockstep_psnr)}}}});
  }
  const ordered_json root = {{"version", 1},
                             {"model", result.model},
                             {"dtype", result.dtype},
                             {"device", result.device},
                             {"threads", result.threads},
                             {"jobs", result.jobs},
                             {"frames", result.num_frames},
                             {"primed_frames", result.num_primed},
                             {"scenarios", result.num_scenarios},
                             {"scenario_names", result.scenarios},
                             {"peak_rss_bytes", result.peak_rss_bytes},
                             {"seconds",
                              {{"all", result.seconds},
                               {"free", result.free_s},
                               {"lockstep", result.lockstep_s},
                               {"judged", result.judged_s}}},
                             {"methods", methods}};
  return root.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

std::string to_html(const ComparisonResult& result, const std::string& folder) {
  constexpr size_t kSmooth = 8;
  std::string page =
      "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" "
      "content=\"width=device-width\"><title>longtake: comparison</title>";
  page += kStyle + std::string("</style>");
  page += fmt::format(
      "<h1>longtake: comparison</h1><p>{} played, {} frames each, the first {} given; model {}, {} "
      "on {}, {}. The first method is dense attention over the whole history; all errors "
      "are against it unless they name the truth. The comparison took {}.</p>",
      str(result.num_scenarios, result.num_scenarios == 1 ? " scenario" : " scenarios"),
      result.num_frames, result.num_primed, escaped(result.model), result.dtype, result.device,
      threads_text(result), seconds_text(result));
  page += html_table(result, false) + html_table(result, true);
  page += speed_beside_error(result);
  page += "<h2>Over time</h2><div class=\"key\">";
  for (size_t m = 0; m < result.methods.size(); ++m)
    page += fmt::format("<span><i style=\"border-top:3px {} var(--c{})\"></i>{}</span>",
                        m < kColours ? "solid" : "dotted", m % kColours,
                        escaped(result.methods[m].name));
  page += "</div><style>";
  for (size_t c = 0; c < kColours; ++c)
    page += fmt::format("path.c{0}{{stroke:var(--c{0})}}circle.c{0}{{fill:var(--c{0})}}", c);
  page += "</style><div class=\"grid2\">";

  std::vector<Curve> speed, memory, quality, lockstep, merged, recall;
  for (size_t m = 0; m < result.methods.size(); ++m) {
    const MethodResult& row = result.methods[m];
    const auto curve = [&](const std::vector<Mean>& series, double scale, size_t width) {
      return Curve{row.name, smoothed(series, scale, width), m};
    };
    speed.push_back(curve(row.series.ms, 1, kSmooth));
    for (auto& point : speed.back().points) point.second = 1000 / point.second;
    memory.push_back(curve(row.series.cache_bytes, 1 / 0x1p20, kSmooth));
    merged.push_back(curve(row.series.merged_keys, 1e-3, kSmooth));
    if (m == 0) continue;
    quality.push_back(curve(row.series.psnr, 1, kSmooth));
    lockstep.push_back(curve(row.series.lockstep_psnr, 1, 1));
    Curve& dots = recall.emplace_back(Curve{row.name, {}, m, true});
    for (const AttentionScore& layer : row.layers) {
      if (layer.count > 0)
        dots.points.emplace_back(100 * layer.mean().density, 100 * layer.mean().recall);
    }
  }
  page += plot("Speed", "frame", "frames/s", speed, {.from_zero = true});
  page += plot("History held", "frame", "MiB", memory, {.from_zero = true});
  page += plot("Free running: PSNR to dense", "frame", "dB", quality, {});
  page += plot("Lock step: PSNR of the next frame", "frame", "dB", lockstep, {});
  page +=
      plot("Dense mass kept, one dot a layer", "keys read, %", "recall, %", recall, {.most = 100});
  page += plot("Keys merged so far", "frame", "thousands", merged, {.from_zero = true});
  page += "</div>";

  std::string videos;
  for (const MethodResult& row : result.methods) {
    if (row.video.empty()) continue;
    const MappedFile file(folder + "/" + row.video);
    videos += fmt::format(
        "<figure><figcaption>{}</figcaption><video muted playsinline preload=\"auto\" "
        "src=\"data:video/mp4;base64,{}\"></video></figure>",
        escaped(row.name), base64(file.bytes()));
  }
  if (!videos.empty())
    page +=
        "<h2>The first scenario, side by side</h2><div class=\"bar\"><button "
        "id=\"play\">play</button><input id=\"seek\" type=\"range\" min=\"0\" max=\"1\" "
        "step=\"0.001\" value=\"0\" aria-label=\"position\"></div><div class=\"videos\">" +
        videos + "</div>";
  page += "<h2>Options</h2><div class=\"scroll\"><table>";
  for (const MethodResult& row : result.methods)
    page += fmt::format("<tr><td>{}</td><td style=\"text-align:left\"><code>{}</code></td></tr>",
                        escaped(row.name), escaped(row.options));
  return page + "</table></div>" + kScript + "</html>\n";
}

}  // namespace longtake::cli
