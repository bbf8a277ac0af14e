#include "pipeline/scenario_run.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <span>

#include "base/error.h"
#include "media/frame_writer.h"
#include "metrics/error_bound.h"
#include "metrics/image.h"
#include "ops/copy.h"
#include "ops/image.h"
#include "pipeline/rollout.h"
#include "pipeline/session.h"

namespace longtake {
namespace {

constexpr int64_t kEarlyFrames = 64;

// Whether the method's history in lock step is that of dense attention, so that both need only one:
// it differs in what it reads at its sampling steps.
bool shares_history(const Method& method, const Method& dense) {
  const bool keeps_buckets = method.sparse_self && method.select.buckets == SelectBuckets::kPrompt;
  return method.memory.memory == "full" && !keeps_buckets &&
         method.step_cache.reuse == StepReuse::kNone && method.num_steps == dense.num_steps;
}

}  // namespace

MethodResult empty_row(const NamedMethod& named, const world::TransformerConfig& sizes,
                       int64_t num_frames) {
  MethodResult row;
  row.name = named.name;
  row.options = named.method.to_string();
  row.layers.resize(static_cast<size_t>(sizes.num_layers));
  row.prompt_layers.resize(row.layers.size());
  for (auto* series : {&row.series.ms, &row.series.cache_bytes, &row.series.merged_keys,
                       &row.series.psnr, &row.series.lockstep_psnr})
    series->resize(static_cast<size_t>(num_frames));
  return row;
}

ScenarioRun::ScenarioRun(const world::Model& model, const Scenario& scenario,
                         const std::vector<NamedMethod>& methods, const ComparisonOptions& options,
                         bool film, FrameHook next_frame)
    : model_(model),
      scenario_(scenario),
      methods_(methods),
      options_(options),
      film_(film && !options.video_folder.empty() && options.free_running),
      next_frame_(std::move(next_frame)),
      width_(model.config.transformer.frame_width()),
      height_(model.config.transformer.frame_height()),
      latent_{model.config.transformer.latent_channels, model.config.transformer.latent_height,
              model.config.transformer.latent_width} {
  for (const NamedMethod& named : methods)
    rows_.push_back(empty_row(named, model.config.transformer, scenario.num_frames()));
  chunks_.resize(methods.size());
}

int64_t ScenarioRun::num_frames(size_t method) const {
  const bool limited = options_.full_frames > 0 && methods_[method].method.memory.memory == "full";
  return limited ? std::min(options_.full_frames, scenario_.num_frames()) : scenario_.num_frames();
}

void ScenarioRun::render_truth() {
  if (scenario_.map == nullptr) return;
  for (int64_t frame = 0; frame < scenario_.num_frames(); ++frame) {
    truth_.emplace_back(frame_bytes());
    scenario_.render_truth(frame, truth_.back());
    seen_.push_back(seen_mask(scenario_, frame));
  }
  pairs_ = return_pairs(scenario_);
}

void ScenarioRun::play(Context& ctx, size_t method) {
  std::call_once(rendered_, [this] { render_truth(); });
  Recording own = record(ctx, method);
  if (method == 0) {
    dense_ = std::move(own);
    judge(0, dense_);
    std::vector<std::pair<size_t, Recording>> waiting;
    {
      const std::lock_guard lock(mutex_);
      has_dense_ = true;
      waiting.swap(waiting_);
    }
    for (const auto& [other, recording] : waiting) judge(other, recording);
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    if (!has_dense_) {
      waiting_.emplace_back(method, std::move(own));
      return;
    }
  }
  judge(method, own);
}

void ScenarioRun::release() {
  dense_ = {};
  truth_ = {};
  seen_ = {};
}

ScenarioRun::Recording ScenarioRun::record(Context& ctx, size_t method) {
  const int64_t count = num_frames(method);
  SessionOptions session_options;
  session_options.prompt = scenario_.prompt;
  session_options.seed = scenario_.seed;
  session_options.method = methods_[method].method;
  session_options.expected_frames = count;
  Session session(ctx, model_, session_options);
  std::unique_ptr<FrameWriter> writer;
  if (film_) {
    rows_[method].video = str("method", method, ".mp4");
    writer = open_frame_writer(options_.video_folder + "/" + rows_[method].video,
                               static_cast<int>(width_), static_cast<int>(height_),
                               world::kFramesPerSecond);
  }
  Recording recording;
  for (int64_t frame = 0; frame < count; ++frame) {
    next_frame_(methods_[method].name + ", free running", frame);
    const CameraPosition camera = scenario_.cameras[static_cast<size_t>(frame)];
    if (frame < scenario_.num_primed) {
      Frame given = truth_[static_cast<size_t>(frame)];
      session.remember(View(given.data(), DType::kU8, Device{}, {height_, width_, 3}), camera);
      recording.frames.push_back(std::move(given));
    } else {
      const View rgb = session.step(camera);
      recording.frames.emplace_back(rgb.data<uint8_t>(), rgb.data<uint8_t>() + rgb.numel());
      recording.chunks.push_back(session.last_chunk());
    }
    if (writer) writer->write(recording.frames.back().data());
    if (method > 0) continue;
    recording.latents.emplace_back(Device{}, DType::kF32, latent_);
    copy(ctx, session.latent(), recording.latents.back());
  }
  if (writer) writer->close();
  return recording;
}

// Free-running figures of a method.
void ScenarioRun::judge(size_t method, const Recording& own) {
  MethodResult& row = rows_[method];
  const std::vector<ChunkStats>& chunks = chunks_[method] = own.chunks;
  const auto primed = static_cast<size_t>(scenario_.num_primed);
  for (size_t i = 0; i < chunks.size(); ++i) {
    const size_t frame = primed + i;
    const Frame& picture = own.frames[frame];
    row.series.ms[frame].add(chunks[i].total_ms());
    row.series.cache_bytes[frame].add(static_cast<double>(chunks[i].cache_bytes_used));
    row.series.merged_keys[frame].add(static_cast<double>(chunks[i].merged_keys));
    if (method > 0 && frame < dense_.frames.size()) {
      const double quality = psnr(picture, dense_.frames[frame]);
      row.psnr.add(quality);
      row.series.psnr[frame].add(quality);
      if (static_cast<int64_t>(i) < kEarlyFrames) row.early_psnr.add(quality);
      row.ssim.add(ssim(picture, dense_.frames[frame], width_, height_));
    }
    if (truth_.empty()) continue;
    row.sharpness.add(gradient(picture, width_, height_) /
                      gradient(truth_[frame], width_, height_));
    const auto& mask = seen_[frame];
    if (static_cast<double>(std::count(mask.begin(), mask.end(), 1)) >=
        kSeenShare * static_cast<double>(mask.size()))
      row.seen_psnr.add(psnr(picture, truth_[frame], mask));
  }
  for (const ReturnPair pair : pairs_) {
    if (static_cast<size_t>(pair.late) >= own.frames.size()) continue;
    row.return_psnr.add(return_psnr(scenario_, pair, own.frames[static_cast<size_t>(pair.late)],
                                    own.frames[static_cast<size_t>(pair.early)]));
  }
  if (chunks.empty()) return;
  const ChunkStats& last = chunks.back();
  row.density.add(last.density);
  row.cache_bytes.add(static_cast<double>(last.cache_bytes_used));
  row.cache_entries.add(static_cast<double>(last.cache_entries));
  row.merged_keys += last.merged_keys;
  row.evicted_keys += last.evicted_keys;
  const size_t half = chunks.size() / 2;
  if (half > 0)
    row.cache_growth.add((static_cast<double>(last.cache_bytes_used) -
                          static_cast<double>(chunks[chunks.size() - 1 - half].cache_bytes_used)) /
                         static_cast<double>(half));
}

// Looks into attention at the last sparse step of a probe.
class ScenarioRun::Scorer final : public PassObserver {
 public:
  Scorer(const Rollout& rollout, std::span<const LayerState> dense, int64_t num_committed,
         int64_t frame, int64_t stride, MethodResult& row)
      : rollout_(rollout),
        dense_(dense),
        frame_(frame),
        num_committed_(num_committed),
        stride_(stride),
        row_(row) {}

