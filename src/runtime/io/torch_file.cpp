#include "io/torch_file.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <string_view>

#include "base/error.h"
#include "io/json.h"
#include "io/pickle.h"
#include "io/zip.h"

namespace longtake {
namespace {

using Kind = PickleValue::Kind;

// A pickle may name one long string or one dictionary many times; what it stands for is bounded.
constexpr size_t kMaxTensors = 100'000;
constexpr size_t kMaxNameBytes = 1024;
constexpr std::string_view kRebuildTensor = "torch._utils _rebuild_tensor_v2";
constexpr std::string_view kRebuildParameter = "torch._utils _rebuild_parameter";

struct StorageType {
  std::string_view function;
  DType dtype;
};

constexpr StorageType kStorageTypes[] = {
    {"torch FloatStorage", DType::kF32}, {"torch BFloat16Storage", DType::kBF16},
    {"torch HalfStorage", DType::kF16},  {"torch DoubleStorage", DType::kF64},
    {"torch LongStorage", DType::kI64},  {"torch IntStorage", DType::kI32},
    {"torch ShortStorage", DType::kI16}, {"torch CharStorage", DType::kI8},
    {"torch ByteStorage", DType::kU8},   {"torch BoolStorage", DType::kBool}};

std::vector<std::string_view> allowed_functions() {
  std::vector<std::string_view> functions = {"collections OrderedDict", kRebuildTensor,
                                             kRebuildParameter};
  for (const StorageType& type : kStorageTypes) functions.push_back(type.function);
  return functions;
}

class TorchFile {
 public:
  TorchFile(std::span<const std::byte> file, const std::string& what) : file_(file), what_(what) {
    for (const ZipEntry& entry : parse_zip(file, what)) entries_.emplace(entry.name, entry.bytes);
    constexpr std::string_view kPickle = "/data.pkl";
    for (const auto& [name, bytes] : entries_) {
      if (name.ends_with(kPickle) && std::count(name.begin(), name.end(), '/') == 1)
        folder_ = name.substr(0, name.size() - kPickle.size() + 1);
    }
    if (folder_.empty()) fail(what, ": expected a PyTorch checkpoint with data.pkl, found none");
    const auto order = entries_.find(folder_ + "byteorder");
    if (order != entries_.end() &&
        std::string_view(reinterpret_cast<const char*>(order->second.data()),
                         order->second.size()) != "little")
      fail(what, ": expected little-endian tensors, found another byte order");
    pickle_ =
        parse_pickle(entries_.at(folder_ + "data.pkl"), allowed_functions(), what + ": data.pkl");
  }

  std::vector<StoredTensor> tensors() const {
    std::vector<StoredTensor> out;
    const PickleValue& root = pickle_[pickle_.root];
    if (is_tensor(root))
      out.push_back(tensor("", "", root));
    else if (root.kind == Kind::kDict)
      add_dictionary("", root, out);
    else
      fail(what_, ": expected a dictionary of tensors, found another value");
    return out;
  }

 private:
  template <typename... Args>
  [[noreturn]] static void fail(const Args&... args) {
    throw Error(ErrorKind::kInput, str(args...));
  }

  const PickleValue& item(const PickleValue& value, size_t index) const {
    return pickle_[value.items[index]];
  }

  bool is_call(const PickleValue& value, std::string_view function) const {
    return value.kind == Kind::kCall && item(value, 0).text == function;
  }

  bool is_tensor(const PickleValue& value) const {
    return is_call(value, kRebuildTensor) || is_call(value, kRebuildParameter);
  }

  void add_dictionary(const std::string& group, const PickleValue& dict,
                      std::vector<StoredTensor>& out) const {
    for (size_t i = 0; i < dict.items.size(); i += 2) {
      const PickleValue& key = item(dict, i);
      const PickleValue& value = item(dict, i + 1);
      if (key.kind != Kind::kString) continue;
      const std::string name(key.text.substr(0, kMaxNameBytes + 1));
      if (name.size() > kMaxNameBytes || out.size() == kMaxTensors)
        fail(what_, ": expected at most ", kMaxTensors, " tensors with names of at most ",
             kMaxNameBytes, " bytes, found more");
      if (is_tensor(value))
        out.push_back(tensor(group, name, value));
      else if (value.kind == Kind::kDict && group.empty() && &value != &dict)
        add_dictionary(name, value, out);
    }
  }

  // Arguments of a function that makes a tensor: at least `count`.
  const PickleValue& arguments(const PickleValue& call, size_t count,
                               const std::string& place) const {
    const PickleValue& found = item(call, 1);
    if (found.items.size() < count)
      fail(place, ": expected ", count, " arguments, found ", found.items.size());
    return found;
  }

  int64_t integer(const PickleValue& value, const char* thing, const std::string& place) const {
    if (value.kind != Kind::kInteger || value.integer < 0)
      fail(place, ": expected ", thing, " of at least 0, found ",
           value.kind == Kind::kInteger ? std::to_string(value.integer) : "no integer");
    return value.integer;
  }

