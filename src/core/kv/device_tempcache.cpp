// Policy `tempcache` on CUDA: device_groups.h says which launches a frame's merge is, tempcache.cpp
// what it means. What a head holds, how much of it merges and when, is counted on the device.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <istream>
#include <ostream>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/philox.h"
#include "device/branch_cuda.h"
#include "kv/device_cache_base.h"
#include "kv/device_groups.h"
#include "kv/state_stream.h"
#include "kv/tempcache_head.h"
#include "ops/expect.h"

namespace longtake::cuda {
namespace {

FrameRing ring_of(const CacheOptions& options) {
  const int64_t pages = (options.tokens_per_frame + kPageKeys - 1) / kPageKeys;
  return {static_cast<int>(options.sink_frames),
          static_cast<int>(options.tempcache.exact_frames + options.chunk_frames),
          static_cast<int>(options.tokens_per_frame), static_cast<int>(pages)};
}

template <typename T>
DeviceArray<T> zeros(size_t count) {
  DeviceArray<T> array(count);
  check(cudaMemset(array.data(), 0, count * sizeof(T)), "cache");
  return array;
}

// Vectors of groups, as device_groups.h says.
class VectorArray {
 public:
  VectorArray() = default;

  // Zeros.
  VectorArray(size_t count, bool is_wide)
      : wide_(is_wide ? zeros<float>(count) : DeviceArray<float>()),
        high_(is_wide ? DeviceArray<uint16_t>() : zeros<uint16_t>(count)),
        low_(is_wide ? DeviceArray<uint8_t>() : zeros<uint8_t>(count)) {}

  Vectors view() const {
    if (wide_.size() > 0) return {wide_.data(), nullptr};
    return {high_.data(), low_.data()};
  }

  // Calls body(array) for those that there are.
  template <typename Body>
  void for_each(const Body& body) {
    body(wide_);
    body(high_);
    body(low_);
  }

  size_t bytes() const { return wide_.size() * sizeof(float) + high_.size() * 3; }

  // read(array) and write(numbers, array): rows of either array on the host.
  template <typename Read>
  std::vector<float> read(const Read& read_rows) const {
    if (wide_.size() > 0) return read_rows(wide_);
    const std::vector<uint16_t> high = read_rows(high_);
    const std::vector<uint8_t> low = read_rows(low_);
    std::vector<float> out(high.size());
    for (size_t i = 0; i < out.size(); ++i)
      out[i] = std::bit_cast<float>(uint32_t{high[i]} << 16 | uint32_t{low[i]} << 8);
    return out;
  }

  template <typename Write>
  void write(const std::vector<float>& numbers, const Write& write_rows) const {
    if (wide_.size() > 0) return write_rows(numbers, wide_);
    std::vector<uint16_t> high(numbers.size());
    std::vector<uint8_t> low(numbers.size());
    for (size_t i = 0; i < numbers.size(); ++i) {
      const auto bits = std::bit_cast<uint32_t>(numbers[i]);
      const uint32_t rounded = bits + 0x7fU + (bits >> 8 & 1U);
      high[i] = static_cast<uint16_t>(rounded >> 16);
      low[i] = static_cast<uint8_t>(rounded >> 8);
    }
    write_rows(high, high_);
    write_rows(low, low_);
  }

 private:
  DeviceArray<float> wide_;
  DeviceArray<uint16_t> high_;
  DeviceArray<uint8_t> low_;
};

class DeviceTempCache final : public DeviceCache {
 public:
  DeviceTempCache(Context& ctx, const CacheOptions& options)
      : DeviceCache(ctx, options, ring_of(options)), merge_(resolve_rule(options.tempcache)) {
    check_tempcache(options);
    if (options.head_dim != 64 && options.head_dim != 128)
      throw Error(ErrorKind::kUsage,
                  str("tempcache on the GPU: expected 64 or 128 channels a head, ", "found ",
                      options.head_dim));
    chunk_pages_ = pages_for(options.chunk_frames * options.tokens_per_frame);
    make_state();
    const auto heads = static_cast<int>(options.num_heads);
    int pool = 0;  // pages of groups
    if (capacity() > 0 && !shares()) {
      pool = heads * pages_for(capacity());
    } else if (capacity() > 0) {
      // Each leaves its last page half empty, and has room for a chunk.
      pool = heads * (pages_for(capacity()) + chunk_pages_ + 2);
    } else {
      constexpr int kChunksAtFirst = 8;
      pool = kChunksAtFirst * heads * (chunk_pages_ + 1);
    }
    allocate({pages_for(options.chunk_frames * options.tokens_per_frame), frames_.history_pages(),
              pool});
    // A head that shares a budget may get nearly all of it.
    make_rows(pool, shares() ? pool : pool / heads);
    reset();
  }

