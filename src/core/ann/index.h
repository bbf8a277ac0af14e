// AnnIndex: an approximate nearest-neighbour index over the vectors of one head. Two engines: signs
// of random projections (lsh.h) and few-bit integers (quant.h).
//
// Vectors live in slots 0 .. size() - 1 that the caller numbers as it numbers what they stand for.
// A slot can be rewritten and removed at any time, each in time independent of size(): nothing is
// ever rebuilt. What an index answers depends on its vectors alone, never on the order in which
// they came, so that a saved and refilled index answers alike.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

namespace longtake {

enum class AnnEngine : uint8_t { kLsh, kQuant };

class AnnIndex {
 public:
  static constexpr float kAnyDistance = std::numeric_limits<float>::infinity();

  virtual ~AnnIndex() = default;

  virtual int64_t size() const = 0;

  // Writes vector [dim] to a slot; slot == size() appends.
  virtual void set(int64_t slot, const float* vector) = 0;

  // The same for many: slots [count], vectors [count, dim].
  virtual void set_all(const int32_t* slots, const float* vectors, int64_t count) = 0;

  // Removes a slot; the last slot's vector takes its number.
  virtual void remove(int64_t slot) = 0;

  virtual void clear() = 0;

  // The `most` slots that look nearest to query [dim], nearest first, ties by slot. Looks can
  // deceive: check the candidates exactly. May find fewer.
  virtual void nearest(const float* query, int64_t most, std::vector<int32_t>& out) = 0;

  // The same for many: queries [count, dim] -> out [count, most], -1 behind what is found. Of slots
  // that are farther than the squared distance `within` the caller wants none: an engine that can
  // tell may leave them out.
  virtual void nearest_all(const float* queries, int64_t count, int64_t most, float within,
                           int32_t* out) = 0;

  // All slots of the query's neighbourhood, ascending: of its probed buckets (lsh), or within a
  // distance (quant).
  virtual void bucket(const float* query, std::vector<int32_t>& out) = 0;
};

// An index with the engine's default options.
std::unique_ptr<AnnIndex> make_ann_index(AnnEngine engine, int64_t dim, uint64_t seed);

}  // namespace longtake
