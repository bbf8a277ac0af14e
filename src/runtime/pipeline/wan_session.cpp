#include "pipeline/wan_session.h"

#include <exception>
#include <utility>

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

View frame_of(View latents, int64_t index) {
  const View z = latents.rows(index, index + 1);
  return z.reshape({z.dim(1), z.dim(2), z.dim(3)});
}

}  // namespace

WanSession::WanSession(Context& ctx, const wan::Transformer& transformer, wan::Decoder& decoder,
                       View text, const WanSessionOptions& options)
    : ctx_(ctx),
      beside_(ctx.device().kind == DeviceKind::kCuda && options.before_chunk
                  ? std::optional<Context>(std::in_place, ctx.device(), ctx.threads())
                  : std::nullopt),
      decoder_(decoder),
      before_chunk_(options.before_chunk),
      rollout_(make_rollout(ctx, transformer, text, options)),
      noise_(noise_of_seed(ctx, options.seed)),
      clock_(ctx, 2),
      decode_clock_(decoding(), 2) {
  for (Tensor& latents : latents_)
    latents = Tensor(ctx.device(), DType::kF32,
                     {options.rollout.chunk_frames, transformer.config().out_channels,
                      options.rollout.height, options.rollout.width});
}

bool WanSession::begin_chunk(int64_t first_frame) {
  if (before_chunk_ && !before_chunk_(first_frame)) return false;
  clock_.mark(0);
  rollout_->next_chunk(ctx_, noise_, latents_[next_]);
  clock_.mark(1);
  return true;
}

void WanSession::next_chunk(const wan::FrameSink& rgb) {
  if (!is_begun_ && !begin_chunk(num_frames_)) return;
  is_begun_ = false;
  ctx_.synchronize();
  rollout_->expect_finite();
  const View made = latents_[next_];
  next_ = 1 - next_;
  last_chunk_ = {};
  last_chunk_.first_frame = num_frames_;
  last_chunk_.clean_ms = rollout_->clean_ms();
  last_chunk_.denoise_ms = clock_.ms(0, 1) - last_chunk_.clean_ms;
  last_chunk_.density = rollout_->take_density();
  last_chunk_.steps_run = rollout_->method().num_steps;
  describe_caches();
  const auto hand_out = [&](View frame) {
    ++num_frames_;
    rgb(frame);
  };
  beside_ ? decode_beside_next(made, hand_out) : decode(made, hand_out);
  last_chunk_.num_frames = num_frames_ - last_chunk_.first_frame;
  last_chunk_.peak_rss_bytes = peak_rss_bytes();
}

void WanSession::decode(View made, const wan::FrameSink& rgb) {
  for (int64_t f = 0; f < made.dim(0); ++f) {
    decode_clock_.mark(0);
    decoder_.begin(ctx_, frame_of(made, f));
    decode_clock_.mark(1);
    decoder_.finish(ctx_, rgb);
    last_chunk_.decode_ms += decode_clock_.ms(0, 1);
  }
}

void WanSession::decode_beside_next(View made, const wan::FrameSink& rgb) {
  int64_t count = 0;
  decode_clock_.mark(0);
  for (int64_t f = 0; f < made.dim(0); ++f) count += decoder_.begin(*beside_, frame_of(made, f));
  decode_clock_.mark(1);
  // These pictures are handed out whatever becomes of the next chunk.
  std::exception_ptr failure;
  try {
    is_begun_ = begin_chunk(num_frames_ + count);
  } catch (...) {
    failure = std::current_exception();
  }
  decoder_.finish(*beside_, rgb);
  last_chunk_.decode_ms = decode_clock_.ms(0, 1);
  if (failure) std::rethrow_exception(failure);
}

void WanSession::remember(View latents) {
  rollout_->remember(ctx_, latents);
  ctx_.synchronize();
  rollout_->expect_finite();
  for (int64_t f = 0; f < latents.dim(0); ++f)
    decoder_.decode(decoding(), frame_of(latents, f), [](View) {});
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
