// Frames to files and back: exactness, sizes, and what is left when something goes wrong.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "media/frame_reader.h"
#include "media/frame_writer.h"

namespace longtake {
namespace {

namespace fs = std::filesystem;
using namespace std::chrono_literals;

// A folder of its own for each test, removed afterwards.
class MediaTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "longtake_media_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }

  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return (folder_ / name).string(); }

 private:
  fs::path folder_;
};

// Smooth colours that drift with `time`, with something different in each corner.
Frame picture(int width, int height, int time) {
  Frame frame{width, height, std::vector<uint8_t>(frame_bytes(width, height))};
  uint8_t* out = frame.rgb.data();
  for (int y = 0; y < height; ++y) {
    for (int x = 0; x < width; ++x) {
      *out++ = static_cast<uint8_t>(20 + 200 * x / width);
      *out++ = static_cast<uint8_t>(20 + 200 * y / height);
      *out++ = static_cast<uint8_t>(127.5 + 100 * std::sin(0.05 * (x + y) + 0.3 * time));
    }
  }
  return frame;
}

// Does not compress: fills files fast.
Frame noise(int width, int height, uint32_t seed) {
  Frame frame{width, height, std::vector<uint8_t>(frame_bytes(width, height))};
  for (uint8_t& sample : frame.rgb) {
    seed = seed * 1664525u + 1013904223u;
    sample = static_cast<uint8_t>(seed >> 24);
  }
  return frame;
}

// dB over the pixels that both have: an odd frame comes back with an even size.
double psnr(const Frame& a, const Frame& b) {
  const int width = std::min(a.width, b.width);
  const int height = std::min(a.height, b.height);
  double squares = 0;
  for (int y = 0; y < height; ++y) {
    for (int i = 0; i < 3 * width; ++i) {
      const double d = a.rgb[static_cast<size_t>(y * a.width * 3 + i)] -
                       b.rgb[static_cast<size_t>(y * b.width * 3 + i)];
      squares += d * d;
    }
  }
  return 10 * std::log10(255.0 * 255.0 * width * height * 3 / std::max(squares, 1e-9));
}

void write_pictures(const std::string& path, int width, int height, int frames) {
  const auto writer = open_frame_writer(path, width, height, 16);
  for (int i = 0; i < frames; ++i) writer->write(picture(width, height, i).rgb.data());
  writer->close();
  EXPECT_EQ(writer->frames_written(), frames);
}

// Reads to the end; every frame must be the picture of its index.
int count_pictures(const std::string& path, double least_psnr) {
  const auto reader = open_frame_reader(path);
  Frame frame;
  int count = 0;
  while (reader->read(frame)) {
    EXPECT_EQ(frame.rgb.size(), frame_bytes(reader->width(), reader->height()));
    EXPECT_GT(psnr(frame, picture(frame.width, frame.height, count)), least_psnr)
        << "frame " << count;
    ++count;
  }
  return count;
}

int count_frames(const std::string& path) {
  const auto reader = open_frame_reader(path);
  Frame frame;
  int count = 0;
  while (reader->read(frame)) ++count;
  return count;
}

void truncate_file(const std::string& path, double keep) {
  fs::resize_file(path, static_cast<uintmax_t>(keep * static_cast<double>(fs::file_size(path))));
}

// The one line of the Error that `action` throws, of the kind expected.
std::string error_of(ErrorKind kind, const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    const std::string line = error.what();
    EXPECT_EQ(error.kind(), kind) << line;
    EXPECT_EQ(line.find('\n'), std::string::npos) << line;
    EXPECT_NE(line.find("expected"), std::string::npos) << line;
    EXPECT_NE(line.find("found"), std::string::npos) << line;
    return line;
  }
  ADD_FAILURE() << "expected an Error, found none";
  return "";
}

