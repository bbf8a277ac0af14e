#include "media/frame_reader.h"

extern "C" {
#include <libavutil/imgutils.h>
#include <libavutil/mem.h>
}

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

#include "base/error.h"
#include "media/ffmpeg.h"

namespace longtake {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void refuse(const std::string& path, const std::string& expected,
                         const std::string& found) {
  throw Error(ErrorKind::kInput, str(path, ": expected ", expected, ", found ", found));
}

// FFmpeg reads through these, never by a name: what a file contains cannot make it open another
// file or address.
class FileSource {
 public:
  explicit FileSource(const std::string& path) : file_(std::fopen(path.c_str(), "rb")) {
    if (!file_) refuse(path, "a video or picture", std::strerror(errno));
    constexpr int kBufferBytes = 1 << 16;
    auto* buffer = static_cast<unsigned char*>(av_malloc(kBufferBytes));
    LONGTAKE_CHECK(buffer);
    context_ = avio_alloc_context(buffer, kBufferBytes, 0, file_.get(), read, nullptr, seek);
    LONGTAKE_CHECK(context_);
  }

  ~FileSource() {
    av_freep(&context_->buffer);  // FFmpeg may have replaced the one above
    avio_context_free(&context_);
  }

  FileSource(const FileSource&) = delete;
  FileSource& operator=(const FileSource&) = delete;

  AVIOContext* context() const { return context_; }

 private:
  static int read(void* opaque, uint8_t* out, int bytes) {
    auto* file = static_cast<std::FILE*>(opaque);
    const size_t got = std::fread(out, 1, static_cast<size_t>(bytes), file);
    if (got > 0) return static_cast<int>(got);
    return std::ferror(file) != 0 ? AVERROR(EIO) : AVERROR_EOF;
  }

  static int64_t seek(void* opaque, int64_t offset, int whence) {
    auto* file = static_cast<std::FILE*>(opaque);
    if (whence == AVSEEK_SIZE) {
      const off_t here = ftello(file);
      if (here < 0 || fseeko(file, 0, SEEK_END) != 0) return AVERROR(EIO);
      const off_t size = ftello(file);
      return fseeko(file, here, SEEK_SET) == 0 ? size : AVERROR(EIO);
    }
    if (fseeko(file, offset, whence & ~AVSEEK_FORCE) != 0) return AVERROR(EIO);
    return ftello(file);
  }

  struct CloseFile {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };

  std::unique_ptr<std::FILE, CloseFile> file_;
  AVIOContext* context_ = nullptr;
};

struct CloseDemuxer {
  void operator()(AVFormatContext* demuxer) const { avformat_close_input(&demuxer); }
};

int refuse_to_open(AVFormatContext*, AVIOContext**, const char*, int, AVDictionary**) {
  return AVERROR(EACCES);
}

// One file: a video or a single picture.
class FileReader final : public FrameReader {
 public:
  explicit FileReader(const std::string& path) : path_(path), source_(path) {
    ffmpeg::silence();
    open_demuxer();
    open_decoder();
    frame_.reset(av_frame_alloc());
    packet_.reset(av_packet_alloc());
    LONGTAKE_CHECK(frame_ && packet_);
  }

  bool read(Frame& out) override {
    if (ended_) return false;
    for (;;) {
      const int rc = avcodec_receive_frame(decoder_.get(), frame_.get());
      if (rc == AVERROR(EAGAIN)) {
        feed_decoder();
      } else if (rc == AVERROR_EOF) {
        ended_ = true;
        if (frames_read_ == 0) refuse(path_, "at least one frame", "none");
        return false;
      } else if (rc < 0) {
        fail(ffmpeg::reason(rc));
      } else {
        convert(out);
        av_frame_unref(frame_.get());
        ++frames_read_;
        return true;
      }
    }
  }

  int width() const override { return decoder_->width; }

  int height() const override { return decoder_->height; }

