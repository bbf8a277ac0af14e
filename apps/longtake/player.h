// Player: one video of one model family, as `generate` meets it. The flags are checked when it is
// made; what takes time comes after.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "command_line.h"
#include "pipeline/stats.h"
#include "tensor/tensor.h"

namespace longtake::cli {

// Receives one frame [height, width, 3] u8, valid during the call.
using FrameSink = std::function<void(View rgb)>;

// Thrown out of a chunk when a signal asks for a stop.
struct Stopped {};

class Player {
 public:
  virtual ~Player() = default;

  virtual int64_t num_frames() const = 0;  // to be made

  // Weights, prompts, given pictures: all that comes before the first frame.
  virtual void load() = 0;

  // What is played and where, without chunks. After load().
  virtual RunStats describe() const = 0;

  // Makes the next chunk and hands out its frames, of which the last chunk's may be too many. May
  // throw Stopped.
  virtual void next_chunk(const FrameSink& rgb) = 0;

  // What it cost.
  virtual const ChunkStats& last_chunk() const = 0;

  virtual size_t workspace_bytes() const = 0;

  // What the flags want written at the end, also after a stop.
  virtual void save() {}
};

// Both throw Error for anything wrong with flags and files that shows without loading weights.
std::unique_ptr<Player> make_world_player(const GenerateFlags& flags);
std::unique_ptr<Player> make_wan_player(const GenerateFlags& flags);

}  // namespace longtake::cli
