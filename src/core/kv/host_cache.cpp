#include "kv/host_cache.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <istream>
#include <numeric>
#include <ostream>

#include "base/error.h"
#include "device/dispatch.h"
#include "device/parallel.h"
#include "kv/state_stream.h"
#include "ops/expect.h"

namespace longtake {
namespace {

int64_t pages_for(int64_t tokens) {
  return (tokens + kPageTokens - 1) / kPageTokens;
}

// Infinities and NaN have every bit of the exponent set: only there does one more carry into the
// sign. Plain 32-bit integers, so that the loop is wide.
template <typename T>
bool all_finite(const T* x, int64_t count) {
  uint32_t seen = 0;
  for (int64_t i = 0; i < count; ++i)
    seen |= (std::bit_cast<uint32_t>(static_cast<float>(x[i])) & 0x7f800000U) + 0x00800000U;
  return seen >> 31 == 0;
}

}  // namespace

HostCache::HostCache(Context& ctx, const CacheOptions& options)
    : options_(options),
      store_(ctx.device(), options.dtype, options.head_dim),
      pages_(static_cast<size_t>(options.num_heads)),
      spare_(static_cast<size_t>(options.num_heads)) {}

void HostCache::check_tokens(const char* what, View k, View v) const {
  expect_rank(what, k, 3);
  expect_shape(what, k, {k.dim(0), options_.num_heads, options_.head_dim});
  expect_shape(what, v, k.shape());
  expect_dtype(what, k, options_.dtype);
  expect_dtype(what, v, options_.dtype);
}

void HostCache::check_chunk(View k, View v) const {
  check_tokens("commit", k, v);
  check_finite("keys", k);
  check_finite("values", v);
}

void HostCache::check_finite(const char* what, View x) const {
  for_float_type(x.dtype(), [&]<typename T>() {
    const T* data = x.data<T>();
    if (all_finite(data, x.numel())) return;
    for (int64_t i = 0; i < x.numel(); ++i) {
      if (std::isfinite(static_cast<float>(data[i]))) continue;
      const std::string layer = options_.layer >= 0 ? str("layer ", options_.layer, ", ") : "";
      throw Error(str(layer, what, " of head ", i / options_.head_dim % options_.num_heads,
                      ": expected finite numbers, found ", static_cast<float>(data[i])));
    }
  });
}

void HostCache::drop_current() {
  for (PageList& list : pages_) list.resize(list.size() - static_cast<size_t>(num_current_));
  num_current_ = 0;
}

void HostCache::set_buckets(std::span<const Bucket> buckets) {
  buckets_.assign(buckets.begin(), buckets.end());
}

void HostCache::set_current(Context& ctx, View k, View v) {
  check_tokens("set_current", k, v);
  drop_current();
  const int64_t tokens = k.dim(0);
  const int64_t wanted = pages_for(tokens);
  for (PageList& pages : spare_) {
    while (static_cast<int64_t>(pages.size()) < wanted) pages.push_back(store_.take());
  }
  parallel_for(ctx, options_.num_heads, 1, [&](int64_t begin_head, int64_t end_head) {
    for (int64_t head = begin_head; head < end_head; ++head) {
      for (int64_t i = 0; i < wanted; ++i) {
        KvPage& page = spare_[static_cast<size_t>(head)][static_cast<size_t>(i)];
        const int64_t begin = i * kPageTokens;
        const int64_t count = std::min(kPageTokens, tokens - begin);
        if (count < kPageTokens) clear_page(page, options_.dtype, options_.head_dim);
        page.num_keys = 0;
        append_tokens(page, k, v, head, begin, count, buckets_);
      }
    }
  });
  for (size_t head = 0; head < pages_.size(); ++head) {
    const auto first = spare_[head].begin();
    pages_[head].insert(pages_[head].end(), first, first + wanted);
  }
  num_current_ = wanted;
}

void HostCache::append(View k, View v, int64_t begin, int64_t count, bool fill) {
  LONGTAKE_CHECK(num_current_ == 0);
  for (size_t head = 0; head < pages_.size(); ++head) {
    PageList& list = pages_[head];
    for (int64_t done = 0; done < count;) {
      const bool open = done > 0 || fill;
      if (!open || list.empty() || list.back().num_keys == kPageTokens)
        list.push_back(store_.take());
      KvPage& page = list.back();
      const int64_t part = std::min(kPageTokens - page.num_keys, count - done);
      append_tokens(page, k, v, static_cast<int64_t>(head), begin + done, part, buckets_);
      done += part;
    }
  }
}

void HostCache::erase(int64_t begin, int64_t end) {
  for (PageList& list : pages_) {
    for (auto page = list.begin() + begin; page != list.begin() + end; ++page)
      store_.give_back(*page);
    list.erase(list.begin() + begin, list.begin() + end);
  }
}

void HostCache::reset() {
  drop_current();
  for (PageList& list : pages_) {
    for (const KvPage& page : list) store_.give_back(page);
    list.clear();
  }
}

void HostCache::set_reading(Context&, const HistoryReading& reading) {
  if (!reading.is_everything())
    throw Error(ErrorKind::kUsage, str("memory: expected window, which keeps frames apart, for a ",
                                       "model that reads some of them, found ", options_.memory));
}

int64_t HostCache::num_history_pages(int64_t head) const {
  return static_cast<int64_t>(pages_[static_cast<size_t>(head)].size()) - num_current_;
}

std::vector<int32_t> HostCache::members(int64_t /*head*/, int64_t num_committed) const {
  std::vector<int32_t> out(static_cast<size_t>(num_committed));
  std::iota(out.begin(), out.end(), 0);
  return out;
}

int64_t HostCache::entries() const {
  int64_t most = 0;
  for (const PageList& list : pages_) {
    int64_t keys = 0;
    for (size_t i = 0; i + static_cast<size_t>(num_current_) < list.size(); ++i)
      keys += list[i].num_keys;
    most = std::max(most, keys);
  }
  return most;
}

int64_t HostCache::total_entries() const {
  int64_t keys = 0;
  for (const PageList& list : pages_) {
    for (size_t i = 0; i + static_cast<size_t>(num_current_) < list.size(); ++i)
      keys += list[i].num_keys;
  }
  return keys;
}

size_t HostCache::bytes_used() const {
  size_t pages = 0;
  for (const PageList& list : pages_) pages += list.size() - static_cast<size_t>(num_current_);
  return pages * page_bytes(options_.dtype, options_.head_dim);
}

void HostCache::save(std::ostream& out) const {
  write_state_header(out, options_, policy_state());
  for (int64_t head = 0; head < options_.num_heads; ++head) {
    write_int(out, num_history_pages(head));
    for (int64_t i = 0; i < num_history_pages(head); ++i)
      write_state_page(out, pages_[static_cast<size_t>(head)][static_cast<size_t>(i)], options_);
  }
  write_policy(out);
  if (!out) throw Error("cache state: expected to write it, found a failing stream");
}

void HostCache::load(std::istream& in) {
  reset();
  try {
    const std::vector<int64_t> state = read_state_header(in, options_);
    for (PageList& list : pages_) {
      // A claimed count is believed one page at a time: a short stream ends the loop.
      for (int64_t left = read_int(in); left > 0; --left) {
        list.push_back(store_.take());
        read_state_page(in, list.back(), options_);
      }
    }
    if (!set_policy_state(state) || !read_policy(in))
      throw Error(ErrorKind::kInput, "cache state: expected this policy's state, found another");
  } catch (...) {
    reset();
    throw;
  }
}

}  // namespace longtake
