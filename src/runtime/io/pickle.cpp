#include "io/pickle.h"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "io/json.h"

namespace longtake {
namespace {

using Kind = PickleValue::Kind;

constexpr size_t kMaxBytes = size_t{16} << 20;  // a hundred thousand tensors
constexpr int kMaxProtocol = 2;                 // what torch.save writes
constexpr std::string_view kOrderedDict = "collections OrderedDict";

// The opcodes of protocol 2 that appear in checkpoints; names as in Python's pickletools.
enum Opcode : uint8_t {
  kMark = '(',
  kStop = '.',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kNoneOp = 'N',
  kBinPersid = 'Q',
  kReduce = 'R',
  kBinUnicode = 'X',
  kAppend = 'a',
  kBuild = 'b',
  kGlobal = 'c',
  kAppends = 'e',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTupleOp = 't',
  kSetItems = 'u',
  kEmptyDict = '}',
  kEmptyList = ']',
  kEmptyTuple = ')',
  kBinFloat = 'G',
  kProto = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
};

class Machine {
 public:
  Machine(std::span<const std::byte> bytes, std::span<const std::string_view> functions,
          const std::string& what)
      : bytes_(bytes), functions_(functions), what_(what) {}

  Pickle run() {
    while (step()) {
    }
    return std::move(pickle_);
  }

 private:
  template <typename... Args>
  [[noreturn]] void fail(const Args&... args) const {
    throw Error(ErrorKind::kInput, str(what_, ": byte ", opcode_at_, ": ", args...));
  }

  std::span<const std::byte> take(size_t count) {
    if (count > bytes_.size() - at_)
      fail("expected ", count, " more bytes, found ", bytes_.size() - at_);
    at_ += count;
    return bytes_.subspan(at_ - count, count);
  }

  // An unsigned little-endian number.
  uint64_t number(size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; const std::byte byte : take(size))
      value |= std::to_integer<uint64_t>(byte) << (8 * i++);
    return value;
  }

  // A two's complement number of at most eight bytes.
  int64_t signed_number(size_t size) {
    if (size > sizeof(int64_t)) fail("expected an integer of at most 8 bytes, found ", size);
    if (size == 0) return 0;
    const auto unused = static_cast<int>(64 - 8 * size);
    return static_cast<int64_t>(number(size) << unused) >> unused;
  }