  void on_self_attention(int64_t layer, const AttentionRead& read) override {
    if (rollout_.step() != rollout_.last_sparse_step()) return;
    const auto at = static_cast<size_t>(layer);
    const KvCache& own = *rollout_.layers()[at].memory.cache;
    // The dense history, and behind it the chunk in work as this method sees it.
    std::vector<PageList> lists;
    std::vector<std::vector<int32_t>> members;
    for (int64_t head = 0; head < read.kv.num_heads(); ++head) {
      const KvCache& all = *dense_[at].memory.cache;
      const PageList& pages = all.view().heads[static_cast<size_t>(head)];
      PageList list(pages.begin(), pages.begin() + all.num_history_pages(head));
      const PageList& mine = read.kv.heads[static_cast<size_t>(head)];
      list.insert(list.end(), mine.begin() + own.num_history_pages(head), mine.end());
      lists.push_back(std::move(list));
      members.push_back(own.members(head, num_committed_));
    }
    const auto scale = 1.0F / std::sqrt(static_cast<float>(read.kv.head_dim));
    AttentionScore score = score_attention(read.q, {read.kv.dtype, read.kv.head_dim, lists},
                                           read.kv, read.selection, members, scale, stride_);
    // Of what a selection leaves out nothing is known.
    score.bound = read.selection == nullptr ? moved_mass_bound(read.q, own, frame_, scale, stride_)
                                            : static_cast<double>(score.count);
    row_.layers[at].add(score);
  }

