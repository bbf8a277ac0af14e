#include "pipeline/scenario_run.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>
#include <optional>

#include "base/error.h"
#include "media/frame_writer.h"
#include "metrics/error_bound.h"
#include "metrics/image.h"
#include "ops/copy.h"
#include "ops/image.h"
#include "pipeline/frame_records.h"
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

std::vector<std::vector<size_t>> lockstep_groups(const std::vector<NamedMethod>& methods) {
  std::vector<size_t> sharing;
  std::vector<std::vector<size_t>> groups;
  for (size_t m = 1; m < methods.size(); ++m) {
    if (shares_history(methods[m].method, methods[0].method))
      sharing.push_back(m);
    else
      groups.push_back({m});
  }
  if (!sharing.empty()) groups.insert(groups.begin(), sharing);
  return groups;
}

ScenarioRun::ScenarioRun(const world::Model& model, const Scenario& scenario,
                         const std::vector<NamedMethod>& methods, const ComparisonOptions& options,
                         bool film, FrameHook next_frame, Background& background)
    : model_(model),
      scenario_(scenario),
      methods_(methods),
      options_(options),
      film_(film && !options.video_folder.empty() && options.free_running),
      next_frame_(std::move(next_frame)),
      background_(background),
      width_(model.config.transformer.frame_width()),
      height_(model.config.transformer.frame_height()),
      latent_{model.config.transformer.latent_channels, model.config.transformer.latent_height,
              model.config.transformer.latent_width} {
  for (const NamedMethod& named : methods)
    rows_.push_back(empty_row(named, model.config.transformer, scenario.num_frames()));
  chunks_.resize(methods.size());
  std::vector<Probe> probes;
  for (int64_t frame = 0; frame < num_frames(0); ++frame) {
    if (is_probed(frame)) probes.emplace_back().frame = frame;
  }
  probes_.assign(methods.size(), probes);
}

int64_t ScenarioRun::num_frames(size_t method) const {
  const bool limited = options_.full_frames > 0 && methods_[method].method.memory.memory == "full";
  return limited ? std::min(options_.full_frames, scenario_.num_frames()) : scenario_.num_frames();
}

bool ScenarioRun::is_probed(int64_t frame) const {
  return frame > scenario_.num_primed && (frame - scenario_.num_primed) % options_.probe_every == 0;
}

void ScenarioRun::later(std::function<void()> job) {
  ++users_;
  background_.add([this, job = std::move(job)] {
    const auto start = std::chrono::steady_clock::now();
    job();
    judged_s_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    leave();
  });
}

void ScenarioRun::leave() {
  if (--users_ > 0) return;
  dense_ = {};
  truth_ = {};
  seen_ = {};
  history_.reset();
}

