// What the temporal rotation does to a merged key. Its members were seen at other times than the
// one at which the key is shown, and a query gives each of them the logit of its own age.
#pragma once

#include <cstdint>
#include <vector>

#include "kv/tempcache_groups.h"

namespace longtake {

// Of every age and pair the cosine and the sine of the turn: phases [num_ages, 2 pairs], cosines
// first. Greater ages count as the greatest.
struct AgeTable {
  const float* phases;
  int64_t pairs;
  int64_t num_ages;
};

// KeyAges::biases, of a query over sqrt(D) whose pairs are split, [2, pairs]. rows: scratch
// [2, groups, kMostSightings].
void age_biases(const AgeTable& table, const KeyGroups& groups, const float* query, int64_t now,
                float* rows, float* biases);

// Pairs i < pairs of a head turn by frame * theta^(-i / pairs).
class KeyAges {
 public:
  KeyAges(int64_t head_dim, int64_t pairs, double theta);

  // Ages 0 .. most can be told apart from now on; greater ones count as the greatest.
  void reach(int64_t most);

  // For every group the bias that gives its key the mass of its members, as if each had the
  // group's key at its own age:
  //
  //   log sum_i exp(l(now - frame_i)) - l(now - newest), l(age) the logit of `query`
  //
  // query [D] asks at frame `now` and is without its temporal rotation. 0 for one member. biases
  // [groups]; scratch grows as it must.
  void biases(const KeyGroups& groups, const float* query, int64_t now, float* biases,
              std::vector<float>& scratch) const;

  struct Range {
    double low, high;
  };

  // The least and the greatest log sum_i exp(q . k_i / sqrt(D)) over a group's members for such a
  // query, whatever their keys within radius(group).
  Range log_mass(const KeyGroups& groups, int64_t group, const float* query, int64_t now) const;

 private:
  int64_t age(int64_t now, int64_t frame) const;

  int64_t head_dim_;
  int64_t pairs_;
  std::vector<double> speeds_;  // [pairs], radians a frame
  std::vector<float> phases_;   // of AgeTable
  int64_t num_ages_ = 0;
};

}  // namespace longtake