  void on_cross_attention(int64_t layer, const AttentionRead& read) override {
    const auto at = static_cast<size_t>(layer);
    const Prompt& prompt = rollout_.layers()[at].prompt;
    if (rollout_.step() != rollout_.last_sparse_step() || prompt.selector == nullptr) return;
    const auto scale = 1.0F / std::sqrt(static_cast<float>(read.kv.head_dim));
    row_.prompt_layers[at].add(score_attention(read.q, prompt.pages.view(), read.kv, nullptr,
                                               prompt.selector->members(), scale, stride_));
  }

 private:
  const Rollout& rollout_;
  std::span<const LayerState> dense_;
  int64_t frame_;
  int64_t num_committed_;
  int64_t stride_;
  MethodResult& row_;
};

void ScenarioRun::play_in_lockstep(Context& ctx) {
  const bool on_cpu = ctx.device().kind == DeviceKind::kCpu;
  const Tensor text = world::encode_prompt(ctx, model_, scenario_.prompt);
  const int64_t count = num_frames(0);
  std::vector<std::unique_ptr<Rollout>> rollouts;  // null: that of dense
  for (const NamedMethod& named : methods_) {
    if (on_cpu && !rollouts.empty() && shares_history(named.method, methods_[0].method)) {
      rollouts.push_back(nullptr);
      continue;
    }
    rollouts.push_back(std::make_unique<Rollout>(ctx, model_, text, named.method, count));
    if (!on_cpu) continue;
    for (const LayerState& layer : rollouts.back()->layers()) layer.memory.cache->trace_members();
  }
  Rollout& dense = *rollouts[0];
  const Method everything = dense.method();
  const Tensor z(ctx.device(), DType::kF32, latent_);
  const Tensor given(ctx.device(), DType::kF32, latent_);
  int64_t probes = 0;
  for (int64_t frame = 0; frame < count; ++frame) {
    next_frame_("lock step", frame);
    const CameraPosition camera = scenario_.cameras[static_cast<size_t>(frame)];
    const bool probed =
        frame > scenario_.num_primed && (frame - scenario_.num_primed) % options_.probe_every == 0;
    // Attention is looked into where its pages can be read.
    const bool score = probed && ++probes % options_.score_every == 0 && on_cpu;
    for (const auto& rollout : rollouts) {
      if (rollout) rollout->begin_frame(ctx, frame, camera.x, camera.y);
    }
    for (size_t m = 1; m < rollouts.size() && probed; ++m) {
      if (rollouts[m]) {
        probe(ctx, m, *rollouts[m], dense, frame, score, z);
        continue;
      }
      dense.set_selection(ctx, methods_[m].method);
      dense.begin_frame(ctx, frame, camera.x, camera.y);
      probe(ctx, m, dense, dense, frame, score, z);
      dense.set_selection(ctx, everything);
    }
    // Only now: the scores above are held against the dense history without this frame.
    copy(ctx, dense_.latents[static_cast<size_t>(frame)], given);
    for (const auto& rollout : rollouts) {
      if (rollout) rollout->remember(ctx, given);
    }
    ctx.synchronize();
  }
}

// The method makes the frame from the dense run's noise. z: scratch, as a latent.
void ScenarioRun::probe(Context& ctx, size_t method, Rollout& rollout, const Rollout& dense,
                        int64_t frame, bool score, View z) {
  MethodResult& row = rows_[method];
  const int64_t tokens = model_.config.transformer.frame_tokens();
  Scorer scorer(rollout, dense.layers(), frame * tokens, frame, options_.score_stride, row);
  rollout.denoise(ctx, scenario_.seed, z, score ? &scorer : nullptr);
  const auto at = static_cast<size_t>(frame);
  const auto size = static_cast<size_t>(z.numel());
  const Tensor made_latent({}, DType::kF32, latent_);
  copy(ctx, z, made_latent);
  row.lockstep_l2.add(
      relative_l2({made_latent.data<float>(), size}, {dense_.latents[at].data<float>(), size}));
  const Tensor pixels(ctx.device(), DType::kF32, {height_, width_, 3});
  const Tensor rgb(ctx.device(), DType::kU8, pixels.shape());
  const Tensor made_rgb({}, DType::kU8, pixels.shape());
  model_.autoencoder.decode(ctx, z, pixels);
  to_rgb(ctx, pixels, rgb);
  copy(ctx, rgb, made_rgb);
  const Pixels made(made_rgb.data<uint8_t>(), frame_bytes());
  const double quality = psnr(made, dense_.frames[at]);
  row.lockstep_psnr.add(quality);
  row.series.lockstep_psnr[at].add(quality);
  row.lockstep_ssim.add(ssim(made, dense_.frames[at], width_, height_));
  if (!options_.free_running) row.density.add(rollout.density());
}

}  // namespace longtake
