// Locality-sensitive hashing by signs of random projections (Charikar 2002): a bit differs with
// probability angle / pi. `tables` groups of `bits` signs each name a bucket; a query looks into
// the buckets within Hamming distance `radius` of its own, the nearer ones first and the others
// only if those hold too little, and ranks what it finds by all its signs.
//
// One table of one probe misses most true neighbours: at a cosine of .95 twelve signs all agree
// with probability .28. Four tables with one sign allowed to differ find .99 of them.
#pragma once

#include "ann/index.h"

namespace longtake {

struct LshOptions {
  int bits = 12;   // signs per table, 1..20
  int tables = 4;  // bits * tables <= 64: the signature is one word
  int radius = 1;  // signs of a table that may differ, 0..bits
  uint64_t seed = 0;
};

// Codes for vectors: the signs of `bits * tables` projections, table t in bits [t * bits, ...).
class LshCoder {
 public:
  // Throws Error(kUsage) for options out of range.
  LshCoder(int64_t dim, const LshOptions& options);

  uint64_t code(const float* vector) const;

  // vectors [L, dim] -> codes [L].
  void codes(const float* vectors, int64_t count, uint64_t* out) const;

  const LshOptions& options() const { return options_; }

  // Of a code, the bucket in one table.
  uint32_t bucket_of(uint64_t code, int table) const;

 private:
  int64_t dim_;
  LshOptions options_;
  std::vector<float>
      directions_;  // [dim, bits * tables]: a row per channel, so that loops are long
};

class LshIndex final : public AnnIndex {
 public:
  LshIndex(int64_t dim, const LshOptions& options);

  int64_t size() const override { return static_cast<int64_t>(codes_.size()); }

  void set(int64_t slot, const float* vector) override;
  void remove(int64_t slot) override;
  void clear() override;
  void nearest(const float* query, int64_t most, std::vector<int32_t>& out) override;
  void bucket(const float* query, std::vector<int32_t>& out) override;

 private:
  // Buckets are linked lists through the slots, so that a slot enters and leaves without a search.
  struct Link {
    int32_t previous = -1;
    int32_t next = -1;
  };

  Link& link(int32_t slot, int table);
  void enter(int32_t slot, uint64_t code);
  void leave(int32_t slot);
  // Fills found_ with the slots of the probed buckets, each once, in no order: ring after ring of
  // sign patterns that differ in one sign more, until `enough` are found.
  void probe(uint64_t code, size_t enough);

  LshCoder coder_;
  std::vector<std::vector<uint32_t>> rings_;  // by number of signs: the patterns to flip
  std::vector<int32_t> first_;                // [tables, 2^bits]: a bucket's first slot or -1
  std::vector<Link> links_;                   // [slots, tables]
  std::vector<uint64_t> codes_;               // [slots]
  std::vector<uint32_t> seen_;                // [slots]: the latest probe that met it
  uint32_t num_probes_ = 0;
  std::vector<int32_t> found_;
  std::vector<uint64_t> ranked_;
};

}  // namespace longtake
