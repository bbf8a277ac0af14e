#include "pipeline/comparison.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "base/error.h"
#include "media/frame_writer.h"
#include "metrics/error_bound.h"
#include "metrics/image.h"
#include "pipeline/rollout.h"
#include "pipeline/session.h"
#include "pipeline/truth.h"

namespace longtake {
namespace {

constexpr int64_t kEarlyFrames = 64;

using Frame = std::vector<uint8_t>;

struct Sizes {
  int64_t width, height;
  Shape latent;

  explicit Sizes(const world::TransformerConfig& config)
      : width(config.frame_width()),
        height(config.frame_height()),
        latent{config.latent_channels, config.latent_height, config.latent_width} {}

  size_t bytes() const { return static_cast<size_t>(width * height * 3); }
};

// What a run left behind.
struct Recording {
  std::vector<Frame> frames;
  std::vector<Tensor> latents;     // kept of the dense run only
  std::vector<ChunkStats> chunks;  // of generated frames
};

struct Stopped {};  // thrown to leave a comparison that was asked to stop

class Player {
 public:
  Player(Context& ctx, const world::Model& model, const std::vector<Scenario>& scenarios,
         const std::vector<NamedMethod>& methods, const ComparisonOptions& options,
         const std::function<bool()>& stopped, const ProgressHook& progress)
      : ctx_(ctx),
        model_(model),
        scenarios_(scenarios),
        methods_(methods),
        options_(options),
        stopped_(stopped),
        progress_(progress),
        sizes_(model.config.transformer) {
    result_.model = model.folder;
    result_.dtype = name_of(model.compute);
    result_.device = ctx.device().to_string();
    result_.threads = ctx.threads();
    for (const Scenario& scenario : scenarios)
      result_.num_frames = std::max(result_.num_frames, scenario.num_frames());
    for (const NamedMethod& named : methods) {
      MethodResult& row = result_.methods.emplace_back();
      row.name = named.name;
      row.options = named.method.to_string();
      row.layers.resize(static_cast<size_t>(model.config.transformer.num_layers));
      row.prompt_layers.resize(row.layers.size());
      for (auto* series : {&row.series.ms, &row.series.cache_bytes, &row.series.merged_keys,
                           &row.series.psnr, &row.series.lockstep_psnr})
        series->resize(static_cast<size_t>(result_.num_frames));
    }
    times_.resize(methods.size());
  }

  ComparisonResult run() {
    try {
      for (size_t s = 0; s < scenarios_.size(); ++s) {
        scenario_ = &scenarios_[s];
        label_ = str("scenario ", s + 1, " of ", scenarios_.size(), " (", scenario_->name, ")");
        render_truth();
        const Recording dense = play(0, s == 0);
        judge(0, dense, dense);
        if (options_.lockstep) lockstep(dense);
        for (size_t m = 1; m < methods_.size() && options_.free_running; ++m)
          judge(m, play(m, s == 0), dense);
        ++result_.num_scenarios;
        result_.num_primed = scenario_->num_primed;
      }
    } catch (const Stopped&) {
    }
    for (size_t m = 0; m < methods_.size(); ++m) take_medians(m);
    result_.peak_rss_bytes = longtake::peak_rss_bytes();
    return std::move(result_);
  }

 private:
  void render_truth() {
    truth_.clear();
    seen_.clear();
    pairs_.clear();
    if (scenario_->map == nullptr) return;
    for (int64_t frame = 0; frame < scenario_->num_frames(); ++frame) {
      truth_.emplace_back(sizes_.bytes());
      scenario_->render_truth(frame, truth_.back());
      seen_.push_back(seen_mask(*scenario_, frame));
    }
    pairs_ = return_pairs(*scenario_);
  }

