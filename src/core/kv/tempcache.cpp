// Policy `tempcache`: the first sink_frames and the newest exact_frames stay as they are; a frame
// that grows older merges into groups of keys that saw the same thing before. The cache grows with
// what is new, not with time, and never beyond its budget.
//
//   a head's pages: [sink frames][one key per group, rewritten in place][exact frames][work]
//
// When a frame leaves the exact ones, its keys lose their temporal rotation (a static thing then
// leaves the same key for ever; the spatial rotation stays, since where a thing stands is part of
// what it means). The index names a few candidates for each key, the metric measures them, and
// pairs below the threshold are taken from the nearest on, each key and each group once: two tokens
// of one frame are never the same thing. What finds no partner starts a group.
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
#include <bit>
#include <cmath>
#include <deque>
#include <istream>
#include <limits>
#include <memory>
#include <numeric>
#include <ostream>
#include <tuple>
#include <vector>

#include "ann/project.h"
#include "base/error.h"
#include "device/dispatch.h"
#include "device/parallel.h"
#include "kv/host_cache.h"
#include "kv/tempcache_ages.h"
#include "kv/tempcache_groups.h"
#include "kv/tempcache_metric.h"
#include "kv/time_rotation.h"
#include "ops/expect.h"

namespace longtake {
namespace {

constexpr int64_t kCandidates = 8;  // of a key, checked exactly: one alone misses many partners
// Of a frame's queries so many are looked at, spread over the screen: a running mean over many
// frames needs no more.
constexpr int64_t kSampledQueries = 32;
// The mean query of a head is a mean of chunks: of all of them at first, then with this weight.
constexpr float kReadWeight = 0.125F;
constexpr int64_t kTokenCost = 10;  // of merging a key, in groups that it is compared with
constexpr int64_t kMostDim = 256;   // of a head

// A key of the frame and a group that it could join.
struct Match {
  uint64_t rank;  // squared distance, then token: floats that are not negative sort as their bits
  int32_t group;

  Match(float square, int32_t token, int32_t to)
      : rank(uint64_t{std::bit_cast<uint32_t>(square)} << 32 | static_cast<uint32_t>(token)),
        group(to) {}

  int32_t token() const { return static_cast<int32_t>(rank & 0xffffffffU); }

  bool operator<(const Match& other) const {
    return rank != other.rank ? rank < other.rank : group < other.group;
  }
};

// A group of a head, in the order in which groups are forgotten.
struct Stale {
  int64_t newest, count;
  int32_t head, group;

  bool operator<(const Stale& other) const {
    return std::tie(newest, count, head, group) <
           std::tie(other.newest, other.count, other.head, other.group);
  }
};

struct Head {
  Head(int64_t head_dim, const TempCacheOptions& options)
      : groups(head_dim, options.key),
        metric(head_dim, options.rule),
        index(make_ann_index(options.ann, head_dim, options.seed)),
        reader(static_cast<size_t>(head_dim)) {}

