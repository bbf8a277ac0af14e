// H.264 in fragmented mp4. The file is an empty index followed by fragments that stand alone, one
// for each keyframe, so that it plays however it ends. There are no B-frames: time starts at 0 in
// every player, and a kill loses no more than the fragment in work and the encoder's look-ahead.
extern "C" {
#include <libavutil/opt.h>
}

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <vector>

#include "base/error.h"
#include "base/log.h"
#include "media/ffmpeg.h"
#include "media/frame.h"
#include "media/frame_sink.h"

namespace longtake {
namespace {

struct CloseMuxer {
  void operator()(AVFormatContext* muxer) const {
    avio_closep(&muxer->pb);
    avformat_free_context(muxer);
  }
};

// Best first. Those of hardware are left out: each wants set-up of its own.
const AVCodec* find_encoder() {
  for (const char* name : {"libx264", "libopenh264", "mpeg4"}) {
    if (const AVCodec* codec = avcodec_find_encoder_by_name(name)) {
      if (std::string_view(name) != "libx264") {
        log(LogLevel::kWarning, str("mp4: expected FFmpeg with libx264, found ", name,
                                    " at best; quality and playback may suffer"));
      }
      return codec;
    }
  }
  throw Error("mp4: expected FFmpeg with an H.264 encoder, found none");
}

int even(int side) {
  return side + side % 2;
}

class Mp4Sink final : public FrameSink {
 public:
  Mp4Sink(const std::string& path, int width, int height, double fps)
      : path_(path), width_(width), height_(height) {
    ffmpeg::silence();
    open_encoder(fps);
    open_converter();
    open_file();
  }

  ~Mp4Sink() override {
    if (finished_) return;
    // Cut off a fragment that is only half there: a full disk leaves one.
    muxer_.reset();
    std::error_code ignored;
    std::filesystem::resize_file(path_, static_cast<uintmax_t>(kept_bytes_), ignored);
  }

  void encode(const uint8_t* rgb) override {
    int rc = av_frame_make_writable(picture_.get());
    if (rc < 0) fail(rc);
    const uint8_t* rows = padded_.empty() ? rgb : pad_to_even(rgb);
    const int row_bytes = even(width_) * 3;
    sws_scale(converter_.get(), &rows, &row_bytes, 0, even(height_), picture_->data,
              picture_->linesize);
    picture_->pts = frames_encoded_++;
    rc = avcodec_send_frame(encoder_.get(), picture_.get());
    if (rc < 0) fail(rc);
    move_packets();
  }

  void finish() override {
    int rc = avcodec_send_frame(encoder_.get(), nullptr);  // end of stream
    if (rc < 0) fail(rc);
    move_packets();
    rc = av_write_trailer(muxer_.get());
    if (rc < 0) fail(rc);
    rc = avio_closep(&muxer_->pb);
    if (rc < 0) fail(rc);
    frames_kept_ = frames_encoded_;
    finished_ = true;
  }

  int64_t frames_kept() const override { return frames_kept_; }

 private:
  void open_encoder(double fps) {
    const AVCodec* codec = find_encoder();
    encoder_.reset(avcodec_alloc_context3(codec));
    LONGTAKE_CHECK(encoder_);
    AVCodecContext& encoder = *encoder_;
    encoder.width = even(width_);
    encoder.height = even(height_);
    encoder.pix_fmt = AV_PIX_FMT_YUV420P;  // the only format that every browser plays
    encoder.color_range = AVCOL_RANGE_MPEG;
    encoder.color_primaries = AVCOL_PRI_BT709;
    encoder.color_trc = AVCOL_TRC_BT709;
    encoder.colorspace = AVCOL_SPC_BT709;
    encoder.framerate = av_d2q(fps, 1 << 16);
    encoder.time_base = av_inv_q(encoder.framerate);
    encoder.gop_size = std::max(1, static_cast<int>(std::lround(fps)));  // a keyframe a second
    encoder.max_b_frames = 0;
    encoder.thread_count = 1;  // the cores belong to the model
    encoder.flags |= AV_CODEC_FLAG_GLOBAL_HEADER;
    if (std::string_view(codec->name) == "libx264") {
      av_opt_set(encoder.priv_data, "preset", "veryfast", 0);
      av_opt_set(encoder.priv_data, "crf", "18", 0);
    } else {
      encoder.bit_rate = std::llround(0.25 * encoder.width * encoder.height * fps);  // bits/s
    }
    const int rc = avcodec_open2(encoder_.get(), codec, nullptr);
    if (rc < 0) {
      throw Error(str("mp4: expected ", codec->name, " to take ", encoder.width, "x",
                      encoder.height, " at ", fps, " frames/s, found ", ffmpeg::reason(rc)));
    }
    packet_.reset(av_packet_alloc());
    LONGTAKE_CHECK(packet_);
  }

