#include "kv/state_stream.h"

#include <istream>
#include <ostream>
#include <string>

#include "base/error.h"

namespace longtake {
namespace {

constexpr uint64_t kStateMagic = 0x32564b656b61746cULL;  // "ltakeKV2"

// Reads a value that must be `expected`.
void read_same(std::istream& in, const char* what, int64_t expected) {
  const int64_t found = read_int(in);
  if (found != expected)
    throw Error(ErrorKind::kInput,
                str("cache state: expected ", what, " ", expected, ", found ", found));
}

// The policy's name as a number, for the header of a saved state.
int64_t policy_id(const std::string& memory) {
  int64_t id = 0;
  for (const char c : memory) id = id * 31 + c;
  return id;
}

}  // namespace

void write_int(std::ostream& out, int64_t value) {
  out.write(reinterpret_cast<const char*>(&value), sizeof value);
}

int64_t read_int(std::istream& in) {
  int64_t value = 0;
  in.read(reinterpret_cast<char*>(&value), sizeof value);
  if (!in) throw Error(ErrorKind::kInput, "cache state: expected more bytes, found its end");
  return value;
}

void write_state_header(std::ostream& out, const CacheOptions& options,
                        const std::vector<int64_t>& policy) {
  write_int(out, static_cast<int64_t>(kStateMagic));
  write_int(out, policy_id(options.memory));
  write_int(out, static_cast<int64_t>(options.dtype));
  write_int(out, options.num_heads);
  write_int(out, options.head_dim);
  write_int(out, options.tokens_per_frame);
  write_int(out, static_cast<int64_t>(policy.size()));
  for (const int64_t value : policy) write_int(out, value);
}

std::vector<int64_t> read_state_header(std::istream& in, const CacheOptions& options) {
  read_same(in, "mark", static_cast<int64_t>(kStateMagic));
  read_same(in, "memory policy", policy_id(options.memory));
  read_same(in, "dtype", static_cast<int64_t>(options.dtype));
  read_same(in, "num_heads", options.num_heads);
  read_same(in, "head_dim", options.head_dim);
  read_same(in, "tokens_per_frame", options.tokens_per_frame);
  constexpr int64_t kMostState = 1 << 20;
  const int64_t count = read_int(in);
  if (count < 0 || count > kMostState)
    throw Error(ErrorKind::kInput,
                str("cache state: expected at most ", kMostState, " values, found ", count));
  std::vector<int64_t> policy;
  for (int64_t i = 0; i < count; ++i) policy.push_back(read_int(in));
  return policy;
}

void write_state_page(std::ostream& out, const KvPage& page, const CacheOptions& options) {
  write_int(out, page.num_keys);
  write_int(out, page.has_bias ? 1 : 0);
  // Keys, values, bias and buckets adjoin.
  out.write(reinterpret_cast<const char*>(page.keys),
            static_cast<std::streamsize>(page_bytes(options.dtype, options.head_dim)));
}

void read_state_page(std::istream& in, KvPage& page, const CacheOptions& options) {
  const int64_t keys = read_int(in);
  if (keys < 0 || keys > kPageTokens)
    throw Error(ErrorKind::kInput,
                str("cache state: expected at most 64 keys in a page, found ", keys));
  page.num_keys = static_cast<int32_t>(keys);
  page.has_bias = read_int(in) != 0 || keys < kPageTokens;
  in.read(reinterpret_cast<char*>(page.keys),
          static_cast<std::streamsize>(page_bytes(options.dtype, options.head_dim)));
  if (!in) throw Error(ErrorKind::kInput, "cache state: expected a page, found its end");
}

}  // namespace longtake
