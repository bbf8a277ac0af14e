// Policy `tempcache`: the first sink_frames and the newest exact_frames stay as they are; a frame
// that grows older merges into groups of keys that saw the same thing before. The cache grows with
// what is new, not with time, and never beyond its budget.
//
//   a head's pages: [sink frames][one key per group, rewritten in place][exact frames][work]
//
// When a frame leaves the exact ones, its keys lose their temporal rotation (a static thing then
// leaves the same key for ever; the spatial rotation stays, since where a thing stands is part of
// what it means) and find their groups (tempcache_head.h). What finds none starts one.
//
// The key that attention sees is the group's, rotated to the time of its newest member: there a
// group of one is exactly its key, and queries meet content at the age at which it was last seen.
// Its bucket is that of its newest member, too.
// The members were seen at other ages, which the temporal rotation gives other logits; the bias
// makes up for that, and is set anew for every chunk because ages differ from chunk to chunk.
//
// Over the budget the least recently merged groups go first, of those the smallest: of each head
// over its own budget, or of all heads over the sum of theirs. Heads that look at little merge all
// they see into a few groups at the same error at which others hardly merge, so that the sum goes
// where it is needed. Sink and exact frames never go.
#include "kv/tempcache.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <deque>
#include <istream>
#include <memory>
#include <numeric>
#include <ostream>
#include <tuple>
#include <utility>
#include <vector>

#include "ann/project.h"
#include "base/error.h"
#include "device/dispatch.h"
#include "device/parallel.h"
#include "kv/host_cache.h"
#include "kv/moved_sink.h"
#include "kv/tempcache_ages.h"
#include "kv/tempcache_groups.h"
#include "kv/tempcache_head.h"
#include "kv/time_rotation.h"
#include "ops/expect.h"

namespace longtake {
namespace {

// Of a frame's queries so many are looked at, spread over the screen: a running mean over many
// frames needs no more.
constexpr int64_t kSampledQueries = 32;
// The mean query of a head is a mean of chunks: of all of them at first, then with this weight.
constexpr float kReadWeight = 0.125F;
constexpr int64_t kTokenCost = 10;  // of merging a key, in groups that it is compared with

// A group of a head, in the order in which groups are forgotten.
struct Stale {
  int64_t newest, count;
  int32_t head, group;

  bool operator<(const Stale& other) const {
    return std::tie(newest, count, head, group) <
           std::tie(other.newest, other.count, other.head, other.group);
  }
};

class TempCache final : public HostCache {
 public:
  TempCache(Context& ctx, const CacheOptions& options)
      : HostCache(ctx, options),
        merge_(resolve_rule(options.tempcache)),
        ages_(options.head_dim, merge_.time_pairs, merge_.time_theta),
        pages_per_frame_((options.tokens_per_frame + kPageTokens - 1) / kPageTokens),
        shown_(static_cast<size_t>(options.num_heads)),
        moved_(store_, options.num_heads) {
    check_tempcache(options);
    for (int64_t head = 0; head < options.num_heads; ++head)
      heads_.emplace_back(options.head_dim, merge_);
    leaving_.resize(heads_.size());
    biases_.resize(heads_.size());
    costs_.resize(heads_.size());
    readers_.assign(static_cast<size_t>(options.num_heads * options.head_dim), 0.0F);
    // Under a budget nothing grows later: sink and exact frames, one frame more before its keys
    // have merged and the chunk in work; all groups, and room for a frame that merges with none.
    const int64_t frames = options.sink_frames + merge_.exact_frames + 2;
    const int64_t groups = merge_.budget_tokens > 0 ? capacity() : 0;
    // A head that shares may get nearly all of it, and each leaves its last page half empty.
    const bool shared = merge_.shares == BudgetShares::kNeed;
    const int64_t pages =
        frames * pages_per_frame_ + pages_for(groups + options.tokens_per_frame) + (shared ? 1 : 0);
    store_.reserve(static_cast<size_t>(options.num_heads * pages));
    for (PageList& list : pages_)
      list.reserve(static_cast<size_t>(shared ? options.num_heads * pages : pages));
  }

