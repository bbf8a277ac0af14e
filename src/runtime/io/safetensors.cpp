#include "io/safetensors.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "io/json.h"

namespace longtake {
namespace {

using nlohmann::json;

constexpr size_t kLengthBytes = 8;
constexpr size_t kMaxHeaderBytes = size_t{64} << 20;  // a million tensors of short names
constexpr int kHeaderDepth = 4;                       // header > tensor > shape; one to spare
constexpr const char* kMetadataKey = "__metadata__";

struct StoredType {
  const char* name;
  DType dtype;
};

constexpr StoredType kStoredTypes[] = {
    {"F32", DType::kF32}, {"BF16", DType::kBF16}, {"I8", DType::kI8},   {"U8", DType::kU8},
    {"I32", DType::kI32}, {"F64", DType::kF64},   {"F16", DType::kF16}, {"I64", DType::kI64},
    {"I16", DType::kI16}, {"BOOL", DType::kBool}};

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  throw Error(ErrorKind::kInput, str(args...));
}

uint64_t read_length(std::span<const std::byte> file) {
  uint64_t value = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) value |= std::to_integer<uint64_t>(file[i]) << (8 * i);
  return value;
}

// A header number as size_t; false for anything that is not a whole number that fits.
bool read_size(const json& value, size_t& out) {
  if (!value.is_number_unsigned()) return false;
  out = value.get<size_t>();
  return true;
}

// Where errors point: `"name" of file`.
struct Place {
  const std::string& what;
  const std::string& name;

  friend std::ostream& operator<<(std::ostream& out, const Place& place) {
    return out << place.what << ": tensor \"" << printable(place.name) << '"';
  }
};

const json& member(const json& entry, const char* key, const Place& place) {
  const auto found = entry.find(key);
  if (found == entry.end()) fail(place, ": expected \"", key, "\", found no such key");
  return *found;
}

DType read_dtype(const json& value, const Place& place) {
  for (const StoredType& type : kStoredTypes) {
    if (value.is_string() && value.get_ref<const std::string&>() == type.name) return type.dtype;
  }
  fail(place, ": expected dtype F64, F32, F16, BF16, I64, I32, I16, I8, U8 or BOOL, found ",
       printable(value.dump(-1, ' ', true, json::error_handler_t::replace)));
}

// The shape and its bytes; the product is checked for overflow at every factor.
Shape read_shape(const json& value, DType dtype, size_t& bytes, const Place& place) {
  if (!value.is_array() || value.size() > static_cast<size_t>(Shape::kMaxRank))
    fail(place, ": expected a shape of at most ", Shape::kMaxRank, " axes, found ",
         value.is_array() ? str(value.size(), " axes") : std::string(value.type_name()));
  Shape shape;
  bytes = size_of(dtype);
  for (const json& item : value) {
    size_t size = 0;
    if (!read_size(item, size) || size > static_cast<size_t>(INT64_MAX) ||
        __builtin_mul_overflow(bytes, size, &bytes))
      fail(place, ": expected sizes whose product fits in memory, found ",
           printable(value.dump(-1, ' ', true, json::error_handler_t::replace)));
    shape.push_back(static_cast<int64_t>(size));
  }
  return shape;
}

TensorInfo read_tensor(const std::string& name, const json& entry, size_t data_begin,
                       size_t data_bytes, const std::string& what) {
  const Place place{what, name};
  if (!entry.is_object()) fail(place, ": expected an object, found ", entry.type_name());
  TensorInfo info;
  info.name = name;
  info.dtype = read_dtype(member(entry, "dtype", place), place);
  size_t bytes = 0;
  info.shape = read_shape(member(entry, "shape", place), info.dtype, bytes, place);
  const json& offsets = member(entry, "data_offsets", place);
  size_t begin = 0;
  size_t end = 0;
  if (!offsets.is_array() || offsets.size() != 2 || !read_size(offsets[0], begin) ||
      !read_size(offsets[1], end) || begin > end)
    fail(place, ": expected data_offsets [begin, end] in rising order, found ",
         printable(offsets.dump(-1, ' ', true, json::error_handler_t::replace)));
  if (end > data_bytes)
    fail(place, ": expected its data to end at or before byte ", data_bytes, " of the data, found ",
         end, " (truncated download?)");
  if (end - begin != bytes)
    fail(place, ": expected ", bytes, " bytes for ", name_of(info.dtype), " ",
         info.shape.to_string(), ", found ", end - begin, " at data offset ", begin);
  info.begin = data_begin + begin;
  info.end = data_begin + end;
  return info;
}

// Tensors in order of offset must cover the data exactly: no overlap, no hole, no tail.
void check_coverage(const SafetensorsIndex& index, size_t data_begin, size_t file_bytes,
                    const std::string& what) {
  size_t covered = data_begin;
  for (const TensorInfo& info : index.tensors) {
    if (info.begin != covered)
      fail(Place{what, info.name}, ": expected its data at file offset ", covered, ", found ",
           info.begin, info.begin < covered ? " (overlaps another tensor)" : " (a hole)");
    covered = info.end;
  }
  if (covered != file_bytes)
    fail(what, ": expected the data to end at file offset ", covered, ", found ",
         file_bytes - covered, " more bytes");
}

}  // namespace