  bool wants_queries() const override { return merge_.rule == MergeRule::kNats; }

  bool prepare_frames(Context&, int64_t num_frames) override {
    trace();
    if (capacity() > 0) return false;
    // A commit of more frames is one of several chunks.
    const int64_t chunks = (num_frames + options_.chunk_frames - 1) / options_.chunk_frames;
    prepared_ += chunks;
    asked_ += chunks;
    // Every head may take the pages of a chunk, and one more that it fills in part.
    const auto wanted = [&](int64_t commits) {
      return told().group_pages + commits * options_.num_heads * (chunk_pages_ + 1);
    };
    // So may the largest, which has taken what the next chunk can fill.
    const auto wanted_by_one = [&](int64_t commits) {
      return pages_for(entries()) + (commits + 1) * (chunk_pages_ + 1);
    };
    const auto fits = [&](int64_t commits) {
      return wanted(commits) <= room_.pool && wanted_by_one(commits) <= most_pages_;
    };
    if (fits(prepared_ - told().commits)) return false;
    check(cudaStreamSynchronize(stream()), "cache");  // the host may be ahead of what it was told
    const int64_t commits = prepared_ - told().commits;
    if (fits(commits)) return false;
    const int pool = doubled(room_.pool, wanted(commits));
    if (pool > room_.pool) allocate({room_.work, room_.history, pool});
    make_rows(pool, doubled(most_pages_, wanted_by_one(commits)));
    return true;
  }

  void observe_queries(Context&, View q, ChunkPosition position) override {
    join_commits();
    ask(asked_of_commit(q, position), stream());
  }

  void observe_reads(Context&, View q) override {
    join_commits();
    ask(asked_of_reads(q), stream());
  }

  void read_chunk(Context&, View q, View k, View v) override {
    write_current(k, v, asked_of_reads(q));
  }

  void read_written(Context& ctx, View q, int64_t tokens) override {
    DeviceCache::read_written(ctx, q, tokens);
    if (q.empty()) return;
    // Nobody waits for these before the pass has ended.
    if (const Asked asked = asked_of_reads(q); asked.q != nullptr)
      ask(asked, fork_branch(runtime()));
  }

  void commit_chunk(Context&, View q, View k, View v, ChunkPosition position) override {
    commit_asked(wants_queries() ? asked_of_commit(q, position) : Asked{}, k, v, position);
  }

  void commit(Context&, View k, View v, ChunkPosition position) override {
    commit_asked({}, k, v, position);
  }

  void trace_members() override {
    LONGTAKE_CHECK(told().held == 0 && options_.chunk_frames == 1, told().held);
    traced_.assign(static_cast<size_t>(options_.num_heads), {});
  }

  std::vector<int32_t> members(int64_t head, int64_t num_committed) const override {
    LONGTAKE_CHECK(!traced_.empty());
    std::vector<int32_t> out = frame_members(told().held, merge_.exact_frames, num_committed);
    // Groups are shown behind all frames.
    const auto first =
        static_cast<int32_t>(std::min<int64_t>(told().held, frames_.sink + merge_.exact_frames) *
                             options_.tokens_per_frame);
    const Traced& own = traced_[static_cast<size_t>(head)];
    for (size_t group = 0; group < own.size(); ++group) {
      for (const int32_t key : own[group])
        out[static_cast<size_t>(key)] = first + static_cast<int32_t>(group);
    }
    return out;
  }

  bool is_bounded() const override { return told().evicted == 0; }

  size_t bytes() const override {
    const auto of = [](const auto&... arrays) {
      return ((arrays.size() * sizeof(*arrays.data())) + ...);
    };
    return DeviceCache::bytes() + keys_.bytes() + values_.bytes() +
           of(mapped_, scales_, squares_, inverses_, radii_, codes_, counts_, newest_, seen_,
              stale_, claims_, phases_, moments_, maps_, new_keys_, new_mapped_);
  }

  void reset() override {
    join_commits();
    const auto clear = [&](const auto& array) {
      check(cudaMemsetAsync(array.data(), 0, array.size() * sizeof(*array.data()), stream()),
            "cache");
    };
    clear(sizes_);
    clear(owned_);
    clear(pool_used_);
    clear(moments_);
    clear(num_queries_);
    clear(maps_);
    clear(centres_);
    clear(longest_query_);
    clear(read_sums_);
    clear(num_read_);
    clear(num_chunks_read_);
    clear(readers_);
    check(cudaStreamSynchronize(stream()), "cache");
    fill_free_pages(0, room_.pool);
    DeviceCache::reset();
    if (takes_pages()) {
      share_pages(batch_->on_device(groups()), stream());
      finish(0);
      check(cudaStreamSynchronize(stream()), "cache");
    }
    prepared_ = told().commits;
    asked_ = enqueued_ = 0;
    asked_tokens_ = 0;
  }