  bool wants_queries() const override { return merge_.rule == MergeRule::kNats; }

  void observe_queries(Context& ctx, View q, ChunkPosition position) override {
    expect_shape("observe_queries", q, {q.dim(0), options_.num_heads, options_.head_dim});
    expect_tokens("observe_queries", q, position);
    check_finite("queries", q);
    const int64_t stride = std::max<int64_t>(1, q.dim(0) / kSampledQueries);
    const int64_t count = (q.dim(0) + stride - 1) / stride;
    const Workspace::Scope scope(ctx.workspace());
    const View rows =
        ctx.workspace().take(DType::kF32, {options_.num_heads, count, options_.head_dim});
    std::vector<TimeRotation> rotations;
    for (int64_t frame = 0; frame < position.num_frames; ++frame)
      rotations.push_back(rotation(position.first_frame + frame));
    parallel_for(ctx, options_.num_heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t head = begin; head < end; ++head) {
        float* row = rows.data<float>() + head * count * options_.head_dim;
        for (int64_t i = 0; i < count; ++i) {
          float* query = row + i * options_.head_dim;
          // The place in the stride changes from row to row, so that every column is looked at.
          const int64_t t = std::min(i * stride + i / 4 % stride, q.dim(0) - 1);
          copy_row(q, t, head, query);
          rotations[static_cast<size_t>(t / options_.tokens_per_frame)].undo(query);
        }
        heads_[static_cast<size_t>(head)].observe(row, count);
      }
    });
    if (merge_.max_error == 0) return;
    for (int64_t i = 0; i < options_.num_heads * count; ++i) {
      float square;
      const float* query = rows.data<float>() + i * options_.head_dim;
      dots(query, 1, options_.head_dim, query, &square);
      longest_query_ = std::max(longest_query_, std::sqrt(square));
    }
  }

  void observe_reads(Context& ctx, View q) override {
    if (merge_.bias != GroupBias::kAges) return;
    expect_shape("observe_reads", q, {q.dim(0), options_.num_heads, options_.head_dim});
    const int64_t frames = std::max<int64_t>(1, q.dim(0) / options_.tokens_per_frame);
    const int64_t row = options_.num_heads * options_.head_dim;
    if (static_cast<int64_t>(read_sums_.size()) != frames * row) {
      read_sums_.assign(static_cast<size_t>(frames * row), 0.0F);
      num_read_ = 0;
    }
    const int64_t tokens = q.dim(0) / frames;
    const int64_t stride = std::max<int64_t>(1, tokens / kSampledQueries);
    parallel_for(ctx, frames, 1, [&](int64_t begin, int64_t end) {
      for (int64_t frame = begin; frame < end; ++frame) {
        for (int64_t t = stride / 2; t < tokens; t += stride)
          add_row(q, frame * tokens + t, read_sums_.data() + frame * row);
      }
    });
    num_read_ += (tokens - stride / 2 + stride - 1) / stride;
  }

  void commit(Context& ctx, View k, View v, ChunkPosition position) override {
    check_chunk(k, v);
    expect_tokens("commit", k, position);
    drop_current();
    reading_ = {};
    if (num_sink_ == 0) first_frame_ = position.first_frame;
    if (num_sink_ < options_.sink_frames) moved_.forget();
    for (int64_t frame = 0; frame < position.num_frames; ++frame) {
      append(k, v, frame * options_.tokens_per_frame, options_.tokens_per_frame, /*fill=*/false);
      if (num_sink_ < options_.sink_frames) {
        ++num_sink_;
        continue;
      }
      exact_.push_back(position.first_frame + frame);
      if (static_cast<int64_t>(exact_.size()) > merge_.exact_frames) retire(ctx);
    }
    if (merge_.bias != GroupBias::kAges) return;
    take_reads(position);
    if (num_reads_ > 0) set_biases(ctx, position.first_frame + position.num_frames);
  }