  KeyGroups groups;
  KeyMetric metric;
  std::unique_ptr<AnnIndex> index;
  std::vector<float> mapped;  // [groups, D]: keys as the metric sees them
  std::vector<float> reader;  // [D]: mean query of the passes that read, no temporal rotation
  // Of every group, which committed keys are its members; kept only while they are traced.
  std::vector<std::vector<int32_t>> members;
  // Scratch of one frame's work.
  std::vector<Match> matches;
  std::vector<int32_t> candidates, joins, moved;
  std::vector<int64_t> leaving;  // groups to forget, descending
  int64_t num_new = 0;           // keys that joined no group
  std::vector<char> taken;
  std::vector<float> biases, scratch;
};

TempCacheOptions resolve(TempCacheOptions options) {
  if (options.rule != MergeRule::kPaper) return options;
  options.key = GroupKey::kNewest;
  options.bias = GroupBias::kLogCount;
  options.time_pairs = 0;  // keys are compared as they are
  return options;
}

class TempCache final : public HostCache {
 public:
  TempCache(Context& ctx, const CacheOptions& options)
      : HostCache(ctx, options),
        merge_(resolve(options.tempcache)),
        ages_(options.head_dim, merge_.time_pairs, merge_.time_theta),
        pages_per_frame_((options.tokens_per_frame + kPageTokens - 1) / kPageTokens) {
    check_options();
    const double tau = merge_.merge_threshold;
    most_square_ = static_cast<float>(merge_.rule == MergeRule::kPaper ? 2 - 2 * tau : tau * tau);
    if (merge_.max_error > 0) most_square_ = std::numeric_limits<float>::infinity();
    for (int64_t head = 0; head < options.num_heads; ++head)
      heads_.emplace_back(options.head_dim, merge_);
    costs_.resize(heads_.size());
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
        heads_[static_cast<size_t>(head)].metric.observe(row, count);
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
    const Head& own = heads_[static_cast<size_t>(head)];
    std::vector<float> query(q, q + options_.head_dim);
    rotation(frame).undo(query.data());
    const int64_t first = num_sink_ * options_.tokens_per_frame;
    for (int64_t group = 0; group < own.groups.size(); ++group) {
      if (own.groups.count(group) == 1) continue;  // shows its very key
      const auto range = ages_.log_mass(own.groups, group, query.data(), frame);
      low[first + group] = range.low;
      high[first + group] = range.high;
    }
  }

  void reset() override {
    HostCache::reset();
    for (Head& head : heads_) {
      head.groups.clear();
      head.metric.clear();
      head.index->clear();
      head.mapped.clear();
      head.members.clear();
      std::fill(head.reader.begin(), head.reader.end(), 0.0F);
    }
    read_sums_.clear();
    num_read_ = num_reads_ = 0;
    longest_query_ = 0;
    exact_.clear();
    num_sink_ = num_retired_ = 0;
    counts_ = {};
  }

  MergeCounts merge_counts() const override { return counts_; }

  void trace_members() override {
    LONGTAKE_CHECK(num_sink_ + num_retired_ + static_cast<int64_t>(exact_.size()) == 0);
    tracing_ = true;
  }

  std::vector<int32_t> members(int64_t head, int64_t num_committed) const override {
    LONGTAKE_CHECK(tracing_);
    const int64_t tokens = options_.tokens_per_frame;
    std::vector<int32_t> out(static_cast<size_t>(num_committed), -1);
    const Head& own = heads_[static_cast<size_t>(head)];
    const int64_t sink = num_sink_ * tokens;
    std::iota(out.begin(), out.begin() + sink, 0);
    for (size_t group = 0; group < own.members.size(); ++group) {
      for (const int32_t key : own.members[group])
        out[static_cast<size_t>(key)] = static_cast<int32_t>(sink) + static_cast<int32_t>(group);
    }
    const auto exact = static_cast<int64_t>(exact_.size()) * tokens;
    std::iota(out.end() - exact, out.end(), static_cast<int32_t>(sink + own.groups.size()));
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
    for (const Head& head : heads_) {
      head.groups.write(out);
      head.metric.write(out);
      out.write(reinterpret_cast<const char*>(head.reader.data()),
                static_cast<std::streamsize>(head.reader.size() * sizeof(float)));
    }
    out.write(reinterpret_cast<const char*>(&longest_query_), sizeof longest_query_);
  }

  bool read_policy(std::istream& in) override {
    const int64_t others = (num_sink_ + static_cast<int64_t>(exact_.size())) * pages_per_frame_;
    for (int64_t i = 0; i < options_.num_heads; ++i) {
      Head& head = heads_[static_cast<size_t>(i)];
      const int64_t most = num_history_pages(i) * kPageTokens;
      if (!head.groups.read(in, most) || !head.metric.read(in)) return false;
      if (num_history_pages(i) != others + pages_for(head.groups.size())) return false;
      in.read(reinterpret_cast<char*>(head.reader.data()),
              static_cast<std::streamsize>(head.reader.size() * sizeof(float)));
      remap(head);
    }
    in.read(reinterpret_cast<char*>(&longest_query_), sizeof longest_query_);
    return static_cast<bool>(in);
  }

