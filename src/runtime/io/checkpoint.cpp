#include "io/checkpoint.h"

#include <filesystem>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/json.h"
#include "io/safetensors.h"
#include "io/torch_file.h"
#include "io/zip.h"

namespace longtake {
namespace {

namespace fs = std::filesystem;

constexpr JsonLimits kIndexLimits{size_t{64} << 20, 4};
constexpr size_t kMaxShards = 1000;

// Four bytes tell the formats apart: as the length of a safetensors header, the first two would be
// beyond its limit, and an index's beginning would not leave the length's high bytes zero.
constexpr std::string_view kOldTorchMark = "\x80\x02\x8a\x0a";
constexpr size_t kLengthBytes = 8;

bool starts_with(std::span<const std::byte> bytes, std::string_view text) {
  return bytes.size() >= text.size() &&
         std::string_view(reinterpret_cast<const char*>(bytes.data()), text.size()) == text;
}

}  // namespace

Checkpoint::Checkpoint(const std::string& path) : path_(path) {
  MappedFile file(path);
  const auto bytes = file.bytes();
  if (is_zip(bytes)) {
    format_ = "PyTorch checkpoint";
    tensors_ = parse_torch_file(bytes, path);
    files_.push_back(std::move(file));
  } else if (starts_with(bytes, "{") && bytes.size() > kLengthBytes &&
             bytes[kLengthBytes - 1] != std::byte{0}) {
    read_shards(bytes);
  } else if (starts_with(bytes, kOldTorchMark)) {
    throw Error(ErrorKind::kInput,
                str(path,
                    ": expected a zip archive as PyTorch 1.6 and later write it, found the "
                    "older format; load and save it once with a newer PyTorch"));
  } else {
    format_ = "safetensors";
    add_safetensors(file, path);
    files_.push_back(std::move(file));
  }
  index_names();
}

void Checkpoint::add_safetensors(const MappedFile& file, const std::string& path) {
  const SafetensorsIndex index = parse_safetensors(file.bytes(), path);
  for (const TensorInfo& info : index.tensors)
    tensors_.push_back({"", info.name, info.dtype, info.shape, dense_strides(info.shape),
                        file.bytes().data() + info.begin});
  metadata_.insert(index.metadata.begin(), index.metadata.end());
}

// {"weight_map": {tensor name: file name}}; the files lie beside the index and hold those tensors
// and no others.
void Checkpoint::read_shards(std::span<const std::byte> bytes) {
  const nlohmann::json json = parse_json(bytes, path_, kIndexLimits);
  const auto map = json.find("weight_map");
  if (map == json.end() || !map->is_object())
    throw Error(ErrorKind::kInput, str(path_, ": expected an object \"weight_map\", found none"));
  std::map<std::string, size_t> counts;  // of tensors, by file
  for (const auto& [name, file] : map->items()) {
    if (!file.is_string() || file.get_ref<const std::string&>().find('/') != std::string::npos)
      throw Error(ErrorKind::kInput,
                  str(path_, ": weight_map \"", printable(name), "\": expected a file name, found ",
                      printable(file.dump())));
    ++counts[file.get<std::string>()];
  }
  if (counts.size() > kMaxShards)
    throw Error(ErrorKind::kInput,
                str(path_, ": expected at most ", kMaxShards, " files, found ", counts.size()));
  for (const auto& [name, count] : counts) {
    const std::string path = (fs::path(path_).parent_path() / name).string();
    MappedFile file(path);
    const size_t first = tensors_.size();
    add_safetensors(file, path);
    files_.push_back(std::move(file));
    for (size_t i = first; i < tensors_.size(); ++i) {
      const auto listed = map->find(tensors_[i].name);
      if (listed == map->end() || *listed != name)
        throw Error(ErrorKind::kInput, str(path, ": expected only tensors that the index places ",
                                           "here, found ", printable(tensors_[i].name)));
    }
    if (tensors_.size() - first != count)
      throw Error(ErrorKind::kInput, str(path, ": expected ", count, " tensors as in the index, ",
                                         "found ", tensors_.size() - first));
  }
  format_ = str("safetensors in ", counts.size(), counts.size() == 1 ? " file" : " files");
}

void Checkpoint::index_names() {
  by_name_.clear();
  for (size_t i = 0; i < tensors_.size(); ++i) {
    const StoredTensor& tensor = tensors_[i];
    if (tensor.group.empty() && !by_name_.emplace(tensor.name, i).second)
      throw Error(ErrorKind::kInput, str(path_, ": expected every tensor once, found \"",
                                         printable(tensor.name), "\" twice"));
  }
}

const StoredTensor* Checkpoint::find(std::string_view name) const {
  const auto found = by_name_.find(std::string(name));
  return found == by_name_.end() ? nullptr : &tensors_[found->second];
}

std::set<std::string> Checkpoint::groups() const {
  std::set<std::string> out;
  for (const StoredTensor& tensor : tensors_) out.insert(tensor.group);
  return out;
}

void Checkpoint::keep_group(const std::string& group) {
  std::erase_if(tensors_, [&](const StoredTensor& tensor) { return tensor.group != group; });
  for (StoredTensor& tensor : tensors_) tensor.group.clear();
  index_names();
}

}  // namespace longtake
