// A folder of PNGs. Each is written under another name and renamed, so that a kill leaves no half
// picture.
#include <png.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "base/error.h"
#include "media/frame_sink.h"

namespace longtake {
namespace {

namespace fs = std::filesystem;

std::string frame_name(int64_t index) {
  char name[40];
  std::snprintf(name, sizeof(name), "frame_%06lld.png", static_cast<long long>(index));
  return name;
}

bool is_frame_name(const std::string& name) {
  constexpr size_t kPrefix = 6, kSuffix = 4;  // "frame_", ".png"
  if (name.size() < kPrefix + 6 + kSuffix || name.compare(0, kPrefix, "frame_") != 0 ||
      name.compare(name.size() - kSuffix, kSuffix, ".png") != 0) {
    return false;
  }
  return std::all_of(name.begin() + kPrefix, name.end() - kSuffix,
                     [](char c) { return c >= '0' && c <= '9'; });
}

class PngSink final : public FrameSink {
 public:
  PngSink(const std::string& folder, int width, int height)
      : folder_(folder), part_(folder_ / "frame.png.part"), width_(width), height_(height) {
    std::error_code error;
    fs::create_directories(folder_, error);
    if (error) refuse(error.message());
    errno = 0;
    if (!std::ofstream(part_)) refuse(std::strerror(errno));
    fs::remove(part_, error);
    remove_earlier_frames();
  }

  ~PngSink() override {
    std::error_code ignored;
    fs::remove(part_, ignored);
  }

  void encode(const uint8_t* rgb) override {
    png_image image = {};
    image.version = PNG_IMAGE_VERSION;
    image.width = static_cast<png_uint_32>(width_);
    image.height = static_cast<png_uint_32>(height_);
    image.format = PNG_FORMAT_RGB;
    image.flags = PNG_IMAGE_FLAG_FAST;
    errno = 0;
    if (!png_image_write_to_file(&image, part_.c_str(), 0, rgb, 0, nullptr)) {
      fail(errno != 0 ? std::strerror(errno) : image.message);
    }
    std::error_code error;
    fs::rename(part_, folder_ / frame_name(frames_), error);
    if (error) fail(error.message());
    ++frames_;
  }

  void finish() override {}

  int64_t frames_kept() const override { return frames_; }

 private:
  // As an mp4 is replaced, so are the frames of an earlier run: mixed with ours they would play as
  // one video.
  void remove_earlier_frames() const {
    std::error_code error;
    for (fs::directory_iterator entry(folder_, error), end; !error && entry != end;
         entry.increment(error)) {
      std::error_code ignored;
      if (is_frame_name(entry->path().filename().string())) fs::remove(entry->path(), ignored);
    }
    if (error) refuse(error.message());
  }

  [[noreturn]] void refuse(const std::string& found) const {
    throw Error(ErrorKind::kUsage, str("output: expected to write PNGs into the folder ",
                                       folder_.string(), ", found ", found));
  }

  [[noreturn]] void fail(const std::string& found) const {
    throw Error(str((folder_ / frame_name(frames_)).string(), ": expected to write a PNG, found ",
                    found, "; the first ", frames_, " frames are kept"));
  }

  const fs::path folder_, part_;
  const int width_, height_;
  int64_t frames_ = 0;
};

}  // namespace

std::unique_ptr<FrameSink> open_png_sink(const std::string& folder, int width, int height) {
  return std::make_unique<PngSink>(folder, width, height);
}

}  // namespace longtake
