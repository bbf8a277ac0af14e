// Locality-sensitive hashing by signs of random projections (Charikar 2002): a bit differs with
// probability angle / pi. `tables` groups of `bits` signs each name a bucket, and a query's
// neighbourhood is what shares a bucket with it in some table, or differs in at most `radius` of
// its signs.
//
// One table of one probe misses most true neighbours: at a cosine of .95 twelve signs all agree
// with probability .28. Four tables with one sign allowed to differ find .99 of them.
//
// All signs of a vector are one word, and a head has thousands of vectors, not millions: a scan of
// all signatures costs less than the cache misses of as many hash tables, and nearest() ranks them
// all (sign_scan.h).
#pragma once

#include "ann/index.h"
#include "ann/sign_scan.h"

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
  LshIndex(int64_t dim, const LshOptions& options)
      : dim_(dim), coder_(dim, options), scan_(options.bits * options.tables) {}

  int64_t size() const override { return static_cast<int64_t>(codes_.size()); }

  void set(int64_t slot, const float* vector) override;
  void set_all(const int32_t* slots, const float* vectors, int64_t count) override;
  void remove(int64_t slot) override;
  void clear() override;
  void nearest(const float* query, int64_t most, std::vector<int32_t>& out) override;
  void nearest_all(const float* queries, int64_t count, int64_t most, float within,
                   int32_t* out) override;
  void bucket(const float* query, std::vector<int32_t>& out) override;

 private:
  void set_code(int64_t slot, uint64_t code);

  int64_t dim_;
  LshCoder coder_;
  std::vector<uint64_t> codes_;  // [slots]
  SignScan scan_;                // the same, as nearest() reads them
  std::vector<uint64_t> asked_;  // codes of the queries in work
};

}  // namespace longtake