 protected:
  void describe(Table& table) const override {
    table.ring_frames = merge_.exact_frames;
    table.num_groups = sizes_.data();
    table.group_pages = pages_.data();
    table.most_group_pages = most_pages_;
    table.pool_used = pool_used_.data();
  }

  std::vector<int64_t> policy_state() const override {
    const Counters counters = read_counters();
    const int64_t sink = std::min<int64_t>(counters.held, frames_.sink);
    const int64_t exact = std::min(counters.held - sink, merge_.exact_frames);
    const int64_t retired = counters.held - sink - exact;
    std::vector<int64_t> state = {static_cast<int64_t>(merge_.rule),
                                  static_cast<int64_t>(merge_.key),
                                  merge_.time_pairs,
                                  sink,
                                  retired,
                                  counters.merged,
                                  counters.evicted,
                                  on_host(num_chunks_read_).front()};
    const std::vector<int64_t> frames = on_host(ring_frames_);
    for (int64_t i = retired; i < retired + exact; ++i)
      state.push_back(frames[static_cast<size_t>(i % frames_.ring)]);
    return state;
  }

  std::vector<KeyRun> runs(int head) const override {
    const int64_t held = read_counters().held;
    std::vector<KeyRun> all = frame_runs(head, held, merge_.exact_frames, true);
    const auto pages = group_pages(head);
    KeyRun groups{on_host(sizes_)[static_cast<size_t>(head)], {}, {}};
    groups.values = vectors_of(values_, pages, groups.keys);
    for (const int32_t page : pages)
      groups.pages.push_back(layout().num_heads * (room_.work + room_.history) + page);
    all.push_back(std::move(groups));
    for (KeyRun& run : frame_runs(head, held, merge_.exact_frames, false))
      all.push_back(std::move(run));
    return all;
  }

  // As HeadGroups::write and what TempCache writes beside it.
  void write_policy(std::ostream& out) const override {
    const int64_t dim = options_.head_dim;
    const std::vector<int32_t> sizes = on_host(sizes_);
    const std::vector<double> moments = on_host(moments_);
    const std::vector<float> maps = on_host(maps_), centres = on_host(centres_);
    const std::vector<float> readers = on_host(readers_);
    const std::vector<int64_t> queries = on_host(num_queries_);
    for (int64_t head = 0; head < options_.num_heads; ++head) {
      const int64_t size = sizes[static_cast<size_t>(head)];
      const auto pages = group_pages(static_cast<int>(head));
      write_int(out, size);
      put(out, vectors_of(keys_, pages, size));
      put(out, vectors_of(values_, pages, size));
      for (const auto* numbers : {&counts_, &newest_}) {
        const std::vector<int32_t> narrow = rows_of(*numbers, pages, size, 1);
        put(out, std::vector<int64_t>(narrow.begin(), narrow.end()));
      }
      put(out, rows_of(radii_, pages, size, 1));
      put(out, rows_of(seen_, pages, size, kSeen));
      write_int(out, queries[static_cast<size_t>(head)]);
      put(out, part(moments, head, dim * dim));
      put(out, part(maps, head, dim * dim));
      put(out, part(centres, head, dim));
      put(out, part(readers, head, dim));
    }
    put(out, on_host(longest_query_));
  }

