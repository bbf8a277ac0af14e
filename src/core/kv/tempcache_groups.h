// The groups of merged keys of one head: what `tempcache` knows of them beside their pages.
#pragma once

#include <array>
#include <cstdint>
#include <iosfwd>
#include <span>
#include <vector>

#include "kv/tempcache.h"

namespace longtake {

// Frames in a row at which members of a group were seen.
struct Sighting {
  int32_t first = 0, last = 0;
  int32_t count = 0;  // members; 0: unused

  int32_t middle() const { return first + (last - first) / 2; }
};

// Of a group, oldest first. The newest frames stand alone; older ones share a sighting, in spans
// that grow with their age: the rotation that tells them apart turns by little of it.
inline constexpr size_t kMostSightings = 8;

// m keys that one key stands for. Counts add and means are weighted by them, in f32, so that the
// result does not depend on the order of merges but for rounding.
class KeyGroups {
 public:
  KeyGroups(int64_t head_dim, GroupKey key) : head_dim_(head_dim), key_(key) {}

  int64_t size() const { return static_cast<int64_t>(counts_.size()); }

  const float* key(int64_t group) const { return keys_.data() + group * head_dim_; }

  const float* value(int64_t group) const { return values_.data() + group * head_dim_; }

  int64_t count(int64_t group) const { return counts_[static_cast<size_t>(group)]; }

  // Frame of the newest member, which is also when it last merged.
  int64_t newest(int64_t group) const { return newest_[static_cast<size_t>(group)]; }

  // No member's key is farther from key(group): Euclidean distance, without the temporal rotation.
  float radius(int64_t group) const { return radii_[static_cast<size_t>(group)]; }

  // What radius(group) would be after merge() with one key that far from key(group).
  float radius_with(int64_t group, float distance) const;

  // When the members were seen; the counts add up to count(group).
  std::span<const Sighting> sightings(int64_t group) const;

  // A new group at the end. key, value [D]: means of its members, or of the only one.
  void add(const float* key, const float* value, int64_t count, int64_t newest);

  // Members join a group. With GroupKey::kNewest the newer key wins, the joining one on a tie.
  // radius: no joining member's key is farther from `key`.
  void merge(int64_t group, const float* key, const float* value, int64_t count, int64_t newest,
             float radius = 0);

  // merge() will come for this group soon; -1: for none.
  void prefetch(int32_t group) const;

  // Removes a group; the last one takes its number.
  void remove(int64_t group);
  void clear();

  // The `count` groups to forget first, in descending order of number: least recently merged, of
  // those the smallest, of those the first.
  std::vector<int64_t> stalest(int64_t count) const;

  void write(std::ostream& out) const;
  // False: the stream is short or holds nonsense.
  bool read(std::istream& in, int64_t most);

 private:
  using Sightings = std::array<Sighting, kMostSightings>;

  static void see(Sightings& seen, int64_t frame, int64_t count);

  int64_t head_dim_;
  GroupKey key_;
  std::vector<float> keys_;    // [groups, D], without the temporal rotation
  std::vector<float> values_;  // [groups, D]
  std::vector<int64_t> counts_;
  std::vector<int64_t> newest_;
  std::vector<float> radii_;
  std::vector<Sightings> seen_;
};

}  // namespace longtake