 private:
  void open_demuxer() {
    AVFormatContext* demuxer = avformat_alloc_context();
    LONGTAKE_CHECK(demuxer);
    demuxer->pb = source_.context();
    demuxer->io_open = refuse_to_open;
    demuxer->error_recognition = AV_EF_CRCCHECK | AV_EF_EXPLODE;
    int rc = avformat_open_input(&demuxer, nullptr, nullptr, nullptr);  // frees it on failure
    if (rc < 0) refuse(path_, "a video or picture", ffmpeg::reason(rc));
    demuxer_.reset(demuxer);
  }

  void open_decoder() {
    int rc = avformat_find_stream_info(demuxer_.get(), nullptr);
    if (rc < 0) refuse(path_, "a video or picture", ffmpeg::reason(rc));
    const AVCodec* codec = nullptr;
    stream_ = av_find_best_stream(demuxer_.get(), AVMEDIA_TYPE_VIDEO, -1, -1, &codec, 0);
    if (stream_ < 0) refuse(path_, "a video or picture", "no frames that FFmpeg can decode");
    const AVCodecParameters& parameters = *demuxer_->streams[stream_]->codecpar;
    check_size(parameters.width, parameters.height);

    decoder_.reset(avcodec_alloc_context3(codec));
    LONGTAKE_CHECK(decoder_);
    rc = avcodec_parameters_to_context(decoder_.get(), &parameters);
    if (rc < 0) refuse(path_, "a video or picture", ffmpeg::reason(rc));
    decoder_->max_pixels = int64_t{kMaxFrameSide} * kMaxFrameSide;
    decoder_->err_recognition = AV_EF_CRCCHECK | AV_EF_EXPLODE;
    rc = avcodec_open2(decoder_.get(), codec, nullptr);
    if (rc < 0) refuse(path_, "a video or picture", ffmpeg::reason(rc));
  }

  void check_size(int width, int height) const {
    if (width < 1 || height < 1 || width > kMaxFrameSide || height > kMaxFrameSide) {
      refuse(path_, str("1 to ", kMaxFrameSide, " pixels a side"), str(width, "x", height));
    }
  }

  void feed_decoder() {
    for (;;) {
      int rc = av_read_frame(demuxer_.get(), packet_.get());
      if (rc == AVERROR_EOF) {
        rc = avcodec_send_packet(decoder_.get(), nullptr);  // asks for the frames held back
      } else if (rc >= 0) {
        const bool is_ours = packet_->stream_index == stream_;
        const bool is_cut = (packet_->flags & AV_PKT_FLAG_CORRUPT) != 0;
        if (is_ours && !is_cut) rc = avcodec_send_packet(decoder_.get(), packet_.get());
        av_packet_unref(packet_.get());
        if (!is_ours) continue;
        if (is_cut) fail("the end of the file (truncated?)");
      }
      if (rc < 0) fail(ffmpeg::reason(rc));
      return;
    }
  }

  // frame_ in whatever form the file has it, to rows of RGB.
  void convert(Frame& out) {
    AVFrame& frame = *frame_;
    check_size(frame.width, frame.height);
    if (frames_read_ > 0 && (frame.width != out_width_ || frame.height != out_height_)) {
      fail(str("a frame of ", frame.width, "x", frame.height, " after ", out_width_, "x",
               out_height_));
    }
    out_width_ = frame.width;
    out_height_ = frame.height;
    if ((frame.flags & AV_FRAME_FLAG_CORRUPT) != 0 || frame.decode_error_flags != 0) {
      fail("damaged data");
    }
    const AVFrame& rgb = frame.format == AV_PIX_FMT_RGB24 ? frame : to_rgb(frame);
    out.width = frame.width;
    out.height = frame.height;
    out.rgb.resize(frame_bytes(frame.width, frame.height));
    const int row_bytes = frame.width * 3;
    av_image_copy_plane(out.rgb.data(), row_bytes, rgb.data[0], rgb.linesize[0], row_bytes,
                        frame.height);
  }

