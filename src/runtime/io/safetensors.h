// The safetensors format: 8 bytes header length (little endian), a JSON header, then the tensors'
// bytes back to back. The parser trusts nothing: every size is checked against the file before it
// is used, and nothing is allocated that the file merely claims.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/mapped_file.h"
#include "tensor/tensor.h"

namespace longtake {

struct TensorInfo {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  size_t begin = 0;  // offset of the first byte in the file
  size_t end = 0;    // one past the last byte
};

struct SafetensorsIndex {
  std::vector<TensorInfo> tensors;              // in the order of their bytes
  std::map<std::string, std::string> metadata;  // the header's "__metadata__"

  const TensorInfo* find(std::string_view name) const;  // nullptr when absent
};

// `what` names the file in errors. Throws Error (kInput): the first thing wrong, with its offset.
SafetensorsIndex parse_safetensors(std::span<const std::byte> file, const std::string& what);

// A mapped file and its index. Views borrow the mapping and must not be written.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::string& path);

  const std::string& path() const { return path_; }

  const SafetensorsIndex& index() const { return index_; }

  // Throws Error (kInput) for a tensor whose bytes are not aligned to its elements.
  View view(const TensorInfo& info) const;

 private:
  std::string path_;
  MappedFile file_;
  SafetensorsIndex index_;
};

struct NamedView {
  std::string name;
  View view;
};

struct TensorSpec {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
};

// Writes a file whose tensors need not be in memory together: `tensor` is asked for each when its
// turn comes, and what it gives must live until the next one. Beside `path` first, renamed at the
// end.
void write_safetensors(const std::string& path, std::span<const TensorSpec> specs,
                       const std::map<std::string, std::string>& metadata,
                       const std::function<View(const TensorSpec&)>& tensor);

// Writes beside `path` first and renames at the end, so that a full disk leaves the old file whole.
void write_safetensors(const std::string& path, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace longtake