  bool is_bounded() const override { return counts_.evicted == 0; }

  void bound_log_mass(int64_t head, const float* q, int64_t frame, double* low,
                      double* high) const override {
    const KeyGroups& groups = heads_[static_cast<size_t>(head)].groups();
    std::vector<float> query(q, q + options_.head_dim);
    rotation(frame).undo(query.data());
    const int64_t first = num_sink_ * options_.tokens_per_frame;
    for (int64_t group = 0; group < groups.size(); ++group) {
      if (groups.count(group) == 1) continue;  // shows its very key
      const auto range = ages_.log_mass(groups, group, query.data(), frame);
      low[first + group] = range.low;
      high[first + group] = range.high;
    }
  }

  void reset() override {
    HostCache::reset();
    num_sink_ = 0;
    forget_others();
  }

  void forget_window() override {
    drop_current();
    for (PageList& list : pages_) {
      const auto first = list.begin() + num_sink_ * pages_per_frame_;
      std::for_each(first, list.end(), [this](const KvPage& page) { store_.give_back(page); });
      list.erase(first, list.end());
    }
    forget_others();
  }

  // What is read beside the sink is the policy's: a reading only says where the sink stands.
  void set_reading(Context& ctx, const HistoryReading& reading) override {
    drop_current();
    reading_ = reading;
    if (reading.sink != HistoryReading::Sink::kBeforeWindow) return;
    const int64_t others = num_retired_ + static_cast<int64_t>(exact_.size());
    moved_.move(ctx, pages_, num_sink_ * pages_per_frame_, reading,
                sink_distance(reading, first_frame_, num_sink_, others));
  }

  KvView view() const override {
    const bool is_moved = reading_.sink == HistoryReading::Sink::kBeforeWindow && moved_.is_moved();
    if (!is_moved && reading_.sink != HistoryReading::Sink::kHidden) return HostCache::view();
    for (size_t head = 0; head < pages_.size(); ++head) {
      const auto others = pages_[head].begin() + num_sink_ * pages_per_frame_;
      shown_[head].assign(others, pages_[head].end());
      if (is_moved)
        shown_[head].insert(shown_[head].begin(), moved_.pages(head).begin(),
                            moved_.pages(head).begin() + num_sink_ * pages_per_frame_);
    }
    return {store_.dtype(), store_.head_dim(), shown_};
  }

  MergeCounts merge_counts() const override { return counts_; }

  void trace_members() override {
    LONGTAKE_CHECK(num_sink_ + num_retired_ + static_cast<int64_t>(exact_.size()) == 0);
    tracing_ = true;
    for (HeadGroups& head : heads_) head.trace();
  }

  std::vector<int32_t> members(int64_t head, int64_t num_committed) const override {
    LONGTAKE_CHECK(tracing_);
    const int64_t tokens = options_.tokens_per_frame;
    std::vector<int32_t> out(static_cast<size_t>(num_committed), -1);
    const HeadGroups& own = heads_[static_cast<size_t>(head)];
    const int64_t sink = num_sink_ * tokens;
    std::iota(out.begin(), out.begin() + sink, 0);
    for (size_t group = 0; group < own.members().size(); ++group) {
      for (const int32_t key : own.members()[group])
        out[static_cast<size_t>(key)] = static_cast<int32_t>(sink) + static_cast<int32_t>(group);
    }
    const auto exact = static_cast<int64_t>(exact_.size()) * tokens;
    std::iota(out.end() - exact, out.end(), static_cast<int32_t>(sink + own.size()));
    return out;
  }

 protected:
  std::vector<int64_t> policy_state() const override {
    std::vector<int64_t> state = {static_cast<int64_t>(merge_.rule),
                                  static_cast<int64_t>(merge_.key),
                                  merge_.time_pairs,
                                  num_sink_,
                                  num_retired_,
                                  counts_.merged,
                                  counts_.evicted,
                                  num_reads_};
    state.insert(state.end(), exact_.begin(), exact_.end());
    return state;
  }