TEST_F(MediaTest, PngFolderComesBackExactly) {
  for (const auto& [width, height] : {std::pair{64, 48}, {33, 17}, {1, 1}}) {
    const std::string folder = path(str("png", width));
    const auto writer = open_frame_writer(folder, width, height, 16);
    for (uint32_t i = 0; i < 12; ++i) writer->write(noise(width, height, i).rgb.data());
    writer->close();
    EXPECT_EQ(writer->frames_written(), 12);

    const auto reader = open_frame_reader(folder);
    EXPECT_EQ(reader->width(), width);
    EXPECT_EQ(reader->height(), height);
    Frame frame;
    for (uint32_t i = 0; i < 12; ++i) {
      ASSERT_TRUE(reader->read(frame));
      EXPECT_EQ(frame.rgb, noise(width, height, i).rgb) << width << "x" << height << " frame " << i;
    }
    EXPECT_FALSE(reader->read(frame));
  }
}

TEST_F(MediaTest, PngFolderReplacesOnlyItsOwnFrames) {
  write_pictures(path("out"), 16, 16, 5);
  std::ofstream(path("out/notes.txt")) << "kept";
  std::ofstream(path("out/frame_sketch.png")) << "kept";
  write_pictures(path("out"), 16, 16, 2);
  EXPECT_TRUE(fs::exists(path("out/notes.txt")));
  EXPECT_TRUE(fs::exists(path("out/frame_sketch.png")));
  EXPECT_TRUE(fs::exists(path("out/frame_000001.png")));
  EXPECT_FALSE(fs::exists(path("out/frame_000002.png")));
}

TEST_F(MediaTest, Mp4KeepsFramesAndColours) {
  write_pictures(path("a.mp4"), 128, 96, 50);
  EXPECT_EQ(count_pictures(path("a.mp4"), 35), 50);
}

TEST_F(MediaTest, Mp4PureColoursSurvive) {  // a wrong matrix or range shifts these by 10 and more
  for (const uint32_t colour : {0xff0000u, 0x00ff00u, 0x0000ffu, 0x000000u, 0xffffffu, 0x808080u}) {
    Frame flat{32, 32, std::vector<uint8_t>(frame_bytes(32, 32))};
    for (size_t i = 0; i < flat.rgb.size(); ++i) {
      flat.rgb[i] = static_cast<uint8_t>(colour >> (16 - 8 * (i % 3)));
    }
    const auto writer = open_frame_writer(path("flat.mp4"), 32, 32, 16);
    writer->write(flat.rgb.data());
    writer->close();
    Frame back;
    ASSERT_TRUE(open_frame_reader(path("flat.mp4"))->read(back));
    for (size_t i = 0; i < flat.rgb.size(); ++i) {
      ASSERT_NEAR(back.rgb[i], flat.rgb[i], 4) << std::hex << colour << " sample " << i;
    }
  }
}

TEST_F(MediaTest, Mp4OddSidesGrowByOne) {
  write_pictures(path("odd.mp4"), 65, 47, 10);
  const auto reader = open_frame_reader(path("odd.mp4"));
  EXPECT_EQ(reader->width(), 66);
  EXPECT_EQ(reader->height(), 48);
  Frame frame;
  for (int i = 0; i < 10; ++i) {
    ASSERT_TRUE(reader->read(frame));
    EXPECT_GT(psnr(frame, picture(65, 47, i)), 30) << "frame " << i;
  }
  EXPECT_FALSE(reader->read(frame));

  write_pictures(path("dot.mp4"), 1, 1, 3);
  EXPECT_EQ(count_frames(path("dot.mp4")), 3);
}