  bool read_policy(std::istream& in, const std::vector<int64_t>& state,
                   const std::vector<int64_t>& keys) override {
    constexpr size_t kFixed = 8;
    if (state.size() < kFixed || state[0] != static_cast<int64_t>(merge_.rule) ||
        state[1] != static_cast<int64_t>(merge_.key) || state[2] != merge_.time_pairs)
      return false;
    const int64_t sink = state[3], retired = state[4];
    const auto exact = static_cast<int64_t>(state.size() - kFixed);
    // Frames retire when there are more than the exact ones, and all else follows from their
    // number.
    if (sink < 0 || sink > frames_.sink || retired < 0 || exact > merge_.exact_frames ||
        (retired > 0 && exact < merge_.exact_frames) || (exact > 0 && sink < frames_.sink))
      return false;
    std::vector<int64_t> frames(static_cast<size_t>(frames_.ring), 0);
    for (int64_t i = 0; i < exact; ++i)
      frames[static_cast<size_t>((retired + i) % frames_.ring)] =
          state[kFixed + static_cast<size_t>(i)];
    put(frames, 0, ring_frames_);
    const std::vector<int32_t> reads(static_cast<size_t>(options_.num_heads),
                                     static_cast<int32_t>(state[7]));
    put(reads, 0, num_chunks_read_);
    write_counters({sink + retired + exact, 0, state[5], state[6]});
    const int64_t others = (sink + exact) * frames_.tokens;
    if (!take_sizes(keys, others)) return false;
    const int64_t dim = options_.head_dim;
    for (int64_t head = 0; head < options_.num_heads; ++head) {
      const int64_t size = keys[static_cast<size_t>(head)] - others;
      if (read_int(in) != size) return false;
      const auto pages = group_pages(static_cast<int>(head));
      for (const VectorArray* vectors : {&keys_, &values_})
        vectors->write(get<float>(in, size * dim), [&](const auto& rows, const auto& array) {
          set_rows(rows, pages, dim, array);
        });
      for (auto* numbers : {&counts_, &newest_}) {
        const std::vector<int64_t> wide = get<int64_t>(in, size);
        set_rows(std::vector<int32_t>(wide.begin(), wide.end()), pages, 1, *numbers);
      }
      set_rows(get<float>(in, size), pages, 1, radii_);
      set_rows(get<Seen>(in, size * kSeen), pages, kSeen, seen_);
      put(get<int64_t>(in, 1), head, num_queries_);
      put(get<double>(in, dim * dim), head * dim * dim, moments_);
      put(get<float>(in, dim * dim), head * dim * dim, maps_);
      put(get<float>(in, dim), head * dim, centres_);
      put(get<float>(in, dim), head * dim, readers_);
    }
    put(get<int32_t>(in, 1), 0, longest_query_);
    if (!in) return false;
    remap_groups(batch_->on_device(groups()), stream());
    return true;
  }

 private:
  template <typename T>
  static std::vector<T> part(const std::vector<T>& all, int64_t index, int64_t count) {
    return {all.begin() + index * count, all.begin() + (index + 1) * count};
  }

  template <typename T>
  static void put(std::ostream& out, const std::vector<T>& values) {
    out.write(reinterpret_cast<const char*>(values.data()),
              static_cast<std::streamsize>(values.size() * sizeof(T)));
  }

  template <typename T>
  static std::vector<T> get(std::istream& in, int64_t count) {
    std::vector<T> values(static_cast<size_t>(count));
    in.read(reinterpret_cast<char*>(values.data()),
            static_cast<std::streamsize>(values.size() * sizeof(T)));
    return values;
  }

  template <typename T>
  static void put(const std::vector<T>& values, int64_t at, const DeviceArray<T>& array) {
    copy_to_device(values.data(), values.size(), array.data() + at);
  }

  // What the latest commit did to the members of groups, once it has been waited for.
  void trace() {
    if (traced_.empty()) return;
    const int64_t retired = told().held - frames_.sink - merge_.exact_frames;
    if (retired <= num_traced_) return;
    LONGTAKE_CHECK(retired == num_traced_ + 1, retired);
    const auto tokens = static_cast<size_t>(options_.tokens_per_frame);
    const int64_t first_key = (frames_.sink + num_traced_++) * options_.tokens_per_frame;
    const std::vector<int32_t> joins = on_host(joins_), order = on_host(order_);
    const std::vector<int32_t> sizes = on_host(sizes_), num_new = on_host(num_new_);
    std::vector<int32_t> leaving;
    for (size_t head = 0; head < traced_.size(); ++head) {
      Traced& own = traced_[head];
      const auto key_at = [&](size_t token) {
        return static_cast<int32_t>(first_key) + static_cast<int32_t>(token);
      };
      for (size_t token = 0; token < tokens; ++token) {
        const int32_t group = joins[head * tokens + token];
        if (group >= 0) own[static_cast<size_t>(group)].push_back(key_at(token));
      }
      const auto kept = static_cast<size_t>(sizes[head] - num_new[head]);
      if (kept < own.size() && leaving.empty()) leaving = on_host(leaving_);
      // As settle_groups: the last first, and the last group takes its number.
      for (size_t gone = own.size() - kept; gone > 0; --gone) {
        const auto group =
            static_cast<size_t>(leaving[head * (leaving.size() / traced_.size()) + gone - 1]);
        own[group].swap(own.back());
        own.pop_back();
      }
      own.resize(static_cast<size_t>(sizes[head]));
      for (size_t i = 0; kept + i < own.size(); ++i)
        own[kept + i] = {key_at(static_cast<size_t>(order[head * tokens + i]))};
    }
  }