  bool set_policy_state(const std::vector<int64_t>& state) override {
    constexpr size_t kFixed = 8;
    if (state.size() < kFixed || state[0] != static_cast<int64_t>(merge_.rule) ||
        state[1] != static_cast<int64_t>(merge_.key) || state[2] != merge_.time_pairs)
      return false;
    num_sink_ = state[3];
    num_retired_ = state[4];
    counts_ = {state[5], state[6]};
    num_reads_ = state[7];
    exact_.assign(state.begin() + kFixed, state.end());
    return num_sink_ >= 0 && num_sink_ <= options_.sink_frames && num_retired_ >= 0 &&
           static_cast<int64_t>(exact_.size()) <= merge_.exact_frames;
  }

  void write_policy(std::ostream& out) const override {
    for (int64_t i = 0; i < options_.num_heads; ++i) {
      heads_[static_cast<size_t>(i)].write(out);
      out.write(reinterpret_cast<const char*>(readers_.data() + i * options_.head_dim),
                row_bytes());
    }
    out.write(reinterpret_cast<const char*>(&longest_query_), sizeof longest_query_);
  }

  bool read_policy(std::istream& in) override {
    const int64_t others = (num_sink_ + static_cast<int64_t>(exact_.size())) * pages_per_frame_;
    for (int64_t i = 0; i < options_.num_heads; ++i) {
      HeadGroups& head = heads_[static_cast<size_t>(i)];
      if (!head.read(in, num_history_pages(i) * kPageTokens)) return false;
      if (num_history_pages(i) != others + pages_for(head.size())) return false;
      in.read(reinterpret_cast<char*>(readers_.data() + i * options_.head_dim), row_bytes());
    }
    in.read(reinterpret_cast<char*>(&longest_query_), sizeof longest_query_);
    return static_cast<bool>(in);
  }

 private:
  std::streamsize row_bytes() const {
    return options_.head_dim * static_cast<std::streamsize>(sizeof(float));
  }

  static int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

  // Most groups of a head.
  int64_t capacity() const {
    return merge_.budget_tokens -
           (options_.sink_frames + merge_.exact_frames) * options_.tokens_per_frame;
  }

  TimeRotation rotation(int64_t frame) const {
    return {merge_.time_pairs, merge_.time_theta, frame};
  }

  void expect_tokens(const char* what, View x, ChunkPosition position) const {
    if (x.dim(0) != position.num_frames * options_.tokens_per_frame)
      throw Error(str(what, ": expected ", position.num_frames, " frames of ",
                      options_.tokens_per_frame, " tokens, found ", x.dim(0), " tokens"));
  }

  // out [D] = x[token, head] in f32.
  void copy_row(View x, int64_t token, int64_t head, float* out) const {
    for_float_type(x.dtype(), [&]<typename T>() {
      const T* row = x.data<T>() + (token * options_.num_heads + head) * options_.head_dim;
      for (int64_t d = 0; d < options_.head_dim; ++d) out[d] = static_cast<float>(row[d]);
    });
  }

  // sums [N, D] += x[token].
  void add_row(View x, int64_t token, float* sums) const {
    const int64_t row = options_.num_heads * options_.head_dim;
    for_float_type(x.dtype(), [&]<typename T>() {
      const T* from = x.data<T>() + token * row;
      for (int64_t i = 0; i < row; ++i) sums[i] += static_cast<float>(from[i]);
    });
  }

