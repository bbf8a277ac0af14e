#include "setup.h"

#include <filesystem>
#include <system_error>
#include <vector>

#include "base/error.h"
#include "io/mapped_file.h"
#include "models/world/model.h"
#include "ops/linear.h"

namespace longtake::cli {

namespace fs = std::filesystem;

std::string read_small_file(const std::string& path, size_t max_bytes) {
  const MappedFile file(path);
  if (file.bytes().size() > max_bytes)
    throw Error(ErrorKind::kInput,
                str(path, ": expected at most ", max_bytes, " bytes, found ", file.bytes().size()));
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

std::string find_embedded_model() {
  std::error_code error;
  const fs::path binary = fs::read_symlink("/proc/self/exe", error);
  std::vector<fs::path> places = {binary.parent_path() / "../share/longtake/models/world"};
  for (fs::path folder = binary.parent_path(); folder.has_relative_path();
       folder = folder.parent_path())
    places.push_back(folder / "models/world");
  places.emplace_back("models/world");
  for (const fs::path& place : places) {
    if (fs::exists(place / world::kConfigFile, error)) return place.lexically_normal().string();
  }
  throw Error(
      ErrorKind::kUsage,
      "--model: expected a model folder (the embedded one is not beside this binary), found none");
}

DType choose_dtype(const std::string& flag) {
  if (flag == "f32") return DType::kF32;
  if (flag == "bf16" && !bf16_products_supported())
    throw Error(ErrorKind::kUsage,
                "--dtype: expected f32 (this CPU has no bf16 products), found bf16");
  return bf16_products_supported() ? DType::kBF16 : DType::kF32;
}

Device choose_device(const std::string& flag) {
  if (flag != "cpu")
    throw Error(ErrorKind::kUsage,
                str("--device: expected cpu in this version, found \"", flag, '"'));
  return {};
}

}  // namespace longtake::cli
