#include "models/wan/decoder.h"

#include <algorithm>
#include <cmath>

#include "models/wan/vae.h"

namespace longtake::wan {
namespace {

// round(255 (scale x + offset)), limited to bytes; what is not a number is 0.
void to_rgb(View x, float scale, float offset, View rgb) {
  const auto* from = x.data<float>();
  auto* to = rgb.data<uint8_t>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    const float value = std::min(255.0F, std::max(0.0F, 255 * (scale * from[i] + offset)));
    to[i] = static_cast<uint8_t>(std::lround(value));
  }
}

// Net: VaeDecoder or TaehvDecoder.
template <typename Net>
class Stream final : public Decoder {
 public:
  Stream(Net net, float scale, float offset)
      : net_(std::move(net)), scale_(scale), offset_(offset) {}

  void decode(Context& ctx, View z, const FrameSink& rgb) override {
    net_.decode(ctx, z, state_, [&](View frame) {
      if (rgb_.empty()) rgb_ = Tensor(ctx.device(), DType::kU8, frame.shape());
      to_rgb(frame, scale_, offset_, rgb_);
      rgb(rgb_);
    });
  }

 private:
  Net net_;
  typename Net::State state_;
  Tensor rgb_;
  float scale_, offset_;
};

}  // namespace

std::unique_ptr<Decoder> open_decoder(Context& ctx, const Checkpoint& file, DecoderKind kind,
                                      DType compute, size_t* bytes) {
  WeightTable table(file, &ctx);
  std::unique_ptr<Decoder> out;
  if (kind == DecoderKind::kVae)
    out =
        std::make_unique<Stream<VaeDecoder>>(VaeDecoder(vae_dim(file), compute, table), 0.5F, 0.5F);
  else
    out = std::make_unique<Stream<TaehvDecoder>>(TaehvDecoder(compute, table), 1.0F, 0.0F);
  table.finish();
  if (bytes != nullptr) *bytes = table.bytes();
  return out;
}

}  // namespace longtake::wan