  // Pages of the pool that a head's groups fill.
  std::vector<int32_t> group_pages(int head) const {
    const auto size = on_host(sizes_)[static_cast<size_t>(head)];
    std::vector<int32_t> pages(static_cast<size_t>(pages_for(size)));
    check(cudaMemcpy(pages.data(), pages_.data() + int64_t{head} * most_pages_,
                     pages.size() * sizeof(int32_t), cudaMemcpyDeviceToHost),
          "cache");
    return pages;
  }

  // Rows of `width` numbers of groups 0 .. count - 1, which lie in these pages.
  template <typename T>
  static std::vector<T> rows_of(const DeviceArray<T>& array, const std::vector<int32_t>& pages,
                                int64_t count, int64_t width) {
    const auto page = static_cast<size_t>(kPageKeys * width);
    std::vector<T> out(pages.size() * page);
    for (size_t i = 0; i < pages.size(); ++i)
      check(cudaMemcpy(out.data() + i * page, array.data() + static_cast<size_t>(pages[i]) * page,
                       page * sizeof(T), cudaMemcpyDeviceToHost),
            "cache");
    out.resize(static_cast<size_t>(count * width));
    return out;
  }

  std::vector<float> vectors_of(const VectorArray& vectors, const std::vector<int32_t>& pages,
                                int64_t count) const {
    return vectors.read(
        [&](const auto& array) { return rows_of(array, pages, count, options_.head_dim); });
  }

  template <typename T>
  static void set_rows(const std::vector<T>& rows, const std::vector<int32_t>& pages, int64_t width,
                       const DeviceArray<T>& array) {
    const auto page = static_cast<size_t>(kPageKeys * width);
    for (size_t i = 0; i < pages.size(); ++i) {
      const size_t count = std::min(page, rows.size() - i * page);
      copy_to_device(rows.data() + i * page, count,
                     array.data() + static_cast<size_t>(pages[i]) * page);
    }
  }

  // Every head has so many keys, `others` of them exact, and takes pages for the rest; false: they
  // do not fit.
  bool take_sizes(const std::vector<int64_t>& keys, int64_t others) {
    std::vector<int32_t> sizes;
    for (const int64_t count : keys) {
      if (count < others || (capacity() > 0 && !shares() && count - others > capacity()))
        return false;
      sizes.push_back(static_cast<int32_t>(count - others));
    }
    put(sizes, 0, sizes_);
    if (!takes_pages()) return true;
    int64_t wanted = 0, most = most_pages_;
    for (const int32_t size : sizes) {
      const int64_t own = pages_for(size) + 2 * (chunk_pages_ + 1);  // as the next chunk will want
      wanted += own;
      most = std::max(most, own);
    }
    if (wanted > room_.pool || most > most_pages_) {
      if (shares()) return false;
      if (wanted > room_.pool) allocate({room_.work, room_.history, doubled(room_.pool, wanted)});
      make_rows(room_.pool, doubled(most_pages_, most));
    }
    share_pages(batch_->on_device(groups()), stream());
    check(cudaStreamSynchronize(stream()), "cache");
    return true;
  }

  Asked asked_of_commit(View q, ChunkPosition position) {
    expect_shape("observe_queries", q, {q.dim(0), options_.num_heads, options_.head_dim});
    expect_dtype("observe_queries", q, options_.dtype);
    check_frames("observe_queries", q, position);
    Asked asked;
    asked.q = q.raw();
    asked.tokens = asked_tokens_ = static_cast<int>(q.dim(0));
    asked.rows = asked_rows_.data();
    return asked;
  }

  // Nothing, if nothing is learnt from the pass.
  Asked asked_of_reads(View q) const {
    if (merge_.bias != GroupBias::kAges) return {};
    expect_shape("observe_reads", q, {q.dim(0), options_.num_heads, options_.head_dim});
    expect_dtype("observe_reads", q, options_.dtype);
    if (q.dim(0) != options_.chunk_frames * options_.tokens_per_frame) return {};
    Asked asked;
    asked.q = q.raw();
    asked.tokens = static_cast<int>(q.dim(0));
    asked.frames = static_cast<int>(options_.chunk_frames);
    asked.sums = read_sums_.data();
    asked.num_rows = num_read_.data();
    return asked;
  }

  void ask(const Asked& asked, cudaStream_t on) const {
    Fill job;
    job.layout = layout();
    job.asked = asked;
    fill(job, nullptr, nullptr, 0, on);
  }