const TensorInfo* SafetensorsIndex::find(std::string_view name) const {
  for (const TensorInfo& info : tensors) {
    if (info.name == name) return &info;
  }
  return nullptr;
}

SafetensorsIndex parse_safetensors(std::span<const std::byte> file, const std::string& what) {
  if (file.size() < kLengthBytes)
    fail(what, ": expected a safetensors file of at least ", kLengthBytes, " bytes, found ",
         file.size());
  const uint64_t header_bytes = read_length(file);
  if (header_bytes > file.size() - kLengthBytes)
    fail(what, ": expected a header within the file's ", file.size(), " bytes, found length ",
         header_bytes, " at offset 0 (truncated download, or not safetensors)");
  const size_t data_begin = kLengthBytes + static_cast<size_t>(header_bytes);
  const json header = parse_json(file.subspan(kLengthBytes, static_cast<size_t>(header_bytes)),
                                 what + ": header", {kMaxHeaderBytes, kHeaderDepth});
  if (!header.is_object())
    fail(what, ": expected a JSON object as header, found ", header.type_name());

  SafetensorsIndex index;
  for (const auto& [name, entry] : header.items()) {
    if (name != kMetadataKey) {
      index.tensors.push_back(read_tensor(name, entry, data_begin, file.size() - data_begin, what));
      continue;
    }
    if (!entry.is_object())
      fail(what, ": expected an object as metadata, found ", entry.type_name());
    for (const auto& [key, value] : entry.items()) {
      if (!value.is_string())
        fail(what, ": metadata \"", printable(key), "\": expected a string, found ",
             value.type_name());
      index.metadata.emplace(key, value.get<std::string>());
    }
  }
  // Empty tensors share their offset with the next one: order by end as well.
  std::sort(index.tensors.begin(), index.tensors.end(), [](const auto& a, const auto& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  check_coverage(index, data_begin, file.size(), what);
  return index;
}

SafetensorsFile::SafetensorsFile(const std::string& path)
    : path_(path), file_(path), index_(parse_safetensors(file_.bytes(), path)) {}

View SafetensorsFile::view(const TensorInfo& info) const {
  if (info.begin % size_of(info.dtype) != 0)
    fail(Place{path_, info.name}, ": expected data aligned to ", size_of(info.dtype),
         " bytes, found file offset ", info.begin);
  const std::byte* data = file_.bytes().data() + info.begin;
  return View(const_cast<std::byte*>(data), info.dtype, Device{}, info.shape);
}

void write_safetensors(const std::string& path, std::span<const NamedView> tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorSpec> specs;
  std::map<std::string_view, View> views;
  for (const NamedView& tensor : tensors) {
    specs.push_back({tensor.name, tensor.view.dtype(), tensor.view.shape()});
    views.emplace(tensor.name, tensor.view);
  }
  write_safetensors(path, specs, metadata,
                    [&](const TensorSpec& spec) { return views.at(spec.name); });
}

void write_safetensors(const std::string& path, std::span<const TensorSpec> specs,
                       const std::map<std::string, std::string>& metadata,
                       const std::function<View(const TensorSpec&)>& tensor) {
  // Widest types first: every tensor is then aligned to its own element size.
  std::vector<const TensorSpec*> order;
  for (const TensorSpec& spec : specs) order.push_back(&spec);
  std::stable_sort(order.begin(), order.end(), [](const TensorSpec* a, const TensorSpec* b) {
    return size_of(a->dtype) > size_of(b->dtype);
  });
  json header = json::object();
  if (!metadata.empty()) header[kMetadataKey] = metadata;
  size_t offset = 0;
  for (const TensorSpec* spec : order) {
    const auto* type = std::find_if(std::begin(kStoredTypes), std::end(kStoredTypes),
                                    [&](const StoredType& t) { return t.dtype == spec->dtype; });
    json shape = json::array();
    for (int axis = 0; axis < spec->shape.rank(); ++axis) shape.push_back(spec->shape[axis]);
    const size_t bytes = static_cast<size_t>(spec->shape.numel()) * size_of(spec->dtype);
    header[spec->name] = {
        {"dtype", type->name}, {"shape", shape}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + kLengthBytes - 1) / kLengthBytes * kLengthBytes, ' ');

  const std::string partial = path + ".part";
  std::ofstream out(partial, std::ios::binary | std::ios::trunc);
  char length[kLengthBytes];
  for (size_t i = 0; i < kLengthBytes; ++i) length[i] = static_cast<char>(text.size() >> (8 * i));
  out.write(length, kLengthBytes);
  out.write(text.data(), static_cast<std::streamsize>(text.size()));
  for (const TensorSpec* spec : order) {
    if (!out) break;
    const View view = tensor(*spec);
    LONGTAKE_CHECK(view.dtype() == spec->dtype && view.shape().numel() == spec->shape.numel(),
                   spec->name);
    out.write(reinterpret_cast<const char*>(view.raw()),
              static_cast<std::streamsize>(view.bytes()));
  }
  out.close();
  std::error_code renamed;
  if (out) std::filesystem::rename(partial, path, renamed);
  if (!out || renamed) {
    const int reason = renamed ? renamed.value() : errno;
    std::error_code ignored;
    std::filesystem::remove(partial, ignored);
    throw Error(str(path, ": expected to write ", offset, " bytes, found ", std::strerror(reason)));
  }
}

}  // namespace longtake