TEST_F(MediaTest, Mp4IsTheSameFileEveryTime) {
  const auto bytes_of = [this](const std::string& name) {
    write_pictures(path(name), 64, 64, 20);
    std::ifstream file(path(name), std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  EXPECT_EQ(bytes_of("a.mp4"), bytes_of("b.mp4"));
}

TEST_F(MediaTest, NamesAreNeverAddressesOrPatterns) {
  for (const std::string name : {"http:b.mp4", "b_%03d.mp4", "b*.mp4", "UPPER.MP4"}) {
    write_pictures(path(name), 16, 16, 2);
    EXPECT_TRUE(fs::is_regular_file(path(name))) << name;
    EXPECT_EQ(count_frames(path(name)), 2) << name;
  }
}

TEST_F(MediaTest, DestructorFinishesTheFile) {
  {
    const auto writer = open_frame_writer(path("a.mp4"), 64, 48, 16);
    for (int i = 0; i < 5; ++i) writer->write(picture(64, 48, i).rgb.data());
  }
  EXPECT_EQ(count_pictures(path("a.mp4"), 30), 5);
}

TEST_F(MediaTest, KilledRunLeavesAPlayableVideo) {
  int report[2];  // the child's frames_written() each time that it grew
  ASSERT_EQ(pipe(report), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const auto writer = open_frame_writer(path("killed.mp4"), 64, 48, 16);
    for (int i = 0, kept = 0;; ++i) {
      writer->write(picture(64, 48, i).rgb.data());
      if (writer->frames_written() == kept) continue;
      kept = static_cast<int>(writer->frames_written());
      if (write(report[1], &kept, sizeof(kept)) < 0) _exit(1);
    }
  }
  close(report[1]);
  int kept = 0;
  while (kept < 100 && read(report[0], &kept, sizeof(kept)) == sizeof(kept)) {
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  close(report[0]);
  EXPECT_GE(kept, 100);
  EXPECT_GE(count_pictures(path("killed.mp4"), 30), kept);
}

TEST_F(MediaTest, AllButTheLastSecondIsSafeAtAnyTime) {
  const auto writer = open_frame_writer(path("live.mp4"), 64, 48, 16);
  for (int i = 0; i < 200; ++i) writer->write(picture(64, 48, i).rgb.data());
  // One second in work, a second of look-ahead, the queue.
  for (int tries = 0; writer->frames_written() < 160 && tries < 500; ++tries) {
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_GE(writer->frames_written(), 160);
  EXPECT_GE(count_pictures(path("live.mp4"), 30), 160);
}

// Puts a limit on the size of files for one scope: writing past it fails as on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    getrlimit(RLIMIT_FSIZE, &before_);
    old_handler_ = signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{bytes, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &limit);
  }

  ~FileSizeLimit() {
    setrlimit(RLIMIT_FSIZE, &before_);
    signal(SIGXFSZ, old_handler_);
  }

 private:
  rlimit before_ = {};
  sighandler_t old_handler_ = nullptr;
};

TEST_F(MediaTest, FullDiskIsOneErrorAndKeepsWhatWasWritten) {
  int64_t kept = 0;
  {
    const FileSizeLimit limit(400'000);
    const auto writer = open_frame_writer(path("full.mp4"), 64, 48, 4);
    const std::string line = error_of(ErrorKind::kRuntime, [&] {
      for (uint32_t i = 0; i < 1000; ++i) writer->write(noise(64, 48, i).rgb.data());
      writer->close();
    });
    EXPECT_NE(line.find("full.mp4"), std::string::npos) << line;
    EXPECT_NE(line.find("File too large"), std::string::npos) << line;
    EXPECT_NO_THROW(writer->close());  // reported once
    kept = writer->frames_written();
  }
  EXPECT_GT(kept, 4);
  EXPECT_LE(fs::file_size(path("full.mp4")), 400'000u);
  EXPECT_EQ(count_frames(path("full.mp4")), kept);
}

TEST_F(MediaTest, FullDiskAtTheEndSurfacesAtClose) {
  const auto writer = open_frame_writer(path("end.mp4"), 64, 48, 16);
  for (uint32_t i = 0; i < 3; ++i) writer->write(noise(64, 48, i).rgb.data());
  const FileSizeLimit limit(2000);  // room for the header alone
  error_of(ErrorKind::kRuntime, [&] { writer->close(); });
  EXPECT_EQ(writer->frames_written(), 0);
}

TEST_F(MediaTest, FullDiskLeavesNoHalfPicture) {
  const auto writer = open_frame_writer(path("full"), 64, 48, 16);
  writer->write(picture(64, 48, 0).rgb.data());
  while (writer->frames_written() < 1) std::this_thread::sleep_for(1ms);
  {
    const FileSizeLimit limit(2000);
    const std::string line = error_of(ErrorKind::kRuntime, [&] {
      for (uint32_t i = 1; i < 100; ++i) writer->write(noise(64, 48, i).rgb.data());
    });
    EXPECT_NE(line.find("File too large"), std::string::npos) << line;
  }
  EXPECT_EQ(writer->frames_written(), 1);
  EXPECT_EQ(count_frames(path("full")), 1);
  EXPECT_EQ(std::distance(fs::directory_iterator(path("full")), {}), 1);
}

TEST_F(MediaTest, UnwritablePlacesAreRefusedAtOpening) {
  std::ofstream(path("file")) << "not a folder";
  std::vector<std::string> places = {path("missing/a.mp4"), path("file/a.mp4"), path("file"),
                                     path("file/sub"), std::string()};
  // Where not even root can write; without the mount it is a folder like any other.
  if (fs::exists("/proc/self")) places.insert(places.end(), {"/proc/longtake/a", "/proc/a.mp4"});
  for (const std::string& place : places) {
    error_of(ErrorKind::kUsage, [&] { open_frame_writer(place, 64, 48, 16); });
  }
  fs::create_symlink("/dev/full", path("full.mp4"));
  const std::string line =
      error_of(ErrorKind::kUsage, [&] { open_frame_writer(path("full.mp4"), 64, 48, 16); });
  EXPECT_NE(line.find("No space left on device"), std::string::npos) << line;
  error_of(ErrorKind::kUsage, [&] { open_frame_writer(path("a.webm"), 64, 48, 16); });
  EXPECT_FALSE(fs::exists(path("a.webm")));
}

TEST_F(MediaTest, ImpossibleSizesAndRatesAreRefused) {
  for (const auto& [width, height] : {std::pair{0, 48}, {64, -1}, {kMaxFrameSide + 1, 48}}) {
    error_of(ErrorKind::kUsage, [&] { open_frame_writer(path("a.mp4"), width, height, 16); });
  }
  for (const double fps : {0.0, -1.0, 1e9, std::nan("")}) {
    error_of(ErrorKind::kUsage, [&] { open_frame_writer(path("a.mp4"), 64, 48, fps); });
  }
  EXPECT_FALSE(fs::exists(path("a.mp4")));
}

TEST_F(MediaTest, ReaderRefusesWhatIsNoVideo) {
  std::ofstream(path("empty.mp4"));
  std::ofstream(path("text.mp4")) << "this is not a video, whatever its name says\n";
  std::ofstream(path("list.txt")) << "ffconcat version 1.0\nfile /etc/passwd\n";
  std::ofstream(path("list.m3u8")) << "#EXTM3U\n#EXTINF:1,\n" << path("good.mp4") << "\n";
  write_pictures(path("good.mp4"), 16, 16, 2);
  fs::create_directory(path("bare"));
  for (const char* name :
       {"missing.mp4", "empty.mp4", "text.mp4", "list.txt", "list.m3u8", "bare"}) {
    const std::string line = error_of(ErrorKind::kInput, [&] { count_frames(path(name)); });
    EXPECT_NE(line.find(name), std::string::npos) << line;
  }
}

TEST_F(MediaTest, ReaderReportsTruncatedFiles) {
  write_pictures(path("cut.mp4"), 64, 48, 50);
  truncate_file(path("cut.mp4"), 0.6);
  error_of(ErrorKind::kInput, [&] { count_frames(path("cut.mp4")); });

  write_pictures(path("cut"), 64, 48, 3);
  truncate_file(path("cut/frame_000001.png"), 0.5);
  const auto reader = open_frame_reader(path("cut"));
  Frame frame;
  EXPECT_TRUE(reader->read(frame));
  const std::string line = error_of(ErrorKind::kInput, [&] { reader->read(frame); });
  EXPECT_NE(line.find("frame_000001.png"), std::string::npos) << line;
}

// No bytes, however placed, may do more than throw Error (run under ASan for its full worth).
TEST_F(MediaTest, ReaderSurvivesDamage) {
  write_pictures(path("good.mp4"), 32, 32, 8);
  write_pictures(path("good"), 32, 32, 1);
  for (const std::string good : {"good.mp4", "good/frame_000000.png"}) {
    std::ifstream file(path(good), std::ios::binary);
    const std::string bytes(std::istreambuf_iterator<char>(file), {});
    uint32_t random = 1;
    const auto next = [&random] { return (random = random * 1664525u + 1013904223u) >> 8; };
    for (int round = 0; round < 150; ++round) {
      std::string bad = bytes;
      for (int i = 0; i < 4; ++i) bad[next() % bad.size()] = static_cast<char>(next());
      std::ofstream(path("bad"), std::ios::binary) << bad;
      try {
        count_frames(path("bad"));
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::kInput) << error.what();
      }
    }
  }
}

TEST_F(MediaTest, FolderOfMixedSizesIsRefused) {
  write_pictures(path("a"), 16, 16, 1);
  write_pictures(path("b"), 16, 18, 1);
  fs::copy_file(path("b/frame_000000.png"), path("a/frame_000001.png"));
  error_of(ErrorKind::kInput, [&] { count_frames(path("a")); });
}

TEST_F(MediaTest, FolderOrderIsThatOfTheNumbers) {
  write_pictures(path("a"), 16, 16, 2);
  fs::rename(path("a/frame_000001.png"), path("a/frame_1000000.png"));
  fs::rename(path("a/frame_000000.png"), path("a/frame_999999.png"));
  EXPECT_EQ(count_pictures(path("a"), 90), 2);
}

TEST(ResizedTest, MeansOfAreas) {
  Frame checks{64, 64, std::vector<uint8_t>(frame_bytes(64, 64))};  // 2x2 checks: red and blue
  for (int y = 0; y < 64; ++y) {
    for (int x = 0; x < 64; ++x) {
      checks.rgb[static_cast<size_t>((y * 64 + x) * 3 + ((x + y) % 2 == 0 ? 0 : 2))] = 200;
    }
  }
  const Frame small = resized(checks, 16, 16);
  ASSERT_EQ(small.rgb.size(), frame_bytes(16, 16));
  for (size_t i = 0; i < small.rgb.size(); ++i) {
    ASSERT_NEAR(small.rgb[i], i % 3 == 1 ? 0 : 100, 3) << i;
  }
}

TEST(ResizedTest, HalvingIsTheMeanOfFourPixels) {
  const Frame large = picture(130, 94, 0);
  Frame mean{65, 47, std::vector<uint8_t>(frame_bytes(65, 47))};
  for (int y = 0; y < 47; ++y) {
    for (int i = 0; i < 65 * 3; ++i) {
      const auto at = [&](int dy, int dx) {
        return int{
            large.rgb[static_cast<size_t>(((2 * y + dy) * 130 + 2 * (i / 3) + dx) * 3 + i % 3)]};
      };
      mean.rgb[static_cast<size_t>(y * 65 * 3 + i)] =
          static_cast<uint8_t>((at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1) + 2) / 4);
    }
  }
  EXPECT_GT(psnr(resized(large, 65, 47), mean), 40);
}

TEST(ResizedTest, SameSizeIsACopyAndOddSizesWork) {
  const Frame frame = picture(65, 47, 0);
  EXPECT_EQ(resized(frame, 65, 47).rgb, frame.rgb);
  EXPECT_EQ(resized(frame, 1, 1).rgb.size(), 3u);
  EXPECT_EQ(resized(frame, 131, 99).rgb.size(), frame_bytes(131, 99));
}

}  // namespace
}  // namespace longtake