  void commit_asked(const Asked& asked, View k, View v, ChunkPosition position) {
    check_tokens("commit", k, v);
    check_frames("commit", k, position);
    const int64_t most = options_.chunk_frames, tokens = options_.tokens_per_frame;
    enqueued_ += (position.num_frames + most - 1) / most;
    LONGTAKE_CHECK(capacity() > 0 || enqueued_ <= asked_, "prepare_chunk: ", asked_,
                   " chunks, not ", enqueued_);
    for (int64_t begin = 0; begin < position.num_frames; begin += most) {
      const int64_t end = std::min(begin + most, position.num_frames);
      append(FillPlace::kFrames, k.rows(begin * tokens, end * tokens),
             v.rows(begin * tokens, end * tokens), begin == 0 ? asked : Asked{});
      Groups part = groups();
      part.chunk_frames = static_cast<int>(end - begin);
      part.offset = begin;
      part.takes_reads = merge_.bias == GroupBias::kAges && position.num_frames == most;
      part.asked_tokens = std::exchange(asked_tokens_, 0);
      batch_->add(part);
      summarise_later(shown_.data(), static_cast<int>(shown_.size()));
      finish(part.chunk_frames);
    }
  }

  // Beside pages in f32.
  bool is_wide() const { return options_.dtype == DType::kF32; }

  size_t mapped_bytes() const { return is_wide() ? sizeof(float) : sizeof(uint16_t); }

  // Most groups of a head; 0: no budget.
  int64_t capacity() const {
    if (merge_.budget_tokens == 0) return 0;
    return merge_.budget_tokens -
           (options_.sink_frames + merge_.exact_frames) * options_.tokens_per_frame;
  }

  bool shares() const { return capacity() > 0 && merge_.shares == BudgetShares::kNeed; }

  // Whether heads take pages from the pool as they need them; else each has its own for ever.
  bool takes_pages() const { return capacity() == 0 || shares(); }

  void make_state() {
    const auto heads = static_cast<size_t>(options_.num_heads);
    const auto dim = static_cast<size_t>(options_.head_dim);
    const auto tokens = static_cast<size_t>(options_.tokens_per_frame);
    const auto chunk = static_cast<size_t>(options_.chunk_frames);
    const size_t keys = heads * tokens;
    most_square_ = most_square_of(merge_);
    const auto pairs = static_cast<size_t>(merge_.time_pairs);
    std::vector<double> speeds;
    for (size_t i = 0; i < pairs; ++i)
      speeds.push_back(
          std::pow(merge_.time_theta, -static_cast<double>(i) / static_cast<double>(pairs)));
    speeds_ = on_device(speeds);
    if (merge_.bias == GroupBias::kAges) {
      std::vector<float> phases;
      phases.reserve(2 * pairs * kMostAges);
      for (int age = 0; age < kMostAges; ++age) {
        for (const double speed : speeds)
          phases.push_back(static_cast<float>(std::cos(speed * age)));
        for (const double speed : speeds)
          phases.push_back(static_cast<float>(std::sin(speed * age)));
      }
      phases_ = on_device(phases);
    }
    std::vector<float> directions(dim * kSigns);
    fill_normal(merge_.seed, 0, 0, directions.data(), static_cast<int64_t>(directions.size()));
    directions_ = on_device(directions);
    ring_frames_ = zeros<int64_t>(static_cast<size_t>(frames_.ring));
    sizes_ = zeros<int32_t>(heads);
    owned_ = zeros<int32_t>(heads);
    num_free_ = zeros<int32_t>(1);
    pool_used_ = zeros<int32_t>(1);
    moments_ = zeros<double>(heads * dim * dim);
    num_queries_ = zeros<int64_t>(heads);
    maps_ = zeros<float>(heads * dim * dim);
    centres_ = zeros<float>(heads * dim);
    longest_query_ = zeros<int32_t>(1);
    read_sums_ = zeros<float>(chunk * heads * dim);
    num_read_ = zeros<int32_t>(heads);
    num_chunks_read_ = zeros<int32_t>(heads);
    readers_ = zeros<float>(heads * dim);
    const auto code =
        static_cast<size_t>(Groups::code_bytes_of(merge_.ann, static_cast<int>(options_.head_dim)));
    new_keys_ = DeviceArray<float>(keys * dim);
    new_mapped_ = DeviceArray<std::byte>(keys * dim * mapped_bytes());
    new_codes_ = DeviceArray<int8_t>(keys * code);
    if (merge_.ann == AnnEngine::kQuant) {
      new_scales_ = zeros<float>(keys);
      new_squares_ = zeros<float>(keys);
    }
    asked_rows_ =
        DeviceArray<std::byte>(kMostSampledQueries * heads * dim * size_of(options_.dtype));
    candidates_ = DeviceArray<int32_t>(keys * kCandidates);
    distances_ = DeviceArray<float>(keys * kCandidates);
    joins_ = DeviceArray<int32_t>(keys);
    order_ = DeviceArray<int32_t>(keys);
    num_new_ = zeros<int32_t>(heads);
    cuts_ = DeviceArray<unsigned long long>(heads);
    cut_ties_ = DeviceArray<int32_t>(heads);
    const size_t leaving = keys * (shares() ? heads : 1);
    leaving_ = DeviceArray<int32_t>(leaving);
    tails_ = DeviceArray<int32_t>(leaving);
    destinations_ = DeviceArray<int32_t>(leaving);
    num_gone_ = zeros<int32_t>(heads);
  }

