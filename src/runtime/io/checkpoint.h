// The weights of one model as people have them on their disks: a safetensors file, safetensors in
// shards that an index file names, or a checkpoint of torch.save. Which one is told by content. The
// files are mapped, so a tensor costs nothing until it is read.
#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "io/mapped_file.h"
#include "io/stored_tensor.h"

namespace longtake {

class Checkpoint {
 public:
  Checkpoint() = default;  // of no tensors

  // path: *.safetensors, *.safetensors.index.json, *.pt or *.pth; the name does not matter. Throws
  // Error (kInput) that names the file and what is wrong with it.
  explicit Checkpoint(const std::string& path);

  const std::string& path() const { return path_; }

  // "safetensors", "safetensors in 6 files", "PyTorch checkpoint".
  const std::string& format() const { return format_; }

  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  const std::vector<StoredTensor>& tensors() const { return tensors_; }

  // Of the group that keep_group left, or of a file without groups. nullptr when absent.
  const StoredTensor* find(std::string_view name) const;

  // The top-level keys that hold tensors; "" for tensors without one.
  std::set<std::string> groups() const;

  // Drops the tensors of every other group; those that stay have none from then on.
  void keep_group(const std::string& group);

  // Gives every tensor the name that `rename` makes of it. Throws Error (kInput) when two tensors
  // get one name.
  template <typename Rename>
  void rename(const Rename& rename) {
    for (StoredTensor& tensor : tensors_) tensor.name = rename(tensor.name);
    index_names();
  }

 private:
  void read_shards(std::span<const std::byte> index);
  void add_safetensors(const MappedFile& file, const std::string& path);
  void index_names();

  std::string path_;
  std::string format_;
  std::vector<MappedFile> files_;
  std::vector<StoredTensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::unordered_map<std::string, size_t> by_name_;  // of tensors without a group
};

}  // namespace longtake
