// A whole file mapped read-only: opening costs nothing, pages come in when they are first read.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace longtake {

class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // throws Error (kInput) naming path and reason
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

  // The part's memory may go; it is read from the file again when it is looked at again.
  static void release(std::span<const std::byte> part);

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace longtake
