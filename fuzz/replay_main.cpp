// Feeds every file of the folders named on the command line to a fuzz target once, and each file's
// prefixes and single-byte damages too: a fuzz run of a second, the same every time.
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMostVariants = 2000;  // of one file

void replay(const std::vector<uint8_t>& bytes) {
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  const size_t stride = bytes.size() / kMostVariants + 1;
  for (size_t i = 0; i < bytes.size(); i += stride) {
    // A copy of exactly that size, so that reading beyond the end is seen.
    const std::vector<uint8_t> prefix(bytes.begin(),
                                      bytes.begin() + static_cast<std::ptrdiff_t>(i));
    LLVMFuzzerTestOneInput(prefix.data(), prefix.size());
    std::vector<uint8_t> damaged = bytes;
    for (const uint8_t value : {uint8_t{0}, uint8_t{0xff}, static_cast<uint8_t>(bytes[i] ^ 1U)}) {
      damaged[i] = value;
      LLVMFuzzerTestOneInput(damaged.data(), damaged.size());
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  size_t files = 0;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
      std::ifstream in(entry.path(), std::ios::binary);
      replay({std::istreambuf_iterator<char>(in), {}});
      ++files;
    }
  }
  std::printf("%zu files replayed\n", files);
  return files > 0 ? 0 : 1;
}