  const AVFrame& to_rgb(const AVFrame& frame) {
    const auto format = static_cast<AVPixelFormat>(frame.format);
    converter_.reset(sws_getCachedContext(converter_.release(), frame.width, frame.height, format,
                                          frame.width, frame.height, AV_PIX_FMT_RGB24,
                                          SWS_BICUBIC | SWS_ACCURATE_RND | SWS_FULL_CHR_H_INT,
                                          nullptr, nullptr, nullptr));
    if (!converter_) fail("a pixel format that swscale cannot convert");
    const bool full_range = frame.color_range == AVCOL_RANGE_JPEG ||
                            format == AV_PIX_FMT_YUVJ420P || format == AV_PIX_FMT_YUVJ422P ||
                            format == AV_PIX_FMT_YUVJ444P;
    constexpr int kOne = 1 << 16;  // contrast and saturation, 16.16
    sws_setColorspaceDetails(converter_.get(), sws_getCoefficients(frame.colorspace), full_range,
                             sws_getCoefficients(SWS_CS_DEFAULT), 1, 0, kOne, kOne);
    if (!rgb_) rgb_ = ffmpeg::make_frame(AV_PIX_FMT_RGB24, frame.width, frame.height);
    sws_scale(converter_.get(), frame.data, frame.linesize, 0, frame.height, rgb_->data,
              rgb_->linesize);
    return *rgb_;
  }

  [[noreturn]] void fail(const std::string& found) {
    ended_ = true;
    refuse(path_, str("frame ", frames_read_), found);
  }

  const std::string path_;
  FileSource source_;  // outlives the demuxer, which reads from it
  std::unique_ptr<AVFormatContext, CloseDemuxer> demuxer_;
  ffmpeg::CodecContextPtr decoder_;
  ffmpeg::ScalerPtr converter_;
  ffmpeg::FramePtr frame_, rgb_;
  ffmpeg::PacketPtr packet_;
  int stream_ = -1;
  int out_width_ = 0, out_height_ = 0;  // of the frames given so far
  int64_t frames_read_ = 0;
  bool ended_ = false;
};

// A folder: its PNGs, one file after the other.
class FolderReader final : public FrameReader {
 public:
  explicit FolderReader(const std::string& folder) {
    std::error_code error;
    for (fs::directory_iterator entry(folder, error), end; !error && entry != end;
         entry.increment(error)) {
      if (entry->path().extension() == ".png") paths_.push_back(entry->path().string());
    }
    if (error) refuse(folder, "a folder of PNGs", error.message());
    if (paths_.empty()) refuse(folder, "a folder of PNGs", "no file *.png");
    // Shorter first, so that frame_1000000 follows frame_999999.
    std::sort(paths_.begin(), paths_.end(), [](const std::string& a, const std::string& b) {
      return std::pair(a.size(), a) < std::pair(b.size(), b);
    });
    const FileReader first(paths_.front());
    width_ = first.width();
    height_ = first.height();
  }

  bool read(Frame& out) override {
    if (next_ == paths_.size()) return false;
    const std::string& path = paths_[next_++];
    FileReader(path).read(out);
    if (out.width != width_ || out.height != height_) {
      refuse(path, str(width_, "x", height_, " like the first picture of the folder"),
             str(out.width, "x", out.height));
    }
    return true;
  }

  int width() const override { return width_; }

  int height() const override { return height_; }

 private:
  std::vector<std::string> paths_;
  size_t next_ = 0;
  int width_ = 0, height_ = 0;
};

}  // namespace

std::unique_ptr<FrameReader> open_frame_reader(const std::string& path) {
  std::error_code ignored;
  if (fs::is_directory(path, ignored)) return std::make_unique<FolderReader>(path);
  return std::make_unique<FileReader>(path);
}

}  // namespace longtake
