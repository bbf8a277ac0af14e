#include "base/error.h"
#include "media/ffmpeg.h"
#include "media/frame.h"

extern "C" {
#include <libavutil/imgutils.h>
}

namespace longtake {

Frame resized(const Frame& frame, int width, int height) {
  LONGTAKE_CHECK(frame.width > 0 && frame.height > 0 && width > 0 && height > 0 &&
                     width <= kMaxFrameSide && height <= kMaxFrameSide,
                 frame.width, "x", frame.height, " to ", width, "x", height);
  LONGTAKE_CHECK(frame.rgb.size() == frame_bytes(frame.width, frame.height), frame.rgb.size());
  if (frame.width == width && frame.height == height) return frame;

  ffmpeg::silence();
  // The scaler works in YUV; the flags keep the colour at full resolution on both sides.
  const ffmpeg::ScalerPtr scaler(
      sws_getContext(frame.width, frame.height, AV_PIX_FMT_RGB24, width, height, AV_PIX_FMT_RGB24,
                     SWS_AREA | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INP | SWS_FULL_CHR_H_INT, nullptr,
                     nullptr, nullptr));
  LONGTAKE_CHECK(scaler);
  // Both sides lie in padded memory: the scaler's vector code runs past the ends of rows.
  const auto from = ffmpeg::make_frame(AV_PIX_FMT_RGB24, frame.width, frame.height);
  const auto to = ffmpeg::make_frame(AV_PIX_FMT_RGB24, width, height);
  av_image_copy_plane(from->data[0], from->linesize[0], frame.rgb.data(), frame.width * 3,
                      frame.width * 3, frame.height);
  sws_scale(scaler.get(), from->data, from->linesize, 0, frame.height, to->data, to->linesize);

  Frame out{width, height, std::vector<uint8_t>(frame_bytes(width, height))};
  av_image_copy_plane(out.rgb.data(), width * 3, to->data[0], to->linesize[0], width * 3, height);
  return out;
}

}  // namespace longtake
