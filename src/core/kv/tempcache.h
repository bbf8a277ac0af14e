// Options of the policy `tempcache`; tempcache.cpp says what it does.
#pragma once

#include <cstdint>

#include "ann/index.h"

namespace longtake {

// When two keys count as the same thing seen twice.
enum class MergeRule : uint8_t {
  kNats,   // expected error of a logit, in nats, on keys without their temporal rotation
  kPaper,  // cosine of the keys as they are; implies GroupKey::kNewest and GroupBias::kLogCount
};

// The key that stands for a group.
enum class GroupKey : uint8_t { kMean, kNewest };

// What is added to its logit.
enum class GroupBias : uint8_t {
  kNone,
  kLogCount,  // log m: right if all m members have the same logit
  kAges       // what the members add up to at the ages at which they were seen, for the mean query
};

// Whose groups a budget counts.
enum class BudgetShares : uint8_t {
  kEven,  // every head's for itself
  kNeed   // those of all heads of a layer together, num_heads times the budget
};

struct TempCacheOptions {
  int64_t exact_frames = 4;      // the newest frames, which never merge
  double merge_threshold = 0.5;  // merge below so many nats (kPaper: above this cosine)
  // Instead of the threshold, if not 0: most nats by which the key of a group may be off for any
  // member and any query as long as those seen so far, temporal rotation apart.
  double max_error = 0;
  int64_t budget_tokens = 0;  // most keys per head, exact ones included; 0: no limit
  BudgetShares shares = BudgetShares::kEven;
  AnnEngine ann = AnnEngine::kLsh;
  MergeRule rule = MergeRule::kNats;
  GroupKey key = GroupKey::kMean;
  GroupBias bias = GroupBias::kAges;
  // The temporal rotation: pair i < time_pairs of a head turns by frame * time_theta^(-i /
  // time_pairs).
  int64_t time_pairs = 0;
  double time_theta = 10000;
  uint64_t seed = 0;  // of the random projections
};

inline constexpr double kPaperThreshold = 0.9;

}  // namespace longtake
