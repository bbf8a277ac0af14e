#include "media/ffmpeg.h"

extern "C" {
#include <libavutil/error.h>
#include <libavutil/log.h>
}

#include "base/error.h"

namespace longtake::ffmpeg {

std::string reason(int code) {
  char text[AV_ERROR_MAX_STRING_SIZE] = {};
  av_strerror(code, text, sizeof(text));
  return text;
}

void silence() {
  av_log_set_level(AV_LOG_QUIET);
}

FramePtr make_frame(AVPixelFormat format, int width, int height) {
  FramePtr frame(av_frame_alloc());
  LONGTAKE_CHECK(frame);
  frame->format = format;
  frame->width = width;
  frame->height = height;
  const int rc = av_frame_get_buffer(frame.get(), 0);
  if (rc < 0)
    throw Error(str("a frame of ", width, "x", height, ": expected memory, found ", reason(rc)));
  return frame;
}

}  // namespace longtake::ffmpeg