  // The chunk's reading queries join the mean of each head: a mean turns as its queries do.
  void take_reads(ChunkPosition position) {
    const int64_t dim = options_.head_dim;
    const int64_t frames = static_cast<int64_t>(read_sums_.size()) / (options_.num_heads * dim);
    if (num_read_ == 0 || frames != position.num_frames) return;
    ++num_reads_;
    const float weight = std::max(kReadWeight, 1.0F / static_cast<float>(num_reads_));
    std::array<float, kMostHeadDim> mean;
    for (int64_t frame = 0; frame < frames; ++frame) {
      const TimeRotation turned = rotation(position.first_frame + frame);
      for (int64_t head = 0; head < options_.num_heads; ++head) {
        float* sum = read_sums_.data() + (frame * options_.num_heads + head) * dim;
        std::transform(sum, sum + dim, mean.begin(),
                       [this](float x) { return x / static_cast<float>(num_read_); });
        turned.undo(mean.data());
        float* reader = readers_.data() + head * dim;
        const float share = weight / static_cast<float>(frames);
        if (frame == 0)
          std::transform(reader, reader + dim, reader, [&](float x) { return x * (1 - weight); });
        for (int64_t d = 0; d < dim; ++d) reader[d] += share * mean[static_cast<size_t>(d)];
      }
    }
    std::fill(read_sums_.begin(), read_sums_.end(), 0.0F);
    num_read_ = 0;
  }

  // All that is not the sink's.
  void forget_others() {
    for (HeadGroups& head : heads_) head.clear();
    std::fill(readers_.begin(), readers_.end(), 0.0F);
    read_sums_.clear();
    num_read_ = num_reads_ = 0;
    longest_query_ = 0;
    exact_.clear();
    num_retired_ = 0;
    counts_ = {};
    reading_ = {};
    moved_.forget();
  }

  // Every group's bias, for queries that ask at frame `now`.
  void set_biases(Context& ctx, int64_t now) {
    ages_.reach(now);
    for (size_t i = 0; i < heads_.size(); ++i) costs_[i] = static_cast<int32_t>(heads_[i].size());
    parallel_for_ragged(ctx, costs_, [&](int64_t i) {
      const auto at = static_cast<size_t>(i);
      const KeyGroups& groups = heads_[at].groups();
      auto& [biases, scratch] = biases_[at];
      biases.resize(static_cast<size_t>(groups.size()));
      ages_.biases(groups, readers_.data() + i * options_.head_dim, now, biases.data(), scratch);
      KvPage* page = pages_[at].data() + num_sink_ * pages_per_frame_;
      for (int64_t begin = 0; begin < groups.size(); begin += kPageTokens, ++page)
        longtake::set_biases(*page, biases.data() + begin);
    });
  }