  void open_converter() {
    const int width = even(width_);
    const int height = even(height_);
    if (width != width_ || height != height_) padded_.resize(frame_bytes(width, height) + 64);
    picture_ = ffmpeg::make_frame(AV_PIX_FMT_YUV420P, width, height);
    converter_.reset(sws_getContext(width, height, AV_PIX_FMT_RGB24, width, height,
                                    AV_PIX_FMT_YUV420P, SWS_AREA | SWS_ACCURATE_RND, nullptr,
                                    nullptr, nullptr));
    LONGTAKE_CHECK(converter_);
    const int* bt709 = sws_getCoefficients(SWS_CS_ITU709);
    constexpr int kOne = 1 << 16;  // contrast and saturation, 16.16
    sws_setColorspaceDetails(converter_.get(), bt709, 1, bt709, 0, 0, kOne, kOne);
  }

  void open_file() {
    AVFormatContext* muxer = nullptr;
    int rc = avformat_alloc_output_context2(&muxer, nullptr, "mp4", nullptr);
    muxer_.reset(muxer);
    if (rc < 0) throw Error(str("mp4: expected FFmpeg with its muxer, found ", ffmpeg::reason(rc)));
    muxer->flags |= AVFMT_FLAG_FLUSH_PACKETS;  // a fragment must not wait in a buffer of ours

    stream_ = avformat_new_stream(muxer, nullptr);
    LONGTAKE_CHECK(stream_);
    avcodec_parameters_from_context(stream_->codecpar, encoder_.get());
    stream_->time_base = encoder_->time_base;
    stream_->avg_frame_rate = encoder_->framerate;

    // "file:" keeps a name such as `a:b.mp4` from being taken for an address.
    rc = avio_open(&muxer->pb, ("file:" + path_).c_str(), AVIO_FLAG_WRITE);
    if (rc < 0) refuse(rc);
    av_opt_set(muxer->priv_data, "movflags", "frag_keyframe+empty_moov+default_base_moof", 0);
    rc = avformat_write_header(muxer, nullptr);
    if (rc < 0) refuse(rc);
    avio_flush(muxer->pb);
    if (muxer->pb->error < 0) refuse(muxer->pb->error);
    kept_bytes_ = avio_tell(muxer->pb);
  }

  // 4:2:0 video has even sides: an odd one gets its edge repeated once.
  const uint8_t* pad_to_even(const uint8_t* rgb) {
    const size_t from_bytes = static_cast<size_t>(width_) * 3;
    const size_t to_bytes = static_cast<size_t>(even(width_)) * 3;
    for (int y = 0; y < even(height_); ++y) {
      const uint8_t* from = rgb + static_cast<size_t>(std::min(y, height_ - 1)) * from_bytes;
      uint8_t* to = padded_.data() + static_cast<size_t>(y) * to_bytes;
      std::memcpy(to, from, from_bytes);
      if (to_bytes != from_bytes) std::memcpy(to + from_bytes, from + from_bytes - 3, 3);
    }
    return padded_.data();
  }

  // What the encoder has ready goes to the file.
  void move_packets() {
    for (;;) {
      int rc = avcodec_receive_packet(encoder_.get(), packet_.get());
      if (rc == AVERROR(EAGAIN) || rc == AVERROR_EOF) return;
      if (rc < 0) fail(rc);
      const int64_t frame = packet_->pts;
      const bool is_key = (packet_->flags & AV_PKT_FLAG_KEY) != 0;
      packet_->duration = 1;
      packet_->stream_index = stream_->index;
      av_packet_rescale_ts(packet_.get(), encoder_->time_base, stream_->time_base);
      rc = av_write_frame(muxer_.get(), packet_.get());
      if (rc >= 0) rc = muxer_->pb->error;
      av_packet_unref(packet_.get());
      if (rc < 0) fail(rc);
      if (is_key) {  // it made the muxer write out the fragment before it
        frames_kept_ = frame;
        kept_bytes_ = avio_tell(muxer_->pb);
      }
    }
  }

  [[noreturn]] void refuse(int code) const {
    throw Error(ErrorKind::kUsage,
                str("output: expected to write ", path_, ", found ", ffmpeg::reason(code)));
  }

  [[noreturn]] void fail(int code) const {
    throw Error(str(path_, ": expected to write frame ", frames_encoded_, ", found ",
                    ffmpeg::reason(code), "; the first ", frames_kept_, " frames are kept"));
  }

  const std::string path_;
  const int width_, height_;
  std::vector<uint8_t> padded_;  // [even(height), even(width), 3], empty if the sides are even
  ffmpeg::CodecContextPtr encoder_;
  ffmpeg::ScalerPtr converter_;
  ffmpeg::FramePtr picture_;  // yuv420p, reused
  ffmpeg::PacketPtr packet_;
  std::unique_ptr<AVFormatContext, CloseMuxer> muxer_;
  AVStream* stream_ = nullptr;  // the muxer's
  int64_t frames_encoded_ = 0;
  int64_t frames_kept_ = 0;  // in whole fragments, which end at byte kept_bytes_
  int64_t kept_bytes_ = 0;
  bool finished_ = false;
};

}  // namespace

std::unique_ptr<FrameSink> open_mp4_sink(const std::string& path, int width, int height,
                                         double fps) {
  return std::make_unique<Mp4Sink>(path, width, height, fps);
}

}  // namespace longtake
