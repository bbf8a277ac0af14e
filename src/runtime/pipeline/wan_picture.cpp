#include "pipeline/wan_picture.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "models/wan/decoder.h"
#include "ops/copy.h"
#include "ops/image.h"

namespace longtake {

PictureLatents::PictureLatents(Context& ctx, wan::VaeEncoder encoder, View rgb,
                               const wan::Controls& controls)
    : work_(std::make_unique<Work>(Work{std::move(encoder), {}, {}})) {
  const Shape& image = controls.image.shape();
  const int64_t masks = image[1] - wan::VaeEncoder::kLatentChannels;
  LONGTAKE_CHECK(masks >= 1 && image[2] * wan::kLatentPixels == rgb.dim(0) &&
                     image[3] * wan::kLatentPixels == rgb.dim(1),
                 image.to_string(), " for ", rgb.shape().to_string());
  latent_ =
      Tensor(ctx.device(), DType::kF32, {wan::VaeEncoder::kLatentChannels, image[2], image[3]});
  Tensor ones({}, DType::kF32, {masks, image[2], image[3]});
  std::fill_n(ones.data<float>(), ones.numel(), 1.0F);
  ones_ = ones.to(ctx.device());
  zeros_ = Tensor::zeros(ctx.device(), DType::kF32, ones.shape());
  work_->picture = Tensor(ctx.device(), DType::kF32, rgb.shape());
  const Workspace::Scope scope(ctx.workspace());
  const View here = ctx.workspace().take(DType::kU8, rgb.shape());
  copy(ctx, rgb, here);
  from_rgb(ctx, here, work_->picture);
}

void PictureLatents::encode_next(Context& ctx) {
  const int64_t before = num_latents_;
  while (num_latents_ == before) {
    work_->encoder.encode(ctx, work_->picture, work_->state, [&](View z) {
      copy(ctx, z, latent_);
      ++num_latents_;
    });
    if (num_latents_ == 1)
      work_->picture = Tensor::zeros(ctx.device(), DType::kF32, work_->picture.shape());
  }
  if (num_latents_ == kPictureLatents) work_.reset();
}

void PictureLatents::fill(Context& ctx, int64_t first_frame, wan::Controls& controls) {
  const View image = controls.image;
  const int64_t masks = ones_.dim(0);
  for (int64_t f = 0; f < image.dim(0); ++f) {
    while (num_latents_ < std::min(first_frame + f + 1, kPictureLatents)) encode_next(ctx);
    const View frame = image.rows(f, f + 1).reshape({image.dim(1), image.dim(2), image.dim(3)});
    copy(ctx, first_frame + f == 0 ? ones_ : zeros_, frame.rows(0, masks));
    copy(ctx, latent_, frame.rows(masks, image.dim(1)));
  }
}

}  // namespace longtake
