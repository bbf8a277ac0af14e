// FFmpeg's objects as owners, and its error codes as words. Private to media/.
#pragma once

extern "C" {
#include <libavcodec/avcodec.h>
#include <libavformat/avformat.h>
#include <libavutil/frame.h>
#include <libswscale/swscale.h>
}

#include <memory>
#include <string>

namespace longtake::ffmpeg {

// FFmpeg frees by pointer to pointer, which it clears.
template <auto kFree>
struct FreeBy {
  template <typename T>
  void operator()(T* object) const {
    kFree(&object);
  }
};

struct FreeScaler {
  void operator()(SwsContext* scaler) const { sws_freeContext(scaler); }
};

using CodecContextPtr = std::unique_ptr<AVCodecContext, FreeBy<avcodec_free_context>>;
using FramePtr = std::unique_ptr<AVFrame, FreeBy<av_frame_free>>;
using PacketPtr = std::unique_ptr<AVPacket, FreeBy<av_packet_free>>;
using ScalerPtr = std::unique_ptr<SwsContext, FreeScaler>;

// "No space left on device" for AVERROR(ENOSPC).
std::string reason(int code);

// FFmpeg prints to stderr by itself; a library must not. Called before any use.
void silence();

// A frame with memory of its own, rows padded as FFmpeg's vector code wants them.
FramePtr make_frame(AVPixelFormat format, int width, int height);

}  // namespace longtake::ffmpeg