  Recording play(size_t m, bool film) {
    SessionOptions session_options;
    session_options.prompt = scenario_->prompt;
    session_options.seed = scenario_->seed;
    session_options.method = methods_[m].method;
    session_options.expected_frames = scenario_->num_frames();
    Session session(ctx_, model_, session_options);
    std::unique_ptr<FrameWriter> writer;
    if (film && !options_.video_folder.empty() && options_.free_running) {
      result_.methods[m].video = str("method", m, ".mp4");
      writer = open_frame_writer(options_.video_folder + "/" + result_.methods[m].video,
                                 static_cast<int>(sizes_.width), static_cast<int>(sizes_.height),
                                 world::kFramesPerSecond);
    }
    Recording recording;
    for (int64_t frame = 0; frame < scenario_->num_frames(); ++frame) {
      next(frame, methods_[m].name + ", free running");
      const CameraPosition camera = scenario_->cameras[static_cast<size_t>(frame)];
      if (frame < scenario_->num_primed) {
        Frame& given = truth_[static_cast<size_t>(frame)];
        session.remember(View(given.data(), DType::kU8, Device{}, {sizes_.height, sizes_.width, 3}),
                         camera);
        recording.frames.push_back(given);
      } else {
        const View rgb = session.step(camera);
        recording.frames.emplace_back(rgb.data<uint8_t>(), rgb.data<uint8_t>() + rgb.numel());
        recording.chunks.push_back(session.last_chunk());
      }
      if (writer) writer->write(recording.frames.back().data());
      if (m > 0) continue;
      recording.latents.emplace_back(ctx_.device(), DType::kF32, sizes_.latent);
      std::copy_n(session.latent().data<float>(), session.latent().numel(),
                  recording.latents.back().data<float>());
    }
    if (writer) writer->close();
    return recording;
  }

  // Free-running figures of method m.
  void judge(size_t m, const Recording& own, const Recording& dense) {
    MethodResult& row = result_.methods[m];
    const int64_t primed = scenario_->num_primed;
    for (size_t i = 0; i < own.chunks.size(); ++i) {
      const auto frame = static_cast<size_t>(primed) + i;
      const Frame& picture = own.frames[frame];
      row.series.ms[frame].add(own.chunks[i].total_ms());
      row.series.cache_bytes[frame].add(static_cast<double>(own.chunks[i].cache_bytes_used));
      row.series.merged_keys[frame].add(static_cast<double>(own.chunks[i].merged_keys));
      if (m > 0) {
        const double quality = psnr(picture, dense.frames[frame]);
        row.psnr.add(quality);
        row.series.psnr[frame].add(quality);
        if (static_cast<int64_t>(i) < kEarlyFrames) row.early_psnr.add(quality);
        row.ssim.add(ssim(picture, dense.frames[frame], sizes_.width, sizes_.height));
      }
      if (truth_.empty()) continue;
      row.sharpness.add(gradient(picture, sizes_.width, sizes_.height) /
                        gradient(truth_[frame], sizes_.width, sizes_.height));
      const auto& mask = seen_[frame];
      if (static_cast<double>(std::count(mask.begin(), mask.end(), 1)) >=
          kSeenShare * static_cast<double>(mask.size()))
        row.seen_psnr.add(psnr(picture, truth_[frame], mask));
    }
    for (const ReturnPair pair : pairs_)
      row.return_psnr.add(return_psnr(*scenario_, pair, own.frames[static_cast<size_t>(pair.late)],
                                      own.frames[static_cast<size_t>(pair.early)]));
    if (own.chunks.empty()) return;
    const ChunkStats& last = own.chunks.back();
    row.density.add(last.density);
    row.cache_bytes.add(static_cast<double>(last.cache_bytes_used));
    row.cache_entries.add(static_cast<double>(last.cache_entries));
    row.merged_keys += last.merged_keys;
    row.evicted_keys += last.evicted_keys;
    const size_t quarter = own.chunks.size() - std::max<size_t>(1, own.chunks.size() / 4);
    times_[m].insert(times_[m].end(), own.chunks.begin() + static_cast<int64_t>(quarter),
                     own.chunks.end());
  }

  // Looks into attention at the last sparse step of a probe.
  class Scorer final : public PassObserver {
   public:
    Scorer(Rollout& rollout, std::span<const LayerState> dense, int64_t num_committed,
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
      score.bound = read.selection == nullptr
                        ? moved_mass_bound(read.q, own, frame_, scale, stride_)
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
    Rollout& rollout_;
    std::span<const LayerState> dense_;
    int64_t frame_;
    int64_t num_committed_;
    int64_t stride_;
    MethodResult& row_;
  };

