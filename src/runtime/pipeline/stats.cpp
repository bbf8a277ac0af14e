#include "pipeline/stats.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

namespace longtake {

namespace {

nlohmann::ordered_json by_layer(const std::vector<LayerError>& errors, double LayerError::*figure) {
  if (errors.empty()) return {};
  auto out = nlohmann::ordered_json::array();
  for (const LayerError& layer : errors) {
    const double value = layer.*figure;
    out.push_back(std::isfinite(value) ? nlohmann::ordered_json(value) : nlohmann::ordered_json());
  }
  return out;
}

}  // namespace

void add_cache(const KvCache& cache, ChunkStats& chunk) {
  chunk.cache_entries = std::max(chunk.cache_entries, cache.entries());
  chunk.cache_total_entries += cache.total_entries();
  chunk.merged_keys += cache.merge_counts().merged;
  chunk.evicted_keys += cache.merge_counts().evicted;
  chunk.cache_bytes += cache.bytes();
  chunk.cache_bytes_used += cache.bytes_used();
}

int64_t RunStats::num_frames() const {
  return std::accumulate(
      chunks.begin(), chunks.end(), int64_t{0},
      [](int64_t sum, const ChunkStats& chunk) { return sum + chunk.num_frames; });
}

double RunStats::frames_per_second() const {
  return wall_ms > 0 ? 1000.0 * static_cast<double>(num_frames()) / wall_ms : 0;
}

std::string RunStats::to_json() const {
  using nlohmann::ordered_json;
  ordered_json rows = ordered_json::array();
  for (size_t i = 0; i < chunks.size(); ++i) {
    const ChunkStats& c = chunks[i];
    rows.push_back({{"chunk", i},
                    {"first_frame", c.first_frame},
                    {"frames", c.num_frames},
                    {"denoise_ms", c.denoise_ms},
                    {"select_ms", c.select_ms},
                    {"clean_ms", c.clean_ms},
                    {"commit_ms", c.commit_ms},
                    {"decode_ms", c.decode_ms},
                    {"write_ms", c.write_ms},
                    {"density", c.density},
                    {"steps_run", c.steps_run},
                    {"cache_entries", c.cache_entries},
                    {"cache_total_entries", c.cache_total_entries},
                    {"merged_keys", c.merged_keys},
                    {"evicted_keys", c.evicted_keys},
                    {"moved_mass_bound", by_layer(c.errors, &LayerError::moved_mass_bound)},
                    {"commit_error", by_layer(c.errors, &LayerError::commit_error)},
                    {"watch_ms", c.watch_ms},
                    {"cache_bytes", c.cache_bytes},
                    {"cache_bytes_used", c.cache_bytes_used},
                    {"peak_rss_bytes", c.peak_rss_bytes}});
  }
  const ordered_json root = {{"version", 3},
                             {"model", model},
                             {"prompt", prompt},
                             {"method", method},
                             {"dtype", dtype},
                             {"device", device},
                             {"threads", threads},
                             {"seed", seed},
                             {"steps", num_steps},
                             {"width", frame_width},
                             {"height", frame_height},
                             {"fps", fps},
                             {"frames_per_second", frames_per_second()},
                             {"first_frame_ms", first_frame_ms},
                             {"wall_ms", wall_ms},
                             {"weight_bytes", weight_bytes},
                             {"workspace_bytes", workspace_bytes},
                             {"peak_rss_bytes", longtake::peak_rss_bytes()},
                             {"interrupted", interrupted},
                             {"chunks", rows}};
  return root.dump(2, ' ', false, ordered_json::error_handler_t::replace) + "\n";
}

size_t peak_rss_bytes() {
  struct rusage usage {};

  getrusage(RUSAGE_SELF, &usage);
  return static_cast<size_t>(usage.ru_maxrss) * 1024;  // Linux counts KiB
}

}  // namespace longtake