 private:
  static int64_t pages_for(int64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

  void check_options() const {
    if (options_.sink_frames < 0 || merge_.exact_frames < 0)
      throw Error(ErrorKind::kUsage,
                  str("tempcache: expected 0 or more exact and sink frames, found ",
                      merge_.exact_frames, " and ", options_.sink_frames));
    const bool paper = merge_.rule == MergeRule::kPaper;
    if (!(merge_.merge_threshold >= 0) || (paper && merge_.merge_threshold > 1))
      throw Error(ErrorKind::kUsage,
                  str("merge threshold: expected ", paper ? "a cosine in 0..1" : "0 nats or more",
                      ", found ", merge_.merge_threshold));
    if (!(merge_.max_error >= 0) || (paper && merge_.max_error > 0))
      throw Error(ErrorKind::kUsage,
                  str("max error: expected ", paper ? "none with a cosine" : "0 nats or more",
                      ", found ", merge_.max_error));
    if (merge_.time_pairs < 0 || 2 * merge_.time_pairs > options_.head_dim)
      throw Error(ErrorKind::kUsage, str("time_pairs: expected 0..", options_.head_dim / 2,
                                         ", found ", merge_.time_pairs));
    const int64_t least =
        (options_.sink_frames + merge_.exact_frames + 1) * options_.tokens_per_frame;
    if (merge_.budget_tokens != 0 && merge_.budget_tokens < least)
      throw Error(
          ErrorKind::kUsage,
          str("memory budget: expected at least ", least,
              " keys per head (sink and exact frames and one more), found ", merge_.budget_tokens));
  }

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
    std::array<float, kMostDim> mean;
    for (int64_t frame = 0; frame < frames; ++frame) {
      const TimeRotation turned = rotation(position.first_frame + frame);
      for (int64_t head = 0; head < options_.num_heads; ++head) {
        float* sum = read_sums_.data() + (frame * options_.num_heads + head) * dim;
        std::transform(sum, sum + dim, mean.begin(),
                       [this](float x) { return x / static_cast<float>(num_read_); });
        turned.undo(mean.data());
        float* reader = heads_[static_cast<size_t>(head)].reader.data();
        const float share = weight / static_cast<float>(frames);
        if (frame == 0)
          std::transform(reader, reader + dim, reader, [&](float x) { return x * (1 - weight); });
        for (int64_t d = 0; d < dim; ++d) reader[d] += share * mean[static_cast<size_t>(d)];
      }
    }
    std::fill(read_sums_.begin(), read_sums_.end(), 0.0F);
    num_read_ = 0;
  }