  // The oldest exact frame joins the groups.
  void retire(Context& ctx) {
    const int64_t tokens = options_.tokens_per_frame;
    const int64_t frame = exact_.front();
    // The metric is taken afresh when the queries it stands for have doubled: seldom enough that
    // mapping all groups again costs nothing over time.
    const bool refresh = (num_retired_ & (num_retired_ + 1)) == 0;
    const int64_t first_page = num_sink_ * pages_per_frame_;
    const Workspace::Scope scope(ctx.workspace());
    const View scratch =
        ctx.workspace().take(DType::kF32, {options_.num_heads, 5, tokens, options_.head_dim});
    const TimeRotation now = rotation(frame);
    for (size_t i = 0; i < heads_.size(); ++i)
      costs_[i] = static_cast<int32_t>(heads_[i].size() + kTokenCost * tokens);
    const auto each_head = [&](const auto& work) {
      parallel_for_ragged(ctx, costs_, [&](int64_t i) {
        const auto at = static_cast<size_t>(i);
        KvPage* groups = pages_[at].data() + first_page;
        const KvPage* oldest = pages_[at].data() + pages_[at].size() -
                               static_cast<int64_t>(exact_.size()) * pages_per_frame_;
        work(at, oldest, groups, scratch.data<float>() + i * 5 * tokens * options_.head_dim);
      });
    };
    each_head([&](size_t i, const KvPage* oldest, KvPage* groups, float* rows) {
      join(heads_[i], frame, now, refresh, oldest, groups, rows);
    });
    choose_leaving();
    // Room for the keys that are new; pages are taken here since the store has one owner.
    for (size_t i = 0; i < heads_.size(); ++i) {
      const int64_t held = pages_for(heads_[i].size());
      const int64_t wanted = pages_for(heads_[i].size() + heads_[i].num_new() -
                                       static_cast<int64_t>(leaving_[i].size()));
      for (int64_t n = held; n < wanted; ++n)
        pages_[i].insert(pages_[i].begin() + first_page + n, store_.take());
    }
    each_head([&](size_t i, const KvPage* oldest, KvPage* groups, float* rows) {
      for (const int64_t group : leaving_[i]) forget(heads_[i], group, groups);
      add_new(heads_[i], frame, oldest, groups, rows);
    });
    for (size_t i = 0; i < heads_.size(); ++i) {
      counts_.merged += tokens - heads_[i].num_new();
      counts_.evicted += static_cast<int64_t>(leaving_[i].size());
      PageList& list = pages_[i];
      const int64_t kept = pages_for(heads_[i].size());
      const int64_t before = static_cast<int64_t>(list.size()) -
                             static_cast<int64_t>(exact_.size()) * pages_per_frame_;
      const auto first = list.begin() + first_page + kept;
      const auto last = list.begin() + before + pages_per_frame_;
      std::for_each(first, last, [this](const KvPage& page) { store_.give_back(page); });
      list.erase(first, last);
    }
    exact_.pop_front();
    ++num_retired_;
  }