  void lockstep(const Recording& dense) {
    const Tensor text =
        model_.text_encoder.encode(ctx_, model_.vocabulary.tokenize(scenario_->prompt));
    std::vector<std::unique_ptr<Rollout>> rollouts;
    for (const NamedMethod& named : methods_) {
      rollouts.push_back(
          std::make_unique<Rollout>(ctx_, model_, text, named.method, scenario_->num_frames()));
      for (const LayerState& layer : rollouts.back()->layers()) layer.memory.cache->trace_members();
    }
    const Tensor z(ctx_.device(), DType::kF32, sizes_.latent);
    const Tensor pixels(ctx_.device(), DType::kF32, {sizes_.height, sizes_.width, 3});
    const Tensor rgb(ctx_.device(), DType::kU8, pixels.shape());
    const int64_t tokens = model_.config.transformer.frame_tokens();
    int64_t probes = 0;
    for (int64_t frame = 0; frame < scenario_->num_frames(); ++frame) {
      next(frame, "lock step");
      const CameraPosition camera = scenario_->cameras[static_cast<size_t>(frame)];
      const bool probe = frame > scenario_->num_primed &&
                         (frame - scenario_->num_primed) % options_.probe_every == 0;
      const bool score = probe && ++probes % options_.score_every == 0;
      for (size_t m = 0; m < rollouts.size(); ++m) {
        Rollout& rollout = *rollouts[m];
        rollout.begin_frame(ctx_, frame, camera.x, camera.y);
        if (probe && m > 0) {
          MethodResult& row = result_.methods[m];
          Scorer scorer(rollout, rollouts[0]->layers(), frame * tokens, frame,
                        options_.score_stride, row);
          rollout.denoise(ctx_, scenario_->seed, z, score ? &scorer : nullptr);
          row.lockstep_l2.add(relative_l2({z.data<float>(), static_cast<size_t>(z.numel())},
                                          {dense.latents[static_cast<size_t>(frame)].data<float>(),
                                           static_cast<size_t>(z.numel())}));
          model_.autoencoder.decode(ctx_, z, pixels);
          world::to_rgb(pixels, rgb);
          const Pixels made(rgb.data<uint8_t>(), sizes_.bytes());
          const Frame& expected = dense.frames[static_cast<size_t>(frame)];
          const double quality = psnr(made, expected);
          row.lockstep_psnr.add(quality);
          row.series.lockstep_psnr[static_cast<size_t>(frame)].add(quality);
          row.lockstep_ssim.add(ssim(made, expected, sizes_.width, sizes_.height));
          if (!options_.free_running) row.density.add(rollout.density());
        }
      }
      // Only now: the scores above are held against the dense history without this frame.
      for (const auto& rollout : rollouts)
        rollout->remember(ctx_, dense.latents[static_cast<size_t>(frame)]);
    }
  }

  void take_medians(size_t m) {
    MethodResult& row = result_.methods[m];
    const auto median = [&](auto part) {
      std::vector<double> values;
      for (const ChunkStats& chunk : times_[m]) values.push_back(part(chunk));
      if (values.empty()) return std::numeric_limits<double>::quiet_NaN();
      const auto middle = values.begin() + static_cast<int64_t>(values.size() / 2);
      std::nth_element(values.begin(), middle, values.end());
      return *middle;
    };
    row.chunk_ms = median([](const ChunkStats& c) { return c.total_ms(); });
    row.denoise_ms = median([](const ChunkStats& c) { return c.denoise_ms; });
    row.select_ms = median([](const ChunkStats& c) { return c.select_ms; });
    row.clean_ms = median([](const ChunkStats& c) { return c.clean_ms; });
    row.commit_ms = median([](const ChunkStats& c) { return c.commit_ms; });
    row.decode_ms = median([](const ChunkStats& c) { return c.decode_ms; });
  }

  void next(int64_t frame, const std::string& what) {
    if (stopped_()) throw Stopped();
    if (frame % 16 == 0)
      progress_(str(label_, ": ", what, ", frame ", frame, " of ", scenario_->num_frames()));
  }

  Context& ctx_;
  const world::Model& model_;
  const std::vector<Scenario>& scenarios_;
  const std::vector<NamedMethod>& methods_;
  const ComparisonOptions& options_;
  const std::function<bool()>& stopped_;
  const ProgressHook& progress_;
  Sizes sizes_;
  ComparisonResult result_;
  std::vector<std::vector<ChunkStats>> times_;  // by method: chunks of the last quarters
  // Of the scenario in work.
  const Scenario* scenario_ = nullptr;
  std::string label_;
  std::vector<Frame> truth_;
  std::vector<std::vector<uint8_t>> seen_;
  std::vector<ReturnPair> pairs_;
};

}  // namespace

double Mean::value() const {
  return count_ > 0 ? sum_ / static_cast<double>(count_) : std::numeric_limits<double>::quiet_NaN();
}

ComparisonResult compare(Context& ctx, const world::Model& model,
                         const std::vector<Scenario>& scenarios,
                         const std::vector<NamedMethod>& methods, const ComparisonOptions& options,
                         const std::function<bool()>& stopped, const ProgressHook& progress) {
  LONGTAKE_CHECK(!scenarios.empty() && !methods.empty());
  LONGTAKE_CHECK(methods.front().method.memory.memory == "full");
  return Player(ctx, model, scenarios, methods, options, stopped, progress).run();
}

}  // namespace longtake