  // Room for the groups of so many pages, and for so many of a head; what is there stays.
  void make_rows(int pool, int most_pages) {
    const auto rows = static_cast<size_t>(pool) * kPageKeys;
    const auto dim = static_cast<size_t>(options_.head_dim);
    const auto grow = [&]<typename T>(DeviceArray<T>& array, size_t count) {
      DeviceArray<T> larger = zeros<T>(count);
      if (array.size() > 0)
        check(cudaMemcpy(larger.data(), array.data(), array.size() * sizeof(T),
                         cudaMemcpyDeviceToDevice),
              "growth of a cache");
      std::swap(array, larger);
    };
    if (keys_.bytes() == 0) {
      keys_ = VectorArray(rows * dim, is_wide());
      values_ = VectorArray(rows * dim, is_wide());
    } else {
      const auto grow_one = [&](auto& array) {
        if (array.size() > 0) grow(array, rows * dim);
      };
      keys_.for_each(grow_one);
      values_.for_each(grow_one);
    }
    grow(mapped_, rows * dim * mapped_bytes());
    grow(codes_, rows * static_cast<size_t>(Groups::code_bytes_of(
                            merge_.ann, static_cast<int>(options_.head_dim))));
    if (merge_.ann == AnnEngine::kQuant) {
      grow(scales_, rows);
      grow(squares_, rows);
      grow(inverses_, rows);
    }
    grow(counts_, rows);
    grow(newest_, rows);
    grow(radii_, rows);
    grow(seen_, rows * kSeen);
    grow(stale_, rows);
    claims_ = DeviceArray<unsigned long long>(rows);
    check(cudaMemset(claims_.data(), 0xff, rows * sizeof(unsigned long long)), "cache");
    const auto heads = static_cast<size_t>(options_.num_heads);
    const int before = most_pages_;
    const auto most = static_cast<size_t>(most_pages);
    DeviceArray<int32_t> pages = zeros<int32_t>(heads * most);
    if (before > 0)
      check(cudaMemcpy2D(pages.data(), most * sizeof(int32_t), pages_.data(),
                         static_cast<size_t>(before) * sizeof(int32_t),
                         static_cast<size_t>(before) * sizeof(int32_t), heads,
                         cudaMemcpyDeviceToDevice),
            "growth of a cache");
    std::swap(pages_, pages);
    most_pages_ = most_pages;
    if (options_.page_summaries) shown_ = DeviceArray<int32_t>(heads * most);
    const auto held = static_cast<int>(free_pages_.size());
    grow(free_pages_, static_cast<size_t>(pool));
    if (before > 0) fill_free_pages(held, pool);
    // What was cleared and copied by the default stream is there for the context's.
    check(cudaDeviceSynchronize(), "growth of a cache");
  }

  // Pages [begin, end) of the pool belong to nobody: they are put on the stack, which is empty if
  // begin is 0. Without a common pool every head gets its own instead.
  void fill_free_pages(int begin, int end) {
    int32_t count = 0;
    if (begin > 0)
      check(cudaMemcpy(&count, num_free_.data(), sizeof count, cudaMemcpyDeviceToHost), "pages");
    std::vector<int32_t> numbers(static_cast<size_t>(end - begin));
    // The first is taken first.
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = end - 1 - static_cast<int32_t>(i);
    if (!takes_pages()) {
      std::reverse(numbers.begin(), numbers.end());
      copy_to_device(numbers.data(), numbers.size(), pages_.data());
      return;
    }
    copy_to_device(numbers.data(), numbers.size(), free_pages_.data() + count);
    count += end - begin;
    copy_to_device(&count, 1, num_free_.data());
  }

