#include "models/wan/decoder.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "device/graph.h"
#include "models/wan/vae_encoder.h"
#include "ops/copy.h"
#include "ops/image.h"

namespace longtake::wan {
namespace {

// Pixels of a tile that tiles before it have covered.
int64_t taken_before(const TileAxis& axis, size_t index) {
  if (index == 0) return 0;
  return kLatentPixels * (axis.begins[index - 1] + axis.size - axis.begins[index]);
}

// The share of a tile in its pixels, [8 size] f32: up from one border and down to the other over
// what it has in common with its neighbours; all tiles' add up to 1.
Tensor tile_weights(const TileAxis& axis, size_t index) {
  const int64_t size = kLatentPixels * axis.size;
  const auto ramp = [&](size_t tile, int64_t pixel) {  // of the whole axis
    const int64_t at = pixel - kLatentPixels * axis.begins[tile];
    if (at < 0 || at >= size) return 0.0;
    double up = 1, down = 1;
    if (tile > 0)
      up = (static_cast<double>(at) + 0.5) / static_cast<double>(taken_before(axis, tile));
    if (tile + 1 < axis.begins.size())
      down = (static_cast<double>(size - at) - 0.5) /
             static_cast<double>(taken_before(axis, tile + 1));
    return std::min({1.0, up, down});
  };
  Tensor weights({}, DType::kF32, {size});
  for (int64_t i = 0; i < size; ++i) {
    const int64_t pixel = kLatentPixels * axis.begins[index] + i;
    double all = 0;
    for (size_t tile = 0; tile < axis.begins.size(); ++tile) all += ramp(tile, pixel);
    weights.data<float>()[i] = static_cast<float>(ramp(index, pixel) / all);
  }
  return weights;
}

// The frames of a decoder as bytes on the CPU.
// Net: VaeDecoder, whose frames are in [-1, 1], or TaehvDecoder, whose are in [0, 1].
template <typename Net>
class Stream final : public Decoder {
 public:
  Stream(Net net, Tensor half, int64_t tile)
      : net_(std::move(net)), half_(std::move(half)), tile_(tile) {}

  int64_t begin(Context& ctx, View z) override {
    const Shape frames{kFramesPerLatent, kLatentPixels * z.dim(1), kLatentPixels * z.dim(2), 3};
    if (z_.empty()) {
      z_ = Tensor(ctx.device(), DType::kF32, z.shape());
      rgb_ = Tensor(ctx.device(), DType::kU8, frames);
      tiles_ = make_tiles(ctx, z.dim(1), z.dim(2), tile_);
    }
    if (counts_.size() == host_.size())
      host_.push_back(Tensor::staging(ctx.device(), DType::kU8, frames));
    copy(ctx, z, z_);
    // A video's first latent is one frame; every other one goes the same way.
    const bool is_first = std::exchange(is_first_, false);
    if (is_first)
      run(ctx);
    else
      graph_.run(ctx, [&] { run(ctx); });
    const int64_t count = is_first ? 1 : kFramesPerLatent;
    enqueue_copy(ctx, rgb_.view().rows(0, count), host_[counts_.size()].view().rows(0, count));
    counts_.push_back(count);
    return count;
  }

  void finish(Context& ctx, const FrameSink& rgb) override {
    ctx.synchronize();
    const std::vector<int64_t> counts = std::exchange(counts_, {});
    for (size_t i = 0; i < counts.size(); ++i) {
      for (int64_t f = 0; f < counts[i]; ++f) rgb(picture(host_[i], f));
    }
  }

 private:
  // A part of the picture, in pixels, and what the decoder remembers of it.
  struct Tile {
    TilePlace place;
    Tensor rows, columns;  // weights
    typename Net::State state;
  };

  static std::vector<Tile> make_tiles(Context& ctx, int64_t height, int64_t width, int64_t size) {
    const TileAxis down = tiles_along(height, size), across = tiles_along(width, size);
    std::vector<Tile> tiles;
    for (size_t i = 0; i < down.begins.size(); ++i) {
      for (size_t j = 0; j < across.begins.size(); ++j) {
        Tile tile;
        tile.place = {kLatentPixels * down.begins[i], kLatentPixels * across.begins[j],
                      taken_before(down, i), taken_before(across, j)};
        tile.rows = tile_weights(down, i).to(ctx.device());
        tile.columns = tile_weights(across, j).to(ctx.device());
        tiles.push_back(std::move(tile));
      }
    }
    return tiles;
  }

  static View picture(View frames, int64_t index) {
    return frames.rows(index, index + 1).reshape({frames.dim(1), frames.dim(2), frames.dim(3)});
  }

  // z_ -> rgb_
  void run(Context& ctx) {
    if (tiles_.size() == 1) {
      int64_t index = 0;
      return net_.decode(ctx, z_, tiles_[0].state, [&](View frame) {
        const Workspace::Scope scope(ctx.workspace());
        to_rgb(ctx, in_range(ctx, frame), picture(rgb_, index++));
      });
    }
    const Workspace::Scope scope(ctx.workspace());
    const View frames = ctx.workspace().take(DType::kF32, rgb_.shape());
    int64_t count = 0;
    for (Tile& tile : tiles_) {
      const Workspace::Scope tile_scope(ctx.workspace());
      const View z = ctx.workspace().take(DType::kF32, {z_.dim(0), tile.rows.dim(0) / kLatentPixels,
                                                        tile.columns.dim(0) / kLatentPixels});
      crop(ctx, z_, tile.place.row / kLatentPixels, tile.place.column / kLatentPixels, z);
      count = 0;
      net_.decode(ctx, z, tile.state, [&](View frame) {
        const Workspace::Scope frame_scope(ctx.workspace());
        blend(ctx, in_range(ctx, frame), tile.rows, tile.columns, tile.place,
              picture(frames, count++));
      });
    }
    to_rgb(ctx, frames.rows(0, count), rgb_.view().rows(0, count));
  }

