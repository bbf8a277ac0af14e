// Reads the values of a pickle without executing anything: the opcodes that PyTorch's checkpoints
// use build plain values; functions are only named, and only those that the caller lists.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace longtake {

// One value. Values refer to each other by index into Pickle::values, so that a pickle that nests
// deeply or contains itself is as harmless as any other.
struct PickleValue {
  enum class Kind : uint8_t {
    kNone,
    kBool,
    kInteger,
    kNumber,
    kString,
    kTuple,
    kList,
    kDict,        // items: key, value, key, value, ...
    kFunction,    // text: "module name"
    kCall,        // items: function, arguments; what the function would make is the reader's matter
    kPersistent,  // items: the id of something stored outside the pickle
  };

  Kind kind = Kind::kNone;
  int64_t integer = 0;    // of kBool and kInteger
  std::string_view text;  // of kString and kFunction; borrows the pickle's bytes
  std::vector<uint32_t> items;
};

struct Pickle {
  std::vector<PickleValue> values;
  uint32_t root = 0;

  const PickleValue& operator[](uint32_t index) const { return values[index]; }
};

// functions: "module name" of every function the pickle may name; "collections OrderedDict" called
// without arguments makes a kDict. `what` names the pickle in errors; values borrow `bytes`. Throws
// Error (kInput): the first thing wrong, with its offset.
Pickle parse_pickle(std::span<const std::byte> bytes, std::span<const std::string_view> functions,
                    const std::string& what);

}  // namespace longtake