  // One head's part of retire(): keys of the frame in pages `oldest` join the groups, which show in
  // pages `shown`. rows: scratch [5, tokens, D], which add_new() reads.
  void join(HeadGroups& head, int64_t frame, const TimeRotation& now, bool refresh,
            const KvPage* oldest, KvPage* shown, float* rows) const {
    const int64_t dim = options_.head_dim;
    const int64_t tokens = options_.tokens_per_frame;
    float* const plain = rows;  // as they stood in the page
    float* const keys = plain + tokens * dim;
    float* const values = keys + tokens * dim;
    float* const mapped = values + tokens * dim;
    float* const scratch = mapped + tokens * dim;
    for (int64_t t = 0; t < tokens; ++t) {
      read_token(oldest[t / kPageTokens], options_.dtype, dim, t % kPageTokens, plain + t * dim,
                 values + t * dim);
      std::copy_n(plain + t * dim, dim, keys + t * dim);
      now.undo(keys + t * dim);
    }
    if (refresh) head.refresh_metric(keys, tokens);
    head.join(keys, values, tokens, frame, longest_query_, first_key(), mapped, scratch);
    const KeyGroups& groups = head.groups();
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t group = head.joins()[static_cast<size_t>(t)];
      if (group < 0) continue;
      std::array<float, kMostHeadDim> key;
      std::copy_n(groups.key(group), dim, key.begin());
      now.apply(key.data());  // to the time of its newest member
      // The ages' bias follows when the whole chunk is in, if a mean query is known.
      const float bias = merge_.bias != GroupBias::kNone
                             ? std::log(static_cast<float>(groups.count(group)))
                             : 0.0F;
      write_token(shown[group / kPageTokens], options_.dtype, dim, group % kPageTokens, key.data(),
                  groups.value(group), bias, oldest[t / kPageTokens].buckets[t % kPageTokens]);
    }
  }

  // The frame's keys that joined no group start their own.
  void add_new(HeadGroups& head, int64_t frame, const KvPage* oldest, KvPage* shown,
               const float* rows) const {
    const int64_t dim = options_.head_dim;
    const int64_t tokens = options_.tokens_per_frame;
    const float* const plain = rows;
    const float* const keys = plain + tokens * dim;
    const float* const values = keys + tokens * dim;
    const float* const mapped = values + tokens * dim;
    int64_t group = head.size();
    head.add_new(keys, values, mapped, frame, first_key());
    for (int64_t t = 0; t < tokens; ++t) {
      if (head.joins()[static_cast<size_t>(t)] >= 0) continue;
      // A group of one shows the very bits of its key.
      write_token(shown[group / kPageTokens], options_.dtype, dim, group % kPageTokens,
                  plain + t * dim, values + t * dim, 0,
                  oldest[t / kPageTokens].buckets[t % kPageTokens]);
      ++group;
    }
  }

  void forget(HeadGroups& head, int64_t group, KvPage* shown) const {
    const int64_t last = head.size() - 1;
    head.remove(group);
    move_last_token(shown[last / kPageTokens], shown[group / kPageTokens], options_.dtype,
                    options_.head_dim, group % kPageTokens);
  }

  // leaving_: the groups of every head to forget, so that the frame's other keys fit.
  void choose_leaving() {
    for (auto& leaving : leaving_) leaving.clear();
    if (merge_.budget_tokens == 0) return;
    if (merge_.shares == BudgetShares::kEven) {
      for (size_t i = 0; i < heads_.size(); ++i) {
        const int64_t over = heads_[i].size() + heads_[i].num_new() - capacity();
        if (over > 0) leaving_[i] = heads_[i].groups().stalest(over);
      }
      return;
    }
    // The order of KeyGroups::stalest over all heads.
    int64_t over = -capacity() * options_.num_heads;
    stale_.clear();
    for (size_t i = 0; i < heads_.size(); ++i) {
      const KeyGroups& groups = heads_[i].groups();
      over += groups.size() + heads_[i].num_new();
      for (int64_t group = 0; group < groups.size(); ++group)
        stale_.push_back({groups.newest(group), groups.count(group), static_cast<int32_t>(i),
                          static_cast<int32_t>(group)});
    }
    if (over <= 0) return;
    std::nth_element(stale_.begin(), stale_.begin() + over, stale_.end());
    for (int64_t i = 0; i < over; ++i) {
      const Stale& one = stale_[static_cast<size_t>(i)];
      leaving_[static_cast<size_t>(one.head)].push_back(one.group);
    }
    for (auto& leaving : leaving_) std::sort(leaving.rbegin(), leaving.rend());
  }

  // Number of the first key of the frame that retires now, among all committed ones.
  int64_t first_key() const { return (num_sink_ + num_retired_) * options_.tokens_per_frame; }

  TempCacheOptions merge_;
  KeyAges ages_;
  int64_t pages_per_frame_;
  std::vector<HeadGroups> heads_;
  std::deque<int64_t> exact_;  // frames that are still exact, oldest first
  int64_t num_sink_ = 0;       // frames held for ever so far
  int64_t first_frame_ = 0;    // of them
  HistoryReading reading_;
  mutable std::vector<PageList> shown_;  // per head, what view() shows of a limited reading
  MovedSink moved_;
  int64_t num_retired_ = 0;  // frames that have joined the groups
  MergeCounts counts_;
  // Scratch of one frame's work: by head, but for the last.
  std::vector<std::vector<int64_t>> leaving_;  // groups to forget, descending
  std::vector<std::pair<std::vector<float>, std::vector<float>>> biases_;
  std::vector<int32_t> costs_;  // of a merge
  std::vector<Stale> stale_;    // groups of all heads
  // [N, D]: mean query of the passes that read, no temporal rotation.
  std::vector<float> readers_;
  // Queries that read since the last commit: sums [frames of a chunk, N, D] of so many each.
  std::vector<float> read_sums_;
  int64_t num_read_ = 0;
  int64_t num_reads_ = 0;    // chunks whose reads the heads' means know
  float longest_query_ = 0;  // norm, of all heads, so far
  bool tracing_ = false;
};

}  // namespace

std::unique_ptr<KvCache> make_temp_cache(Context& ctx, const CacheOptions& options) {
  return std::make_unique<TempCache>(ctx, options);
}

}  // namespace longtake
