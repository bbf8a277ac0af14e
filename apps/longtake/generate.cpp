#include "generate.h"

#include <fmt/format.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>

#include "base/error.h"
#include "device/device.h"
#include "media/frame_writer.h"
#include "models/wan/model_files.h"
#include "models/world/model.h"
#include "player.h"
#include "progress.h"
#include "setup.h"
#include "signals.h"

namespace longtake::cli {
namespace {

using Clock = std::chrono::steady_clock;

const Clock::time_point process_start = Clock::now();

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

std::unique_ptr<Player> make_player(const GenerateFlags& flags) {
  if (!flags.model.empty()) {
    if (wan::is_model(flags.model)) return make_wan_player(flags);
    std::error_code error;
    if (!std::filesystem::exists(std::filesystem::path(flags.model) / world::kConfigFile, error))
      throw Error(ErrorKind::kInput,
                  str(flags.model, ": expected a world model's ", world::kConfigFile,
                      " or a transformer of the Wan family, such as ",
                      "diffusion_pytorch_model.safetensors, found neither"));
  }
  return make_world_player(flags);
}

void print_summary(const RunStats& stats, const std::string& out) {
  const ChunkStats& last = stats.chunks.back();
  const auto mib = [](size_t bytes) { return static_cast<double>(bytes) / 0x1p20; };
  const size_t peak = peak_rss_bytes();
  const size_t named = stats.weight_bytes + last.cache_bytes + stats.workspace_bytes;
  const std::string named_parts =
      fmt::format("weights {:.0f} + cache {:.0f} + workspace {:.0f}", mib(stats.weight_bytes),
                  mib(last.cache_bytes), mib(stats.workspace_bytes));
  const bool on_cpu = stats.device == Device{}.to_string();
  const int64_t frames = stats.num_frames();
  fmt::print(stderr, "{}: {} frames, {:.1f} s of video\n", out, frames,
             static_cast<double>(frames) / stats.fps);
  fmt::print(stderr, "speed: {:.2f} frames/s on {} ({}), first frame {:.0f} ms after the start\n",
             stats.frames_per_second(), on_cpu ? str(stats.threads, " threads") : stats.device,
             stats.dtype, stats.first_frame_ms);
  if (on_cpu)
    fmt::print(stderr,
               "peak memory: {:.0f} MiB = {} + program, libraries and video encoder {:.0f}\n",
               mib(peak), named_parts, mib(peak > named ? peak - named : 0));
  else
    fmt::print(stderr, "memory of {}: {:.0f} MiB = {}; peak memory of the host: {:.0f} MiB\n",
               stats.device, mib(named), named_parts, mib(peak));
}

// Chunk after chunk into the writer until all frames are made or someone asks for a stop.
void play(Player& player, FrameWriter& writer, bool quiet, RunStats& stats) {
  const int64_t wanted = player.num_frames();
  Progress progress(wanted, quiet);
  const auto start = Clock::now();
  int64_t done = 0;
  while (done < wanted && stop_signal() == 0) {
    Stopwatch watch;
    const int64_t before = done;
    double write_ms = 0;
    bool is_writing = false;
    const auto write = [&](View rgb) {
      if (done == wanted) return;
      watch.lap_ms();
      is_writing = true;
      writer.write(rgb.data<uint8_t>());
      is_writing = false;
      write_ms += watch.lap_ms();
      if (done++ == 0) stats.first_frame_ms = ms_since(process_start);
      progress.show(done, player.last_chunk());
    };
    try {
      player.next_chunk(write);
    } catch (const Stopped&) {
      if (done == before) break;
    } catch (const Error& error) {
      if (is_writing) throw;  // the writer says itself how far it came
      throw Error(error.kind(), str(error.what(), "; stopped after ", done, " frames"));
    }
    ChunkStats chunk = player.last_chunk();
    chunk.num_frames = done - before;
    chunk.write_ms = write_ms;
    stats.chunks.push_back(chunk);
    stats.wall_ms = ms_since(start);
  }
  writer.close();
}

}  // namespace

int generate(const GenerateFlags& flags) {
  catch_stop_signals();
  choose_device(flags.device);
  if (flags.out.empty())
    throw Error(ErrorKind::kUsage,
                "--out: expected FILE.mp4 or a folder of PNG frames, found none");
  const auto player = make_player(flags);
  if (!flags.stats.empty()) expect_writable("--stats", flags.stats);
  expect_writable_place("--out", flags.out);

  player->load();
  RunStats stats = player->describe();
  const auto writer = open_frame_writer(flags.out, static_cast<int>(stats.frame_width),
                                        static_cast<int>(stats.frame_height), stats.fps);
  play(*player, *writer, flags.quiet, stats);
  stats.interrupted = stop_signal() != 0;
  stats.workspace_bytes = player->workspace_bytes();
  player->save();
  if (!flags.stats.empty()) write_file("--stats", flags.stats, stats.to_json());
  if (stats.interrupted)
    throw Error(str(stop_signal() == SIGINT ? "SIGINT" : "SIGTERM", ": expected ",
                    player->num_frames(), " frames, found a request to stop; ",
                    writer->frames_written(), " kept in ", flags.out));
  if (!flags.quiet) print_summary(stats, flags.out);
  return 0;
}

}  // namespace longtake::cli