  // Every group's bias, for queries that ask at frame `now`.
  void set_biases(Context& ctx, int64_t now) {
    ages_.reach(now);
    for (size_t i = 0; i < heads_.size(); ++i)
      costs_[i] = static_cast<int32_t>(heads_[i].groups.size());
    parallel_for_ragged(ctx, costs_, [&](int64_t i) {
      Head& head = heads_[static_cast<size_t>(i)];
      const int64_t count = head.groups.size();
      head.biases.resize(static_cast<size_t>(count));
      ages_.biases(head.groups, head.reader.data(), now, head.biases.data(), head.scratch);
      KvPage* page = pages_[static_cast<size_t>(i)].data() + num_sink_ * pages_per_frame_;
      for (int64_t begin = 0; begin < count; begin += kPageTokens, ++page)
        longtake::set_biases(*page, head.biases.data() + begin);
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
    // Room for the case that nothing merges; pages are taken here since the store has one owner.
    for (size_t i = 0; i < heads_.size(); ++i) {
      const int64_t now = pages_for(heads_[i].groups.size());
      for (int64_t n = now; n < pages_for(heads_[i].groups.size() + tokens); ++n)
        pages_[i].insert(pages_[i].begin() + first_page + n, store_.take());
    }
    const Workspace::Scope scope(ctx.workspace());
    const View scratch =
        ctx.workspace().take(DType::kF32, {options_.num_heads, 5, tokens, options_.head_dim});
    const TimeRotation now = rotation(frame);
    for (size_t i = 0; i < heads_.size(); ++i)
      costs_[i] = static_cast<int32_t>(heads_[i].groups.size() + kTokenCost * tokens);
    const auto each_head = [&](const auto& work) {
      parallel_for_ragged(ctx, costs_, [&](int64_t i) {
        const auto at = static_cast<size_t>(i);
        float* rows = scratch.data<float>() + i * 5 * tokens * options_.head_dim;
        work(heads_[at], pages_[at].data() + first_page, rows);
      });
    };
    const auto oldest_of = [&](const Head& head, const KvPage* groups) {
      return groups + pages_for(head.groups.size() + tokens);
    };
    each_head([&](Head& head, KvPage* groups, float* rows) {
      const KvPage* oldest = oldest_of(head, groups);
      join(head, frame, now, refresh, oldest, groups, rows);
    });
    choose_leaving();
    each_head([&](Head& head, KvPage* groups, float* rows) {
      const KvPage* oldest = oldest_of(head, groups);
      forget(head, groups);
      add_new(head, frame, oldest, groups, rows);
    });
    for (size_t i = 0; i < heads_.size(); ++i) {
      counts_.merged += tokens - heads_[i].num_new;
      counts_.evicted += static_cast<int64_t>(heads_[i].leaving.size());
      PageList& list = pages_[i];
      const int64_t kept = pages_for(heads_[i].groups.size());
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
  void join(Head& head, int64_t frame, const TimeRotation& now, bool refresh, const KvPage* oldest,
            KvPage* shown, float* rows) const {
    const int64_t dim = options_.head_dim;
    const int64_t tokens = options_.tokens_per_frame;
    float* const plain = rows;  // as they stood in the page
    float* const keys = plain + tokens * dim;
    float* const values = keys + tokens * dim;
    float* const mapped = values + tokens * dim;
    float* const moved_rows = mapped + tokens * dim;  // of groups that a key joined
    for (int64_t t = 0; t < tokens; ++t) {
      read_token(oldest[t / kPageTokens], options_.dtype, dim, t % kPageTokens, plain + t * dim,
                 values + t * dim);
      std::copy_n(plain + t * dim, dim, keys + t * dim);
      now.undo(keys + t * dim);
    }
    if (refresh) {
      head.metric.refresh(keys, tokens);
      remap(head);
    }
    head.metric.map_all(keys, tokens, mapped);

    match(head, keys, mapped);
    const std::vector<int32_t>& joins = head.joins;
    head.num_new = tokens;
    head.moved.clear();
    float* moved = moved_rows;
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t group = joins[static_cast<size_t>(t)];
      if (group < 0) continue;
      head.groups.merge(group, keys + t * dim, values + t * dim, 1, frame);
      // The map is affine: what the key becomes, its image becomes.
      const float share = merge_.key == GroupKey::kMean
                              ? 1.0F / static_cast<float>(head.groups.count(group))
                              : 1.0F;
      float* own = head.mapped.data() + group * dim;
      for (int64_t d = 0; d < dim; ++d) own[d] += share * (mapped[t * dim + d] - own[d]);
      head.moved.push_back(static_cast<int32_t>(group));
      moved = std::copy_n(own, dim, moved);
      std::array<float, kMostDim> key;
      std::copy_n(head.groups.key(group), dim, key.begin());
      now.apply(key.data());  // to the time of its newest member
      // The ages' bias follows when the whole chunk is in, if a mean query is known.
      const float bias = merge_.bias != GroupBias::kNone
                             ? std::log(static_cast<float>(head.groups.count(group)))
                             : 0.0F;
      write_token(shown[group / kPageTokens], options_.dtype, dim, group % kPageTokens, key.data(),
                  head.groups.value(group), bias, oldest[t / kPageTokens].buckets[t % kPageTokens]);
      if (tracing_) head.members[static_cast<size_t>(group)].push_back(number(t));
      --head.num_new;
    }
    head.index->set_all(head.moved.data(), moved_rows, static_cast<int64_t>(head.moved.size()));
  }

  // The frame's keys that joined no group start their own.
  void add_new(Head& head, int64_t frame, const KvPage* oldest, KvPage* shown,
               const float* rows) const {
    const int64_t dim = options_.head_dim;
    const int64_t tokens = options_.tokens_per_frame;
    const float* const plain = rows;
    const float* const keys = plain + tokens * dim;
    const float* const values = keys + tokens * dim;
    const float* const mapped = values + tokens * dim;
    for (int64_t t = 0; t < tokens; ++t) {
      if (head.joins[static_cast<size_t>(t)] >= 0) continue;
      const int64_t group = head.groups.size();
      head.groups.add(keys + t * dim, values + t * dim, 1, frame);
      if (tracing_) head.members.push_back({number(t)});
      head.mapped.insert(head.mapped.end(), mapped + t * dim, mapped + (t + 1) * dim);
      // A group of one shows the very bits of its key.
      write_token(shown[group / kPageTokens], options_.dtype, dim, group % kPageTokens,
                  plain + t * dim, values + t * dim, 0,
                  oldest[t / kPageTokens].buckets[t % kPageTokens]);
    }
    append_to_index(head);
  }

  // Whether the group's key stays within max_error of all its members.
  bool may_join(const Head& head, const float* key, int64_t group) const {
    if (merge_.max_error == 0) return true;
    const int64_t dim = options_.head_dim;
    const float distance = std::sqrt(square_distance(key, head.groups.key(group), dim));
    const double radius = head.groups.radius_with(group, distance);
    return double{longest_query_} * radius <=
           merge_.max_error * std::sqrt(static_cast<double>(dim));
  }

  // head.joins: for each key of the frame the group that it joins, or -1: one to one, nearest pairs
  // first.
  void match(Head& head, const float* keys, const float* mapped) const {
    const int64_t dim = options_.head_dim;
    head.matches.clear();
    const int64_t tokens = most_square_ > 0 ? options_.tokens_per_frame : 0;
    head.candidates.resize(static_cast<size_t>(tokens * kCandidates));
    head.index->nearest_all(mapped, tokens, kCandidates, head.candidates.data());
    std::array<float, kCandidates> squares{};
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t* groups = head.candidates.data() + t * kCandidates;
      const int64_t found = std::find(groups, groups + kCandidates, -1) - groups;
      square_distances_at(head.mapped.data(), groups, found, dim, mapped + t * dim, squares.data());
      for (int64_t i = 0; i < found; ++i) {
        const float square = squares[static_cast<size_t>(i)];
        if (square < most_square_ && may_join(head, keys + t * dim, groups[i]))
          head.matches.emplace_back(square, static_cast<int32_t>(t), groups[i]);
      }
    }
    std::sort(head.matches.begin(), head.matches.end());
    head.joins.assign(static_cast<size_t>(options_.tokens_per_frame), -1);
    head.taken.assign(static_cast<size_t>(head.groups.size()), 0);
    for (const Match& m : head.matches) {
      char& taken = head.taken[static_cast<size_t>(m.group)];
      int32_t& join = head.joins[static_cast<size_t>(m.token())];
      if (join >= 0 || taken != 0) continue;
      join = m.group;
      taken = 1;
    }
  }

  // head.leaving of every head: the groups to forget, so that the frame's other keys fit.
  void choose_leaving() {
    for (Head& head : heads_) head.leaving.clear();
    if (merge_.budget_tokens == 0) return;
    if (merge_.shares == BudgetShares::kEven) {
      for (Head& head : heads_) {
        const int64_t over = head.groups.size() + head.num_new - capacity();
        if (over > 0) head.leaving = head.groups.stalest(over);
      }
      return;
    }
    // The order of KeyGroups::stalest over all heads.
    int64_t over = -capacity() * options_.num_heads;
    stale_.clear();
    for (size_t i = 0; i < heads_.size(); ++i) {
      const KeyGroups& groups = heads_[i].groups;
      over += groups.size() + heads_[i].num_new;
      for (int64_t group = 0; group < groups.size(); ++group)
        stale_.push_back({groups.newest(group), groups.count(group), static_cast<int32_t>(i),
                          static_cast<int32_t>(group)});
    }
    if (over <= 0) return;
    std::nth_element(stale_.begin(), stale_.begin() + over, stale_.end());
    for (int64_t i = 0; i < over; ++i) {
      const Stale& one = stale_[static_cast<size_t>(i)];
      heads_[static_cast<size_t>(one.head)].leaving.push_back(one.group);
    }
    for (Head& head : heads_) std::sort(head.leaving.rbegin(), head.leaving.rend());
  }

  // Removes head.leaving from everything that knows it.
  void forget(Head& head, KvPage* shown) const {
    for (const int64_t group : head.leaving) {
      const int64_t last = head.groups.size() - 1;
      head.groups.remove(group);
      if (tracing_) {
        head.members[static_cast<size_t>(group)].swap(head.members.back());
        head.members.pop_back();
      }
      head.index->remove(group);
      std::copy_n(head.mapped.end() - options_.head_dim, options_.head_dim,
                  head.mapped.begin() + group * options_.head_dim);
      head.mapped.resize(head.mapped.size() - static_cast<size_t>(options_.head_dim));
      move_last_token(shown[last / kPageTokens], shown[group / kPageTokens], options_.dtype,
                      options_.head_dim, group % kPageTokens);
    }
  }

  // Of token t of the frame that retires now, among all committed keys.
  int32_t number(int64_t t) const {
    return static_cast<int32_t>((num_sink_ + num_retired_) * options_.tokens_per_frame + t);
  }

  // Maps and indexes all groups anew, after the metric changed.
  void remap(Head& head) const {
    const int64_t dim = options_.head_dim;
    const int64_t count = head.groups.size();
    head.mapped.resize(static_cast<size_t>(count * dim));
    head.index->clear();
    if (count == 0) return;
    head.metric.map_all(head.groups.key(0), count, head.mapped.data());
    append_to_index(head);
  }

  // Groups that the index does not know yet: the last ones.
  void append_to_index(Head& head) const {
    const int64_t known = head.index->size();
    head.moved.resize(static_cast<size_t>(head.groups.size() - known));
    std::iota(head.moved.begin(), head.moved.end(), static_cast<int32_t>(known));
    head.index->set_all(head.moved.data(), head.mapped.data() + known * options_.head_dim,
                        head.groups.size() - known);
  }

  TempCacheOptions merge_;
  KeyAges ages_;
  int64_t pages_per_frame_;
  float most_square_ = 0;  // squared distance below which keys merge
  std::vector<Head> heads_;
  std::vector<int32_t> costs_;  // of a merge, by head
  std::vector<Stale> stale_;    // scratch: groups of all heads
  std::deque<int64_t> exact_;   // frames that are still exact, oldest first
  int64_t num_sink_ = 0;        // frames held for ever so far
  int64_t num_retired_ = 0;     // frames that have joined the groups
  MergeCounts counts_;
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
