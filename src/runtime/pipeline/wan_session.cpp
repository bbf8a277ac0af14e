#include "pipeline/wan_session.h"

namespace longtake {
namespace {

std::unique_ptr<WanRollout> make_rollout(Context& ctx, const wan::Transformer& transformer,
                                         View text, const WanSessionOptions& options) {
  const WanOptions& rollout = options.rollout;
  if (!rollout.is_rolling) return std::make_unique<ChunkRollout>(ctx, transformer, text, rollout);
  const auto steps = static_cast<int64_t>(rollout.steps.size());
  const int64_t most =
      rollout.method && rollout.method->num_steps > 0 ? rollout.method->num_steps : steps;
  // A video shorter than the chunks in work is the beginning of a longer one.
  const int64_t chunks = options.num_chunks >= most ? options.num_chunks : 0;
  return std::make_unique<RollingRollout>(ctx, transformer, text, rollout, chunks);
}

}  // namespace

WanSession::WanSession(Context& ctx, const wan::Transformer& transformer, wan::Decoder& decoder,
                       View text, const WanSessionOptions& options)
    : ctx_(ctx),
      decoder_(decoder),
      rollout_(make_rollout(ctx, transformer, text, options)),
      noise_(noise_of_seed(ctx, options.seed)),
      latents_(ctx.device(), DType::kF32,
               {options.rollout.chunk_frames, transformer.config().out_channels,
                options.rollout.height, options.rollout.width}),
      clock_(ctx, 2) {}

void WanSession::next_chunk(const wan::FrameSink& rgb) {
  last_chunk_ = {};
  last_chunk_.first_frame = num_frames_;
  clock_.mark(0);
  rollout_->next_chunk(ctx_, noise_, latents_);
  clock_.mark(1);
  ctx_.synchronize();
  rollout_->expect_finite();
  last_chunk_.clean_ms = rollout_->clean_ms();
  last_chunk_.denoise_ms = clock_.ms(0, 1) - last_chunk_.clean_ms;
  last_chunk_.density = rollout_->take_density();
  last_chunk_.steps_run = rollout_->method().num_steps;
  describe_caches();
  Stopwatch watch;
  for (int64_t f = 0; f < latents_.dim(0); ++f) {
    const View z = latents_.view().rows(f, f + 1);
    decoder_.decode(ctx_, z.reshape({z.dim(1), z.dim(2), z.dim(3)}), [&](View frame) {
      last_chunk_.decode_ms += watch.lap_ms();
      ++num_frames_;
      rgb(frame);
      watch.lap_ms();  // the receiver's
    });
    last_chunk_.decode_ms += watch.lap_ms();
  }
  last_chunk_.num_frames = num_frames_ - last_chunk_.first_frame;
  last_chunk_.peak_rss_bytes = peak_rss_bytes();
}

void WanSession::remember(View latents) {
  rollout_->remember(ctx_, latents);
  ctx_.synchronize();
  rollout_->expect_finite();
  for (int64_t f = 0; f < latents.dim(0); ++f) {
    const View z = latents.rows(f, f + 1);
    decoder_.decode(ctx_, z.reshape({z.dim(1), z.dim(2), z.dim(3)}), [](View) {});
  }
}

void WanSession::describe_caches() {
  double commit_ms = -commit_ms_, select_ms = -select_ms_;
  for (const LayerState& layer : rollout_->layers()) {
    commit_ms += layer.memory.commit_ms;
    select_ms += layer.memory.select_ms;
    add_cache(*layer.memory.cache, last_chunk_);
  }
  commit_ms_ += last_chunk_.commit_ms = commit_ms;
  select_ms_ += last_chunk_.select_ms = select_ms;
}

}  // namespace longtake