  Shape integers(const PickleValue& value, const char* thing, const std::string& place) const {
    if (value.kind != Kind::kTuple || value.items.size() > size_t{Shape::kMaxRank})
      fail(place, ": expected at most ", Shape::kMaxRank, ' ', thing, ", found ",
           value.items.size());
    Shape out;
    for (size_t i = 0; i < value.items.size(); ++i)
      out.push_back(integer(item(value, i), thing, place));
    return out;
  }

  struct Storage {
    DType dtype;
    int64_t count;
    const std::byte* data;
  };

  // ("storage", type, key, device, element count)
  Storage storage(const PickleValue& value, const std::string& place) const {
    if (value.kind != Kind::kPersistent || item(value, 0).kind != Kind::kTuple ||
        item(value, 0).items.size() != 5)
      fail(place, ": expected a storage of five parts, found another value");
    const PickleValue& parts = item(value, 0);
    const auto* type = std::find_if(
        std::begin(kStorageTypes), std::end(kStorageTypes),
        [&](const StorageType& known) { return known.function == item(parts, 1).text; });
    if (item(parts, 0).text != "storage" || type == std::end(kStorageTypes) ||
        item(parts, 2).kind != Kind::kString)
      fail(place, ": expected a storage, its type and key, found other values");
    const int64_t count = integer(item(parts, 4), "a storage size", place);
    const std::string name = str(folder_, "data/", item(parts, 2).text);
    const auto entry = entries_.find(name);
    if (entry == entries_.end())
      fail(place, ": expected the entry ", printable(name), ", found none");
    if (static_cast<uint64_t>(count) > entry->second.size() / size_of(type->dtype))
      fail(place, ": expected ", count, ' ', name_of(type->dtype), " elements in ", printable(name),
           ", found ", entry->second.size(), " bytes");
    return {type->dtype, count, entry->second.data()};
  }

  StoredTensor tensor(const std::string& group, const std::string& name,
                      const PickleValue& value) const {
    const std::string place = str(what_, ": tensor \"", printable(name), '"');
    if (is_call(value, kRebuildParameter)) {
      const PickleValue& inner = item(arguments(value, 1, place), 0);
      if (!is_call(inner, kRebuildTensor))
        fail(place, ": expected a parameter made of a tensor, found another value");
      return tensor(group, name, inner);
    }
    const PickleValue& parts = arguments(value, 4, place);
    const Storage from = storage(item(parts, 0), place);
    const int64_t offset = integer(item(parts, 1), "a storage offset", place);
    StoredTensor out;
    out.group = group;
    out.name = name;
    out.dtype = from.dtype;
    out.shape = integers(item(parts, 2), "sizes", place);
    out.strides = integers(item(parts, 3), "strides", place);
    check_extent(out, offset, from.count, place);
    out.data = from.data + offset * static_cast<int64_t>(size_of(from.dtype));
    // The stride of an axis of one element, or of none, is never taken; any value is allowed there.
    const Shape dense = dense_strides(out.shape);
    for (int axis = 0; axis < out.shape.rank(); ++axis) {
      if (out.shape[axis] <= 1 || out.numel() == 0) out.strides[axis] = dense[axis];
    }
    return out;
  }

  // Every element lies in the storage, and all together are not larger than the file: a view may
  // repeat elements, but nothing is allocated that the file merely claims.
  void check_extent(const StoredTensor& tensor, int64_t offset, int64_t count,
                    const std::string& place) const {
    if (tensor.strides.rank() != tensor.shape.rank())
      fail(place, ": expected a stride for each of ", tensor.shape.rank(), " sizes, found ",
           tensor.strides.rank());
    bool overflow = false;
    int64_t bytes = static_cast<int64_t>(size_of(tensor.dtype));
    int64_t last = offset;
    bool is_empty = false;
    for (int axis = 0; axis < tensor.shape.rank(); ++axis) {
      is_empty = is_empty || tensor.shape[axis] == 0;
      int64_t reach = 0;
      overflow |= __builtin_mul_overflow(bytes, std::max(tensor.shape[axis], int64_t{1}), &bytes);
      overflow |= __builtin_mul_overflow(std::max(tensor.shape[axis], int64_t{1}) - 1,
                                         tensor.strides[axis], &reach);
      overflow |= __builtin_add_overflow(last, reach, &last);
    }
    const bool fits = !overflow && bytes >= 0 && static_cast<uint64_t>(bytes) <= file_.size() &&
                      (is_empty ? offset <= count : last < count);
    if (!fits)
      fail(place, ": expected ", tensor.shape.to_string(), " with strides ",
           tensor.strides.to_string(), " at offset ", offset, " to lie within its storage, found ",
           count, " elements there");
  }

  std::span<const std::byte> file_;
  const std::string& what_;
  std::map<std::string, std::span<const std::byte>> entries_;
  std::string folder_;  // "archive/"
  Pickle pickle_;
};

}  // namespace

std::vector<StoredTensor> parse_torch_file(std::span<const std::byte> file,
                                           const std::string& what) {
  return TorchFile(file, what).tensors();
}

}  // namespace longtake
