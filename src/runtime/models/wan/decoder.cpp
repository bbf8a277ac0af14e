#include "models/wan/decoder.h"

#include <array>
#include <utility>

#include "models/wan/vae_encoder.h"
#include "ops/copy.h"
#include "ops/image.h"

namespace longtake::wan {
namespace {

// The frames of a decoder as bytes on the CPU.
// Net: VaeDecoder, whose frames are in [-1, 1], or TaehvDecoder, whose are in [0, 1].
template <typename Net>
class Stream final : public Decoder {
 public:
  Stream(Net net, Tensor half) : net_(std::move(net)), half_(std::move(half)) {}

  void decode(Context& ctx, View z, const FrameSink& rgb) override {
    net_.decode(ctx, z, state_, [&](View frame) {
      if (rgb_.empty()) {
        rgb_ = Tensor(ctx.device(), DType::kU8, frame.shape());
        host_ = Tensor::staging(ctx.device(), DType::kU8, frame.shape());
      }
      const Workspace::Scope scope(ctx.workspace());
      to_rgb(ctx, half_.empty() ? frame : doubled(ctx, frame), rgb_);
      copy(ctx, rgb_, host_);
      rgb(host_);
    });
  }

 private:
  // 2 x - 1: by way of planes, which is where a shift comes with.
  View doubled(Context& ctx, View x) const {
    const View planes = ctx.workspace().take(DType::kF32, {x.dim(2), x.dim(0), x.dim(1)});
    to_planes(ctx, x, half_, half_, planes);
    const View out = ctx.workspace().take(DType::kF32, x.shape());
    to_channels_last(ctx, planes, View(), View(), out);
    return out;
  }

  Net net_;
  typename Net::State state_;
  Tensor half_;  // [3]: 0.5, if frames are in [0, 1]
  Tensor rgb_, host_;
};

class VaeStreamIn final : public Encoder {
 public:
  explicit VaeStreamIn(VaeEncoder net) : net_(std::move(net)) {}

  void encode(Context& ctx, View rgb, const FrameSink& latent) override {
    const Workspace::Scope scope(ctx.workspace());
    const View pixels = ctx.workspace().take(DType::kF32, rgb.shape());
    from_rgb(ctx, rgb, pixels);
    net_.encode(ctx, pixels, state_, latent);
  }

  void finish(Context&, const FrameSink&) override {}

 private:
  VaeEncoder net_;
  VaeEncoder::State state_;
};

class TaehvStreamIn final : public Encoder {
 public:
  explicit TaehvStreamIn(TaehvEncoder net) : net_(std::move(net)) {}

  void encode(Context& ctx, View rgb, const FrameSink& latent) override {
    if (pixels_.empty()) pixels_ = Tensor(ctx.device(), DType::kF32, rgb.shape());
    from_rgb(ctx, rgb, pixels_);
    for (int64_t i = 0; i < pixels_.numel(); ++i)
      pixels_.data<float>()[i] = 0.5F * (pixels_.data<float>()[i] + 1);
    net_.encode(ctx, pixels_, state_, latent);
    ++num_frames_;
  }

  void finish(Context& ctx, const FrameSink& latent) override {
    for (; num_frames_ % TaehvEncoder::kFramesPerLatent != 0; ++num_frames_)
      net_.encode(ctx, pixels_, state_, latent);
  }

 private:
  TaehvEncoder net_;
  TaehvEncoder::State state_;
  Tensor pixels_;  // the latest frame, in [0, 1]
  int64_t num_frames_ = 0;
};

}  // namespace

std::unique_ptr<Decoder> open_decoder(Context& ctx, const Checkpoint& file, DecoderKind kind,
                                      DType compute, size_t* bytes) {
  WeightTable table(file, &ctx);
  std::unique_ptr<Decoder> out;
  if (kind == DecoderKind::kVae) {
    out = std::make_unique<Stream<VaeDecoder>>(VaeDecoder(vae_dim(file), compute, table), Tensor());
  } else {
    Tensor half;
    table.constant(std::array<float, 3>{0.5F, 0.5F, 0.5F}, half);
    out = std::make_unique<Stream<TaehvDecoder>>(TaehvDecoder(compute, table), std::move(half));
  }
  table.finish();
  if (bytes != nullptr) *bytes = table.bytes();
  return out;
}

std::unique_ptr<Encoder> open_encoder(Context& ctx, const Checkpoint& file, DecoderKind kind,
                                      DType compute) {
  WeightTable table(file, &ctx);
  std::unique_ptr<Encoder> out;
  if (kind == DecoderKind::kVae)
    out = std::make_unique<VaeStreamIn>(VaeEncoder(vae_dim(file), compute, table));
  else
    out = std::make_unique<TaehvStreamIn>(TaehvEncoder(compute, table));
  table.finish();
  return out;
}

}  // namespace longtake::wan
