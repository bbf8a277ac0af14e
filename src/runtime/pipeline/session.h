// Session: one rollout from prompt to frames. It owns the caches and the position; it can be saved,
// and a resumed session continues bit for bit.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "device/context.h"
#include "device/stage_clock.h"
#include "models/world/model.h"
#include "pipeline/error_watch.h"
#include "pipeline/frame_records.h"
#include "pipeline/rollout.h"
#include "pipeline/saved_session.h"
#include "pipeline/stats.h"

namespace longtake {

class Session {
 public:
  // Throws Error (kUsage) for an empty prompt or one longer than the model reads. ctx and model
  // must outlive the session.
  Session(Context& ctx, const world::Model& model, const SessionOptions& options);

  // Makes the next frame, seen from `camera`: rgb [H, W, 3] u8, valid until the next call. Its
  // costs are in last_chunk().
  View step(CameraPosition camera);

  // A frame that exists already (rgb [H, W, 3] u8) becomes the next one: it is only remembered.
  void remember(View rgb, CameraPosition camera);

  // Frames from here on follow another prompt; what is remembered stays. Throws as check_prompt.
  void set_prompt(const std::string& prompt);

  // Throws Error (kUsage) for an empty prompt or one longer than the model reads.
  static void check_prompt(const world::Model& model, const std::string& prompt);

  int64_t next_frame() const { return next_frame_; }

  // The latest frame's clean latent, [C, h, w] f32 on the context's device.
  View latent() const { return latent_; }

  // Of the latest frame; nullopt before the first.
  std::optional<CameraPosition> camera() const { return camera_; }

  const ChunkStats& last_chunk() const { return last_chunk_; }

  const SessionOptions& options() const { return options_; }

  // As Rollout::take_caches; the session is over.
  std::vector<std::unique_ptr<KvCache>> take_caches() { return rollout_.take_caches(); }

  // History and position as a file; notes are handed back by read_saved_session.
  void save(const std::string& path, const SessionNotes& notes) const;

  // Replaces history and position by a saved one of the same model, dtype, memory policy, seed and
  // number of steps; the prompt may differ. Throws Error (kInput).
  void load(const std::string& path);

 private:
  Tensor encode_prompt() const;
  void finish_frame(CameraPosition camera);
  SavedSession describe() const;

  Context& ctx_;
  const world::Model& model_;
  SessionOptions options_;
  Rollout rollout_;
  Tensor latent_;    // [C, h, w] f32
  Tensor pixels_;    // [H, W, 3] f32
  Tensor rgb_;       // [H, W, 3] u8
  Tensor host_rgb_;  // the same where the caller reads it
  FrameRecords records_;
  StageClock clock_;
  int64_t next_frame_ = 0;
  std::optional<CameraPosition> camera_;
  ChunkStats last_chunk_;
  std::unique_ptr<ErrorWatch> watch_;     // null: nobody looks
  double commit_ms_ = 0, select_ms_ = 0;  // of all layers so far
};

// The head of a state file; its history stays unread.
SavedSession read_saved_session(const std::string& path);

}  // namespace longtake