void ScenarioRun::release() {
  leave();
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
  if (method == 0) {
    dense_ = record(ctx, 0);
    std::vector<std::pair<size_t, std::shared_ptr<const Recording>>> waiting;
    {
      const std::lock_guard lock(mutex_);
      has_dense_ = true;
      waiting.swap(waiting_);
    }
    later([this] { judge(0, dense_); });
    for (const auto& [other, recording] : waiting)
      later([this, other = other, recording = recording] { judge(other, *recording); });
    return;
  }
  const auto own = std::make_shared<const Recording>(record(ctx, method));
  {
    const std::lock_guard lock(mutex_);
    if (!has_dense_) {
      waiting_.emplace_back(method, own);
      return;
    }
  }
  later([this, method, own] { judge(method, *own); });
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
  if (method == 0 && options_.lockstep)
    history_ = std::make_unique<const DenseHistory>(ctx, session.take_caches());
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

// Looks into attention at the last sparse step of a probe, where the method may leave something
// out. What it takes is judged in the background.
class ScenarioRun::Scorer final : public PassObserver {
 public:
  Scorer(ScenarioRun& run, Context& ctx, const Rollout& rollout, Probe& out)
      : run_(run),
        ctx_(ctx),
        rollout_(rollout),
        num_committed_(out.frame * run.model_.config.transformer.frame_tokens()),
        out_(out) {}

  void on_self_attention(int64_t layer, const AttentionRead& read) override {
    const Method& method = rollout_.method();
    if (method.memory.memory == "full" && !method.sparse_self) return;
    if (rollout_.step() != rollout_.last_sparse_step()) return;
    const KvCache& own = *rollout_.layers()[static_cast<size_t>(layer)].memory.cache;
    const auto heads = static_cast<size_t>(read.kv.num_heads());
    std::vector<std::vector<int32_t>> members;
    for (size_t head = 0; head < heads; ++head)
      members.push_back(own.members(static_cast<int64_t>(head), num_committed_));
    const auto kept = std::make_shared<const HostCopy>(ctx_, read.kv, read.q.dim(0));
    std::optional<HostSelection> selection;
    if (read.selection != nullptr) selection = kept->selection(ctx_, *read.selection);
    const auto q = std::make_shared<const Tensor>(copied(read.q));
    const float scale = scale_of(read);
    const double bound = bound_of(own, *q, read, scale);
    AttentionScore& out = out_.layers[static_cast<size_t>(layer)];
    run_.later([run = &run_, layer, heads, kept, q, scale, bound, committed = num_committed_, &out,
                selection = std::move(selection), members = std::move(members)] {
      // The dense history, and behind it the chunk in work as this method sees it.
      const KvView mine = kept->view();
      const auto chunk = (q->dim(0) + kPageTokens - 1) / kPageTokens;
      std::vector<PageList> lists;
      for (size_t head = 0; head < heads; ++head) {
        PageList& list =
            lists.emplace_back(run->history_->first(layer, static_cast<int64_t>(head), committed));
        list.insert(list.end(), mine.heads[head].end() - chunk, mine.heads[head].end());
      }
      Selection listed;
      if (selection) listed = selection->view();
      out = score_attention(*q, {mine.dtype, mine.head_dim, lists}, mine,
                            selection ? &listed : nullptr, members, scale,
                            run->options_.score_stride);
      // Of what a selection leaves out nothing is known.
      out.bound = selection ? static_cast<double>(out.count) : bound;
    });
  }

  void on_cross_attention(int64_t layer, const AttentionRead& read) override {
    const Prompt& prompt = rollout_.layers()[static_cast<size_t>(layer)].prompt;
    if (rollout_.step() != rollout_.last_sparse_step() || prompt.selector == nullptr) return;
    const auto all = std::make_shared<const HostCopy>(ctx_, prompt.pages.view(), 0);
    const auto kept = std::make_shared<const HostCopy>(ctx_, read.kv, 0);
    const auto q = std::make_shared<const Tensor>(copied(read.q));
    AttentionScore& out = out_.prompt_layers[static_cast<size_t>(layer)];
    run_.later([run = &run_, all, kept, q, scale = scale_of(read), &out,
                members = prompt.selector->members()] {
      out = score_attention(*q, all->view(), kept->view(), nullptr, members, scale,
                            run->options_.score_stride);
    });
  }

 private:
  static float scale_of(const AttentionRead& read) {
    return 1.0F / std::sqrt(static_cast<float>(read.kv.head_dim));
  }

  Tensor copied(View x) const {
    Tensor out({}, x.dtype(), x.shape());
    copy(ctx_, x, out);
    return out;
  }

  // Summed up over queries; known on the CPU.
  double bound_of(const KvCache& own, View q, const AttentionRead& read, float scale) const {
    if (read.selection != nullptr) return 0;
    if (ctx_.device().kind != DeviceKind::kCpu) return std::numeric_limits<double>::quiet_NaN();
    return moved_mass_bound(q, own, out_.frame, scale, run_.options_.score_stride);
  }

  ScenarioRun& run_;
  Context& ctx_;
  const Rollout& rollout_;
  int64_t num_committed_;
  Probe& out_;
};

void ScenarioRun::play_in_lockstep(Context& ctx, const std::vector<size_t>& group) {
  const Tensor text = world::encode_prompt(ctx, model_, scenario_.prompt);
  const int64_t count = num_frames(0);
  const Method& everything = methods_[0].method;
  const bool shares = shares_history(methods_[group.front()].method, everything);
  // Where one of them selects, the history is one that can be selected from.
  size_t leading = group.front();
  for (const size_t m : group) {
    if (methods_[m].method.sparse_self) leading = m;
  }
  Rollout rollout(ctx, model_, text, methods_[leading].method, count);
  for (const LayerState& layer : rollout.layers()) layer.memory.cache->trace_members();
  if (shares) rollout.set_selection(ctx, everything);
  std::string label = "lock step of";
  for (const size_t m : group) label += (m == group.front() ? " " : ", ") + methods_[m].name;
  FrameRecords records;
  const Tensor z(ctx.device(), DType::kF32, latent_), given(ctx.device(), DType::kF32, latent_);
  size_t probes = 0;
  for (int64_t frame = 0; frame < count; ++frame) {
    next_frame_(label, frame);
    const CameraPosition camera = scenario_.cameras[static_cast<size_t>(frame)];
    records.begin_frame(ctx, rollout, frame, camera.x, camera.y);
    if (is_probed(frame)) {
      const bool score = (probes + 1) % static_cast<size_t>(options_.score_every) == 0;
      for (const size_t m : group) {
        if (shares) rollout.set_selection(ctx, methods_[m].method);
        const auto denoise = [&](PassObserver* observer) {
          const auto steps = [&] { rollout.denoise(ctx, scenario_.seed, z, observer); };
          // What is watched cannot be recorded, nor can what changes from probe to probe.
          if (observer != nullptr || shares)
            steps();
          else
            records.denoise(ctx, steps);
        };
        probe(ctx, rollout, denoise, score, z, probes_[m][probes]);
      }
      if (shares) rollout.set_selection(ctx, everything);
      ++probes;
    }
    // Only now: the scores above are held against the dense history without this frame.
    copy(ctx, dense_.latents[static_cast<size_t>(frame)], given);
    records.remember(ctx, [&] { rollout.remember(ctx, given); });
    ctx.synchronize();
  }
}

// A method makes out.frame from the dense run's noise. z: as a latent, which denoise() writes.
void ScenarioRun::probe(Context& ctx, Rollout& rollout,
                        const std::function<void(PassObserver*)>& denoise, bool score, View z,
                        Probe& out) {
  out.layers.resize(static_cast<size_t>(model_.config.transformer.num_layers));
  out.prompt_layers.resize(out.layers.size());
  Scorer scorer(*this, ctx, rollout, out);
  denoise(score ? &scorer : nullptr);
  const auto at = static_cast<size_t>(out.frame);
  const auto size = static_cast<size_t>(z.numel());
  const Tensor made_latent({}, DType::kF32, latent_);
  copy(ctx, z, made_latent);
  out.relative_l2 =
      relative_l2({made_latent.data<float>(), size}, {dense_.latents[at].data<float>(), size});
  const Tensor pixels(ctx.device(), DType::kF32, {height_, width_, 3});
  const Tensor rgb(ctx.device(), DType::kU8, pixels.shape());
  out.rgb.resize(frame_bytes());
  model_.autoencoder.decode(ctx, z, pixels);
  to_rgb(ctx, pixels, rgb);
  copy(ctx, rgb, View(out.rgb.data(), DType::kU8, Device{}, pixels.shape()));
  out.density = rollout.density();
  out.is_made = true;
  later([this, &out, at] {
    out.psnr = psnr(out.rgb, dense_.frames[at]);
    out.ssim = ssim(out.rgb, dense_.frames[at], width_, height_);
    out.rgb = {};
  });
}

std::vector<MethodResult> ScenarioRun::rows() const {
  std::vector<MethodResult> rows = rows_;
  for (size_t m = 0; m < rows.size(); ++m) {
    MethodResult& row = rows[m];
    for (const Probe& probe : probes_[m]) {
      if (!probe.is_made) continue;
      row.lockstep_psnr.add(probe.psnr);
      row.lockstep_ssim.add(probe.ssim);
      row.lockstep_l2.add(probe.relative_l2);
      row.series.lockstep_psnr[static_cast<size_t>(probe.frame)].add(probe.psnr);
      if (!options_.free_running) row.density.add(probe.density);
      for (size_t n = 0; n < probe.layers.size(); ++n) {
        row.layers[n].add(probe.layers[n]);
        row.prompt_layers[n].add(probe.prompt_layers[n]);
      }
    }
  }
  return rows;
}

}  // namespace longtake