  // A frame as it came, or from [0, 1] to [-1, 1].
  View in_range(Context& ctx, View frame) const {
    return half_.empty() ? frame : doubled(ctx, frame);
  }

  // 2 x - 1: by way of planes, which is where a shift comes with.
  View doubled(Context& ctx, View x) const {
    const View planes = ctx.workspace().take(DType::kF32, {x.dim(2), x.dim(0), x.dim(1)});
    to_planes(ctx, x, half_, half_, planes);
    const View out = ctx.workspace().take(DType::kF32, x.shape());
    to_channels_last(ctx, planes, View(), View(), out);
    return out;
  }

  Net net_;
  Tensor half_;   // [3]: 0.5, if frames are in [0, 1]
  int64_t tile_;  // latents; 0: whole pictures
  std::vector<Tile> tiles_;
  Tensor z_;                     // the latent in work
  Tensor rgb_;                   // [kFramesPerLatent, H, W, 3] u8, of the latent in work
  std::vector<Tensor> host_;     // the same of latents that nobody has taken yet
  std::vector<int64_t> counts_;  // and how many frames each has
  Graph graph_;
  bool is_first_ = true;
};

// The picture where the context computes; in the workspace if it must move.
View on_device(Context& ctx, View rgb) {
  if (rgb.device() == ctx.device()) return rgb;
  const View out = ctx.workspace().take(rgb.dtype(), rgb.shape());
  copy(ctx, rgb, out);
  return out;
}

class VaeStreamIn final : public Encoder {
 public:
  explicit VaeStreamIn(VaeEncoder net) : net_(std::move(net)) {}

  void encode(Context& ctx, View rgb, const FrameSink& latent) override {
    const Workspace::Scope scope(ctx.workspace());
    const View pixels = ctx.workspace().take(DType::kF32, rgb.shape());
    from_rgb(ctx, on_device(ctx, rgb), pixels);
    net_.encode(ctx, pixels, state_, latent);
  }

  void finish(Context&, const FrameSink&) override {}

 private:
  VaeEncoder net_;
  VaeEncoder::State state_;
};

class TaehvStreamIn final : public Encoder {
 public:
  // scale, shift [3]: 2 and -1.
  TaehvStreamIn(TaehvEncoder net, Tensor scale, Tensor shift)
      : net_(std::move(net)), scale_(std::move(scale)), shift_(std::move(shift)) {}

  void encode(Context& ctx, View rgb, const FrameSink& latent) override {
    if (pixels_.empty()) pixels_ = Tensor(ctx.device(), DType::kF32, rgb.shape());
    {
      const Workspace::Scope scope(ctx.workspace());
      const View planes = ctx.workspace().take(DType::kF32, {rgb.dim(2), rgb.dim(0), rgb.dim(1)});
      from_rgb(ctx, on_device(ctx, rgb), pixels_);
      to_planes(ctx, pixels_, scale_, shift_, planes);  // (x + 1) / 2
      to_channels_last(ctx, planes, View(), View(), pixels_);
    }
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
  Tensor scale_, shift_;
  Tensor pixels_;  // the latest frame, in [0, 1]
  int64_t num_frames_ = 0;
};

}  // namespace

TileAxis tiles_along(int64_t latents, int64_t tile) {
  if (tile == 0 || tile >= latents) return {latents, {0}};
  const int64_t step = tile - tile / 4;
  const int64_t rest = latents - tile;
  const int64_t steps = (rest + step - 1) / step;
  TileAxis axis{tile, {}};
  for (int64_t i = 0; i <= steps; ++i) axis.begins.push_back((i * rest + steps / 2) / steps);
  return axis;
}

std::unique_ptr<Decoder> open_decoder(Context& ctx, const Checkpoint& file, DecoderKind kind,
                                      DType compute, size_t* bytes, int64_t tile) {
  WeightTable table(file, &ctx);
  std::unique_ptr<Decoder> out;
  if (kind == DecoderKind::kVae) {
    out = std::make_unique<Stream<VaeDecoder>>(VaeDecoder(vae_dim(file), compute, table), Tensor(),
                                               tile);
  } else {
    Tensor half;
    table.constant(std::array<float, 3>{0.5F, 0.5F, 0.5F}, half);
    out =
        std::make_unique<Stream<TaehvDecoder>>(TaehvDecoder(compute, table), std::move(half), tile);
  }
  table.finish();
  if (bytes != nullptr) *bytes = table.bytes();
  return out;
}

std::unique_ptr<Encoder> open_encoder(Context& ctx, const Checkpoint& file, DecoderKind kind,
                                      DType compute) {
  WeightTable table(file, &ctx);
  std::unique_ptr<Encoder> out;
  if (kind == DecoderKind::kVae) {
    out = std::make_unique<VaeStreamIn>(VaeEncoder(vae_dim(file), compute, table));
  } else {
    Tensor scale, shift;
    table.constant(std::array<float, 3>{2, 2, 2}, scale);
    table.constant(std::array<float, 3>{-1, -1, -1}, shift);
    out = std::make_unique<TaehvStreamIn>(TaehvEncoder(compute, table), std::move(scale),
                                          std::move(shift));
  }
  table.finish();
  return out;
}

}  // namespace longtake::wan
