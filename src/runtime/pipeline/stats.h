// What a run cost, chunk by chunk. docs/stats.md describes the JSON.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kv/cache.h"

namespace longtake {

// See ErrorWatch.
struct LayerError {
  // Attention mass that may lie elsewhere than it would with the whole history: mean over heads and
  // sampled queries, 0..1. NaN: not looked at.
  double moved_mass_bound = 0;
  // Relative L2 change of attention's output that the chunk's commit made, for the chunk's own
  // queries: what merged, and what was forgotten. NaN for the last layer, whose clean pass does not
  // attend.
  double commit_error = 0;
};

struct ChunkStats {
  int64_t first_frame = 0;
  int64_t num_frames = 1;
  double denoise_ms = 0;  // all sampling steps
  double select_ms = 0;   // part of it: choosing what sparse attention reads
  double clean_ms = 0;    // the pass whose keys and values join the history
  double commit_ms = 0;   // part of it: matching, merging and storing what joins the history
  double decode_ms = 0;   // latents to pixels
  double write_ms = 0;    // handing frames to the writer, waiting for it included
  // Query-key pairs of self attention over those of dense attention over the whole history.
  double density = 1;
  int64_t steps_run = 0;            // sampling steps that a step cache did not skip
  int64_t cache_entries = 0;        // keys remembered per head, largest layer, after the chunk
  int64_t cache_total_entries = 0;  // keys remembered by all heads of all layers
  int64_t merged_keys = 0;          // of all heads and layers so far: joined another key
  int64_t evicted_keys = 0;         // and forgotten over a budget
  size_t cache_bytes = 0;           // reserved by the caches of all layers
  size_t cache_bytes_used = 0;      // holding history
  size_t peak_rss_bytes = 0;        // of the process so far
  // What merging costs, by layer; empty where nobody looked. Looking took watch_ms, which is not
  // part of the others.
  std::vector<LayerError> errors;
  double watch_ms = 0;

  double total_ms() const { return denoise_ms + clean_ms + decode_ms + write_ms; }
};

// Adds what a layer remembers to the chunk's figures.
void add_cache(const KvCache& cache, ChunkStats& chunk);

// What was run and where; the head of the JSON.
struct RunStats {
  std::string model, prompt, method, dtype, device;
  int threads = 0;
  uint64_t seed = 0;
  int64_t num_steps = 0;
  int64_t frame_width = 0, frame_height = 0;
  double fps = 0;             // of the video
  double first_frame_ms = 0;  // from process start until the first frame was handed out
  double wall_ms = 0;         // from the first chunk's start to the last one's end
  size_t weight_bytes = 0;
  size_t workspace_bytes = 0;
  bool interrupted = false;
  std::vector<ChunkStats> chunks;

  int64_t num_frames() const;  // made
  double frames_per_second() const;
  std::string to_json() const;
};

// Peak resident memory of this process.
size_t peak_rss_bytes();

// Milliseconds since construction or the last lap.
class Stopwatch {
 public:
  double lap_ms() {
    const auto now = std::chrono::steady_clock::now();
    const double ms = std::chrono::duration<double, std::milli>(now - start_).count();
    start_ = now;
    return ms;
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace longtake