  Groups groups() const {
    Groups g;
    g.layout = layout();
    g.frames = frames_;
    g.pool = g.layout.num_heads * (room_.work + room_.history);
    g.exact_frames = static_cast<int>(merge_.exact_frames);
    g.chunk_frames = g.later_frames = static_cast<int>(options_.chunk_frames);
    g.counters = counters_.data();
    g.clock = options_.clock.data<int64_t>();
    g.ring_frames = ring_frames_.data();
    g.rule = merge_.rule;
    g.key = merge_.key;
    g.bias = merge_.bias;
    g.ann = merge_.ann;
    g.most_square = most_square_;
    g.most_error =
        static_cast<float>(merge_.max_error * std::sqrt(static_cast<double>(options_.head_dim)));
    g.capacity = static_cast<int>(capacity());
    g.shares = shares();
    g.pairs = static_cast<int>(merge_.time_pairs);
    g.speeds = speeds_.data();
    g.phases = phases_.data();
    g.directions = directions_.data();
    g.sizes = sizes_.data();
    g.owned = owned_.data();
    g.pages = pages_.data();
    g.most_pages = most_pages_;
    g.keys = keys_.view();
    g.values = values_.view();
    g.mapped = mapped_.data();
    g.codes = codes_.data();
    g.scales = scales_.data();
    g.squares = squares_.data();
    g.inverses = inverses_.data();
    g.counts = counts_.data();
    g.newest = newest_.data();
    g.radii = radii_.data();
    g.seen = seen_.data();
    g.stale = stale_.data();
    g.claims = claims_.data();
    g.free_pages = free_pages_.data();
    g.num_free = num_free_.data();
    g.pool_used = pool_used_.data();
    g.shown = shown_.data();
    g.asked = asked_rows_.data();
    g.moments = moments_.data();
    g.num_queries = num_queries_.data();
    g.maps = maps_.data();
    g.centres = centres_.data();
    g.longest_query = longest_query_.data();
    g.read_sums = read_sums_.data();
    g.num_read = num_read_.data();
    g.num_chunks_read = num_chunks_read_.data();
    g.readers = readers_.data();
    g.new_keys = new_keys_.data();
    g.new_mapped = new_mapped_.data();
    g.new_codes = new_codes_.data();
    g.new_scales = new_scales_.data();
    g.new_squares = new_squares_.data();
    g.candidates = candidates_.data();
    g.distances = distances_.data();
    g.joins = joins_.data();
    g.order = order_.data();
    g.num_new = num_new_.data();
    g.cuts = cuts_.data();
    g.cut_ties = cut_ties_.data();
    g.leaving = leaving_.data();
    g.tails = tails_.data();
    g.destinations = destinations_.data();
    g.num_gone = num_gone_.data();
    return g;
  }

  const TempCacheOptions merge_;
  float most_square_ = 0;
  int chunk_pages_ = 0;   // that a chunk's keys fill, of a head
  int most_pages_ = 0;    // of a head
  int64_t prepared_ = 0;  // commits that there is room for, counted like told().commits
  int64_t asked_ = 0;     // the same since the last reset
  int64_t enqueued_ = 0;  // commits that no replay made
  int asked_tokens_ = 0;  // of the queries that the next commit has rows of
  using Traced = std::vector<std::vector<int32_t>>;  // keys in the order of their commits, by group
  std::vector<Traced> traced_;                       // by head; empty: nobody asked
  int64_t num_traced_ = 0;                           // frames
  DeviceArray<double> speeds_, moments_;
  DeviceArray<float> phases_, directions_, maps_, centres_, read_sums_, readers_;
  DeviceArray<int64_t> ring_frames_, num_queries_;
  DeviceArray<int32_t> sizes_, owned_, pages_, free_pages_, num_free_, pool_used_, shown_;
  DeviceArray<int32_t> longest_query_, num_read_, num_chunks_read_;
  // Of every group.
  VectorArray keys_, values_;
  DeviceArray<std::byte> mapped_;
  DeviceArray<float> scales_, squares_, radii_;
  DeviceArray<int8_t> codes_;
  DeviceArray<float2> inverses_;
  DeviceArray<int32_t> counts_, newest_;
  DeviceArray<Seen> seen_;
  DeviceArray<uint8_t> stale_;
  DeviceArray<unsigned long long> claims_;
  // Of the frame in work.
  DeviceArray<float> new_keys_, new_scales_, new_squares_, distances_;
  DeviceArray<std::byte> new_mapped_;
  DeviceArray<int8_t> new_codes_;
  DeviceArray<unsigned long long> cuts_;
  DeviceArray<std::byte> asked_rows_;  // of queries, in the pages' type
  DeviceArray<int32_t> candidates_, joins_, order_, num_new_, cut_ties_, num_gone_;
  DeviceArray<int32_t> leaving_, tails_, destinations_;
};

}  // namespace

std::unique_ptr<KvCache> make_device_temp_cache(Context& ctx, const CacheOptions& options) {
  return std::make_unique<DeviceTempCache>(ctx, options);
}

}  // namespace longtake::cuda
