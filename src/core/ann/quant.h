// Nearest neighbours in a few bits: a vector is kept as integers of `bits` bits under one scale of
// its own, and a query meets all of them. The scan is integer arithmetic; at 8 bits its order
// hardly differs from the exact one.
//
// A query first meets the few channels in which the vectors differ most, side by side in blocks:
// what is too far in those is too far. How far that is sinks with what is found.
#pragma once

#include "ann/index.h"

namespace longtake {

struct QuantOptions {
  int bits = 8;         // 2..8, sign included; one byte is stored in any case
  float radius = 0.5F;  // of bucket(): Euclidean distance, measured in the integers
};

class QuantIndex final : public AnnIndex {
 public:
  // Throws Error(kUsage) for options out of range.
  QuantIndex(int64_t dim, const QuantOptions& options);

  int64_t size() const override { return static_cast<int64_t>(scales_.size()); }

  void set(int64_t slot, const float* vector) override;
  void set_all(const int32_t* slots, const float* vectors, int64_t count) override;
  void remove(int64_t slot) override;
  void clear() override;
  void nearest(const float* query, int64_t most, std::vector<int32_t>& out) override;
  void nearest_all(const float* queries, int64_t count, int64_t most, float within,
                   int32_t* out) override;
  void bucket(const float* query, std::vector<int32_t>& out) override;

  // vector ~ scale * code: writes code [dim] and returns the scale.
  float quantise(const float* vector, int8_t* code) const;

 private:
  // A query as integers.
  struct Query {
    float scale = 0;
    float square = 0, coarse_square = 0;  // of scale * code, all channels and the coarse ones
  };

  Query quantise_query(const float* query);
  template <typename Found>
  void scan(const Query& query, float within, const Found& found);
  void write_coarse(int64_t slot);
  void take_coarse(const int8_t* code, int8_t* out) const;
  void choose_coarse();

  int64_t dim_;
  int64_t coarse_;  // channels, whole quads
  QuantOptions options_;
  std::vector<int8_t> codes_;     // [slots, dim]
  std::vector<float> scales_;     // [slots]
  std::vector<float> squares_;    // [slots]: |scale * code|^2
  std::vector<int32_t> offsets_;  // [slots]: what a raised query adds to its dot products
  // Blocks of slots, the last one filled up: a few channels of each.
  std::vector<int32_t> channels_;        // [coarse]
  int64_t next_choice_ = 0;              // slots at which they are chosen anew
  std::vector<int8_t> coarse_codes_;     // [blocks, quads, slots of a block, 4]
  std::vector<float> coarse_squares_;    // [slots in blocks], inf where there is none
  std::vector<int32_t> coarse_offsets_;  // the same
  std::vector<float> coarse_scales_;     // the same
  float most_scale_ = 0;                 // of any slot so far
  // The query in work, [dim + coarse]: its integers, their sizes, and raised to be unsigned.
  std::vector<int8_t> query_;
  std::vector<uint8_t> sizes_, raised_;
  std::vector<int32_t> near_, dots_;
};

}  // namespace longtake
