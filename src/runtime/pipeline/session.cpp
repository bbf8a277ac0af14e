#include "pipeline/session.h"

#include <functional>
#include <istream>
#include <limits>
#include <sstream>
#include <streambuf>
#include <vector>

#include "base/error.h"
#include "io/safetensors.h"
#include "ops/copy.h"
#include "ops/image.h"

namespace longtake {
namespace {

// Marks of a frame's clock.
enum Mark { kBegin, kDenoised, kRemembered, kWatched, kDecoded, kNumMarks };

// Reads bytes where they lie.
class ViewStream : private std::streambuf, public std::istream {
 public:
  explicit ViewStream(View view) : std::istream(static_cast<std::streambuf*>(this)) {
    char* begin = reinterpret_cast<char*>(view.raw());
    setg(begin, begin, begin + view.bytes());
  }
};

}  // namespace

Session::Session(Context& ctx, const world::Model& model, const SessionOptions& options)
    : ctx_(ctx),
      model_(model),
      options_(options),
      rollout_(ctx, model, encode_prompt(), options.method, options.expected_frames),
      clock_(ctx, kNumMarks) {
  const auto& sizes = model.config.transformer;
  const Shape frame{sizes.frame_height(), sizes.frame_width(), 3};
  latent_ = Tensor(ctx.device(), DType::kF32,
                   {sizes.latent_channels, sizes.latent_height, sizes.latent_width});
  pixels_ = Tensor(ctx.device(), DType::kF32, frame);
  rgb_ = Tensor(ctx.device(), DType::kU8, frame);
  host_rgb_ = Tensor::staging(ctx.device(), DType::kU8, frame);
  options_.method = rollout_.method();
  if (options.watch_every > 0 && ctx.device().kind == DeviceKind::kCpu)
    watch_ = std::make_unique<ErrorWatch>(sizes.num_layers);
}

void Session::check_prompt(const world::Model& model, const std::string& prompt) {
  if (prompt.find_first_not_of(" \t\r\n") == std::string::npos)
    throw Error(ErrorKind::kUsage, "prompt: expected at least one word, found none");
  const size_t words = model.vocabulary.tokenize(prompt).size();
  const auto most = static_cast<size_t>(model.config.text_encoder.text_len);
  if (words > most)
    throw Error(ErrorKind::kUsage,
                str("prompt: expected at most ", most, " words, points and commas, found ", words));
}

Tensor Session::encode_prompt() const {
  check_prompt(model_, options_.prompt);
  return world::encode_prompt(ctx_, model_, options_.prompt);
}

void Session::set_prompt(const std::string& prompt) {
  check_prompt(model_, prompt);
  options_.prompt = prompt;
  rollout_.set_text(ctx_, encode_prompt());
  records_.forget();
}

View Session::step(CameraPosition camera) {
  LONGTAKE_CHECK(next_frame_ < std::numeric_limits<int32_t>::max());
  last_chunk_ = {};
  last_chunk_.first_frame = next_frame_;
  clock_.mark(kBegin);
  records_.begin_frame(ctx_, rollout_, next_frame_, camera.x, camera.y);
  records_.denoise(ctx_, [&] { rollout_.denoise(ctx_, options_.seed, latent_); });
  clock_.mark(kDenoised);
  Context& decoding = records_.begin_decoding(ctx_);
  // Of the history as it was read: the frame in work has not joined it.
  last_chunk_.density = rollout_.density();
  last_chunk_.steps_run = rollout_.steps_run();
  const bool look = watch_ && next_frame_ % options_.watch_every == 0;
  records_.remember(ctx_, [&] { rollout_.remember(ctx_, latent_, look ? watch_.get() : nullptr); });
  clock_.mark(kRemembered);
  if (look) last_chunk_.errors = watch_->errors(ctx_, rollout_.layers(), next_frame_);
  clock_.mark(kWatched);
  records_.decode(decoding, [&] {
    model_.autoencoder.decode(decoding, latent_, pixels_);
    to_rgb(decoding, pixels_, rgb_);
  });
  records_.finish_decoding(ctx_);
  clock_.mark(kDecoded);
  copy(ctx_, rgb_, host_rgb_);  // waits
  last_chunk_.denoise_ms = clock_.ms(kBegin, kDenoised);
  last_chunk_.clean_ms = clock_.ms(kDenoised, kRemembered);
  last_chunk_.watch_ms = clock_.ms(kRemembered, kWatched);
  last_chunk_.decode_ms = clock_.ms(kWatched, kDecoded);
  finish_frame(camera);
  return host_rgb_;
}

void Session::remember(View rgb, CameraPosition camera) {
  LONGTAKE_CHECK(rgb.shape() == rgb_.shape(), rgb.shape().to_string());
  copy(ctx_, rgb, rgb_);
  from_rgb(ctx_, rgb_, pixels_);
  model_.autoencoder.encode(ctx_, pixels_, latent_);
  records_.begin_frame(ctx_, rollout_, next_frame_, camera.x, camera.y);
  rollout_.remember(ctx_, latent_);
  ctx_.synchronize();
  finish_frame(camera);
}

void Session::finish_frame(CameraPosition camera) {
  camera_ = camera;
  ++next_frame_;
  double commit_ms = -commit_ms_, select_ms = -select_ms_;
  for (const LayerState& layer : rollout_.layers()) {
    commit_ms += layer.memory.commit_ms;
    select_ms += layer.memory.select_ms;
    layer.memory.cache->expect_finite();
    add_cache(*layer.memory.cache, last_chunk_);
  }
  commit_ms_ += last_chunk_.commit_ms = commit_ms;
  select_ms_ += last_chunk_.select_ms = select_ms;
  last_chunk_.peak_rss_bytes = peak_rss_bytes();
}

SavedSession Session::describe() const {
  SavedSession out;
  out.options = options_;
  out.dtype = name_of(model_.compute);
  out.model_fingerprint = world::model_fingerprint(model_.folder);
  out.next_frame = next_frame_;
  out.camera = camera_;
  return out;
}

void Session::save(const std::string& path, const SessionNotes& notes) const {
  SavedSession head = describe();
  head.notes = notes;
  std::vector<std::string> bytes;
  std::vector<NamedView> tensors;
  for (const LayerState& layer : rollout_.layers()) {
    std::ostringstream out;
    layer.memory.cache->save(out);
    bytes.push_back(std::move(out).str());
  }
  for (size_t n = 0; n < bytes.size(); ++n)
    tensors.push_back({cache_tensor_name(n), View(bytes[n].data(), DType::kU8, Device{},
                                                  {static_cast<int64_t>(bytes[n].size())})});
  write_safetensors(path, tensors, head.to_metadata());
}

void Session::load(const std::string& path) {
  const SafetensorsFile file(path);
  const auto saved = SavedSession::from_metadata(file.index().metadata, path);
  const SavedSession ours = describe();
  const auto expect_same = [&](const char* what, const auto& expected, const auto& found) {
    if (expected != found)
      throw Error(ErrorKind::kInput,
                  str(path, ": ", what, ": expected ", expected, ", found ", found));
  };
  expect_same("model fingerprint", ours.model_fingerprint, saved.model_fingerprint);
  expect_same("dtype", ours.dtype, saved.dtype);
  for (const MethodOption& option : method_options())
    expect_same(option.key, ours.options.method.get(option.key),
                saved.options.method.get(option.key));
  expect_same("seed", ours.options.seed, saved.options.seed);
  const auto layers = rollout_.layers();
  for (size_t n = 0; n < layers.size(); ++n) {
    const TensorInfo* info = file.index().find(cache_tensor_name(n));
    if (info == nullptr || info->dtype != DType::kU8)
      throw Error(ErrorKind::kInput,
                  str(path, ": ", cache_tensor_name(n), ": expected a u8 tensor, found ",
                      info ? name_of(info->dtype) : "none"));
    ViewStream in(file.view(*info));
    layers[n].memory.cache->load(in);
  }
  records_.forget();
  next_frame_ = saved.next_frame;
  camera_ = saved.camera;
}

SavedSession read_saved_session(const std::string& path) {
  return SavedSession::from_metadata(SafetensorsFile(path).index().metadata, path);
}

}  // namespace longtake