  std::string_view text(size_t size) {
    const auto bytes = take(size);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  std::string_view line() {
    const auto rest = bytes_.subspan(at_);
    const auto end = std::find(rest.begin(), rest.end(), std::byte{'\n'});
    const auto length = static_cast<size_t>(end - rest.begin());
    const std::string_view found = text(length);
    take(1);
    return found;
  }

  void push(PickleValue value) {
    stack_.push_back(static_cast<uint32_t>(pickle_.values.size()));
    pickle_.values.push_back(std::move(value));
  }

  void push_integer(Kind kind, int64_t integer) {
    PickleValue value;
    value.kind = kind;
    value.integer = integer;
    push(std::move(value));
  }

  void push_items(Kind kind, std::vector<uint32_t> items) {
    PickleValue value;
    value.kind = kind;
    value.items = std::move(items);
    push(std::move(value));
  }

  // Values above the newest mark belong to it; those below cannot be taken.
  size_t floor() const { return marks_.empty() ? 0 : marks_.back(); }

  std::vector<uint32_t> pop(size_t count) {
    if (stack_.size() - floor() < count)
      fail("expected ", count, " values on the stack, found ", stack_.size() - floor());
    std::vector<uint32_t> items(stack_.end() - static_cast<std::ptrdiff_t>(count), stack_.end());
    stack_.resize(stack_.size() - count);
    return items;
  }

  std::vector<uint32_t> pop_to_mark() {
    if (marks_.empty()) fail("expected a mark on the stack, found none");
    std::vector<uint32_t> items = pop(stack_.size() - marks_.back());
    marks_.pop_back();
    return items;
  }

  PickleValue& top(Kind kind, const char* expected) {
    if (stack_.size() == floor()) fail("expected ", expected, ", found an empty stack");
    PickleValue& value = pickle_.values[stack_.back()];
    if (value.kind != kind) fail("expected ", expected, ", found another value");
    return value;
  }

  void add_items(Kind kind, const char* expected, const std::vector<uint32_t>& items) {
    if (kind == Kind::kDict && items.size() % 2 != 0)
      fail("expected keys and values in pairs, found ", items.size());
    auto& to = top(kind, expected).items;
    to.insert(to.end(), items.begin(), items.end());
  }

  void name_function() {
    const std::string_view module = line();
    const std::string_view name = line();
    const std::string full = str(module, ' ', name);
    const auto known = std::find(functions_.begin(), functions_.end(), full);
    if (known == functions_.end())
      fail("expected plain weights, found the function ", printable(full),
           ", which is not executed");
    PickleValue value;
    value.kind = Kind::kFunction;
    value.text = *known;
    push(std::move(value));
  }

  void call() {
    const auto items = pop(2);
    const PickleValue& function = pickle_.values[items[0]];
    const PickleValue& arguments = pickle_.values[items[1]];
    if (function.kind != Kind::kFunction || arguments.kind != Kind::kTuple)
      fail("expected a function and its arguments, found other values");
    if (function.text == kOrderedDict && arguments.items.empty())
      push_items(Kind::kDict, {});
    else
      push_items(Kind::kCall, items);
  }

  void remember(uint64_t slot) {
    if (stack_.size() == floor()) fail("expected a value to remember, found an empty stack");
    memo_[slot] = stack_.back();
  }

  void recall(uint64_t slot) {
    const auto found = memo_.find(slot);
    if (found == memo_.end()) fail("expected something remembered as ", slot, ", found nothing");
    stack_.push_back(found->second);
  }

  // One opcode; false at the end.
  bool step() {
    opcode_at_ = at_;
    const auto opcode = static_cast<uint8_t>(number(1));
    switch (opcode) {
      case kProto: {
        const auto protocol = number(1);
        if (protocol > kMaxProtocol)
          fail("expected pickle protocol ", kMaxProtocol, ", found ", protocol);
        break;
      }
      case kMark:
        marks_.push_back(stack_.size());
        break;
      case kStop:
        if (stack_.size() != 1 || !marks_.empty())
          fail("expected one value at the end, found ", stack_.size());
        pickle_.root = stack_[0];
        return false;
      case kNoneOp:
        push({});
        break;
      case kNewTrue:
      case kNewFalse:
        push_integer(Kind::kBool, opcode == kNewTrue ? 1 : 0);
        break;
      case kBinInt:
        push_integer(Kind::kInteger, signed_number(4));
        break;
      case kBinInt1:
        push_integer(Kind::kInteger, static_cast<int64_t>(number(1)));
        break;
      case kBinInt2:
        push_integer(Kind::kInteger, static_cast<int64_t>(number(2)));
        break;
      case kLong1:
        push_integer(Kind::kInteger, signed_number(number(1)));
        break;
      case kBinFloat:  // no checkpoint's tensors depend on one
        take(sizeof(double));
        push_integer(Kind::kNumber, 0);
        break;
      case kBinUnicode: {
        PickleValue value;
        value.kind = Kind::kString;
        value.text = text(number(4));
        push(std::move(value));
        break;
      }
      case kEmptyTuple:
      case kTuple1:
      case kTuple2:
      case kTuple3:
        push_items(Kind::kTuple, pop(opcode == kEmptyTuple ? 0 : opcode - kTuple1 + 1U));
        break;
      case kTupleOp:
        push_items(Kind::kTuple, pop_to_mark());
        break;
      case kEmptyList:
        push_items(Kind::kList, {});
        break;
      case kEmptyDict:
        push_items(Kind::kDict, {});
        break;
      case kAppend:
        add_items(Kind::kList, "a list", pop(1));
        break;
      case kAppends:
        add_items(Kind::kList, "a list", pop_to_mark());
        break;
      case kSetItem:
        add_items(Kind::kDict, "a dictionary", pop(2));
        break;
      case kSetItems:
        add_items(Kind::kDict, "a dictionary", pop_to_mark());
        break;
      case kGlobal:
        name_function();
        break;
      case kReduce:
        call();
        break;
      case kBuild:  // attributes of a state dict (versions of its modules); the items are there
        pop(1);
        top(Kind::kDict, "a dictionary");
        break;
      case kBinPersid:
        push_items(Kind::kPersistent, pop(1));
        break;
      case kBinPut:
        remember(number(1));
        break;
      case kLongBinPut:
        remember(number(4));
        break;
      case kBinGet:
        recall(number(1));
        break;
      case kLongBinGet:
        recall(number(4));
        break;
      default:
        fail("expected an opcode of a checkpoint, found ", static_cast<int>(opcode));
    }
    return true;
  }

  std::span<const std::byte> bytes_;
  std::span<const std::string_view> functions_;
  const std::string& what_;
  size_t at_ = 0;
  size_t opcode_at_ = 0;
  Pickle pickle_;
  std::vector<uint32_t> stack_;
  std::vector<size_t> marks_;
  std::unordered_map<uint64_t, uint32_t> memo_;
};

}  // namespace

Pickle parse_pickle(std::span<const std::byte> bytes, std::span<const std::string_view> functions,
                    const std::string& what) {
  if (bytes.size() > kMaxBytes)
    throw Error(ErrorKind::kInput,
                str(what, ": expected at most ", kMaxBytes, " bytes, found ", bytes.size()));
  return Machine(bytes, functions, what).run();
}

}  // namespace longtake
