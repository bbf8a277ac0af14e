// One head of `tempcache`: which keys are the same thing seen again. It knows groups and the index
// that finds them, not the pages in which attention sees them.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <memory>
#include <span>
#include <vector>

#include "ann/index.h"
#include "kv/tempcache.h"
#include "kv/tempcache_groups.h"
#include "kv/tempcache_metric.h"

namespace longtake {

inline constexpr int64_t kMostHeadDim = 256;

// The groups of one head and how the keys of a frame find theirs: the index names a few candidates
// for each key, the metric measures them, and pairs below the threshold are taken from the nearest
// on, each key and each group once: two tokens of one frame are never the same thing.
//
// Keys and values here are f32 [tokens, D] without the temporal rotation, all of one frame.
class HeadGroups {
 public:
  // options: with what its rule implies, see resolve_rule().
  HeadGroups(int64_t head_dim, const TempCacheOptions& options);
  HeadGroups(HeadGroups&&) noexcept;
  ~HeadGroups();

  const KeyGroups& groups() const { return groups_; }

  int64_t size() const { return groups_.size(); }

  // queries [count, D] of a clean chunk, without the temporal rotation: the metric measures by
  // them.
  void observe(const float* queries, int64_t count) { metric_.observe(queries, count); }

  // The metric becomes that of the queries so far, centred on keys [count, D]; the index follows.
  void refresh_metric(const float* keys, int64_t count);

  // The keys of frame `frame` choose their groups, and those that found one join it. longest_query:
  // the norm that max_error is about. first_key: number of the first key among all committed, for
  // members(). mapped, scratch [count, D]; add_new() reads mapped.
  void join(const float* keys, const float* values, int64_t count, int64_t frame,
            float longest_query, int64_t first_key, float* mapped, float* scratch);

  // For each key of the frame the group that it joined; -1: none.
  std::span<const int32_t> joins() const { return joins_; }

  int64_t num_new() const { return num_new_; }  // keys that joined no group

  // Those start groups of their own, numbered on in the order of their keys.
  void add_new(const float* keys, const float* values, const float* mapped, int64_t frame,
               int64_t first_key);

  // Removes a group; the last one takes its number.
  void remove(int64_t group);

  void clear();

  // From now on members() tells which committed keys each group stands for.
  void trace() { tracing_ = true; }

  std::span<const std::vector<int32_t>> members() const { return members_; }

  void write(std::ostream& out) const;
  // False: the stream is short or holds nonsense.
  bool read(std::istream& in, int64_t most);

 private:
  // The key of the frame that a group has taken so far, and its distance; -1: none.
  struct Owner {
    float square;
    int32_t token;

    bool operator<(const Owner& other) const {
      return square != other.square ? square < other.square : token < other.token;
    }
  };

  void match(const float* keys, const float* mapped, int64_t count, float longest_query);
  bool may_join(const float* key, int64_t group, float longest_query) const;
  void remap();
  void append_to_index();

  int64_t head_dim_;
  TempCacheOptions options_;
  float most_square_;  // squared distance below which keys merge
  KeyGroups groups_;
  KeyMetric metric_;
  std::unique_ptr<AnnIndex> index_;
  std::vector<float> mapped_;  // [groups, D]: keys as the metric sees them
  bool tracing_ = false;
  std::vector<std::vector<int32_t>> members_;  // of every group, while they are traced
  // Of the frame in work.
  std::vector<int32_t> candidates_;  // [tokens, most of them]
  std::vector<float> squares_;       // their distances
  std::vector<Owner> owners_;        // [groups]
  std::vector<int32_t> joins_, moved_;
  int64_t num_new_ = 0;
};

// The options with what a rule implies.
TempCacheOptions resolve_rule(TempCacheOptions options);

// Squared distance below which keys merge.
float most_square_of(const TempCacheOptions& options);

}  // namespace longtake
