// What the tests of the runtime share: a scratch folder, the tiny model, hand-made weight files.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace longtake::testing_support {

inline constexpr const char* kTinyModel = "tests/data/tiny";  // tests run in the project's root

// Removed with everything in it at the end of the scope.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "longtake_test_XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp");
    path_ = pattern;
  }

  ~ScratchFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

inline std::string read_text(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

inline void write_text(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

inline std::span<const std::byte> bytes_of(const std::string& text) {
  return {reinterpret_cast<const std::byte*>(text.data()), text.size()};
}

// A safetensors file from its parts, right or wrong.
inline std::string safetensors_text(const std::string& header, const std::string& data) {
  std::string out;
  for (size_t i = 0; i < 8; ++i) out += static_cast<char>(header.size() >> (8 * i));
  return out + header + data;
}

// The tiny model in a folder of its own, to be damaged.
inline std::string copy_tiny_model(const ScratchFolder& scratch) {
  const std::string to = scratch / "model";
  std::filesystem::create_directory(to);
  for (const char* name : {"config.json", "vocabulary.txt", "model.safetensors"})
    std::filesystem::copy_file(std::filesystem::path(kTinyModel) / name,
                               std::filesystem::path(to) / name);
  return to;
}

// Replaces the first occurrence in a file; the file must hold it.
inline void replace_in_file(const std::string& path, const std::string& from,
                            const std::string& to) {
  std::string text = read_text(path);
  const size_t at = text.find(from);
  if (at == std::string::npos) throw std::runtime_error(path + " has no " + from);
  write_text(path, text.replace(at, from.size(), to));
}

}  // namespace longtake::testing_support
