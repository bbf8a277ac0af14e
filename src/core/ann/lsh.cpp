#include "ann/lsh.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "ann/project.h"
#include "base/error.h"
#include "base/philox.h"

namespace longtake {

LshCoder::LshCoder(int64_t dim, const LshOptions& options) : dim_(dim), options_(options) {
  const auto expect = [](const char* what, int value, int least, int most) {
    if (value < least || value > most)
      throw Error(ErrorKind::kUsage,
                  str("lsh ", what, ": expected ", least, "..", most, ", found ", value));
  };
  expect("bits", options.bits, 1, 20);
  expect("tables", options.tables, 1, 64 / options.bits);
  expect("radius", options.radius, 0, options.bits);
  directions_.resize(static_cast<size_t>(dim * options.bits * options.tables));
  fill_normal(options.seed, 0, 0, directions_.data(), static_cast<int64_t>(directions_.size()));
}

uint64_t LshCoder::code(const float* vector) const {
  const int count = options_.bits * options_.tables;
  float dots[64];
  project(vector, 1, dim_, directions_.data(), count, dots);
  uint64_t out = 0;
  for (int i = 0; i < count; ++i) out |= uint64_t{dots[i] > 0} << i;
  return out;
}

void LshCoder::codes(const float* vectors, int64_t count, uint64_t* out) const {
  for (int64_t i = 0; i < count; ++i) out[i] = code(vectors + i * dim_);
}

uint32_t LshCoder::bucket_of(uint64_t code, int table) const {
  return static_cast<uint32_t>(code >> (table * options_.bits)) & ((1U << options_.bits) - 1U);
}

LshIndex::LshIndex(int64_t dim, const LshOptions& options) : coder_(dim, options) {
  const uint32_t buckets = 1U << options.bits;
  rings_.resize(static_cast<size_t>(options.radius) + 1);
  for (uint32_t pattern = 0; pattern < buckets; ++pattern) {
    const auto signs = static_cast<size_t>(std::popcount(pattern));
    if (signs < rings_.size()) rings_[signs].push_back(pattern);
  }
  first_.assign(static_cast<size_t>(options.tables) * buckets, -1);
}

LshIndex::Link& LshIndex::link(int32_t slot, int table) {
  return links_[static_cast<size_t>(slot) * static_cast<size_t>(coder_.options().tables) +
                static_cast<size_t>(table)];
}

void LshIndex::enter(int32_t slot, uint64_t code) {
  codes_[static_cast<size_t>(slot)] = code;
  for (int table = 0; table < coder_.options().tables; ++table) {
    int32_t& first = first_[(static_cast<size_t>(table) << coder_.options().bits) +
                            coder_.bucket_of(code, table)];
    link(slot, table) = {-1, first};
    if (first >= 0) link(first, table).previous = slot;
    first = slot;
  }
}

void LshIndex::leave(int32_t slot) {
  const uint64_t code = codes_[static_cast<size_t>(slot)];
  for (int table = 0; table < coder_.options().tables; ++table) {
    const Link at = link(slot, table);
    if (at.next >= 0) link(at.next, table).previous = at.previous;
    if (at.previous >= 0)
      link(at.previous, table).next = at.next;
    else
      first_[(static_cast<size_t>(table) << coder_.options().bits) +
             coder_.bucket_of(code, table)] = at.next;
  }
}

void LshIndex::set(int64_t slot, const float* vector) {
  LONGTAKE_CHECK(slot >= 0 && slot <= size(), slot);
  if (slot == size()) {
    codes_.push_back(0);
    seen_.push_back(num_probes_);
    links_.resize(links_.size() + static_cast<size_t>(coder_.options().tables));
  } else {
    leave(static_cast<int32_t>(slot));
  }
  enter(static_cast<int32_t>(slot), coder_.code(vector));
}

void LshIndex::remove(int64_t slot) {
  LONGTAKE_CHECK(slot >= 0 && slot < size(), slot);
  const auto last = static_cast<int32_t>(size() - 1);
  leave(static_cast<int32_t>(slot));
  if (slot != last) {
    leave(last);
    enter(static_cast<int32_t>(slot), codes_.back());
  }
  codes_.pop_back();
  seen_.pop_back();
  links_.resize(links_.size() - static_cast<size_t>(coder_.options().tables));
}

void LshIndex::clear() {
  std::fill(first_.begin(), first_.end(), -1);
  links_.clear();
  codes_.clear();
  seen_.clear();
}

void LshIndex::probe(uint64_t code, size_t enough) {
  if (++num_probes_ == 0) {  // the counter came round: no slot may look as if met already
    std::fill(seen_.begin(), seen_.end(), 0U);
    num_probes_ = 1;
  }
  found_.clear();
  const int tables = coder_.options().tables;
  const int bits = coder_.options().bits;
  for (const std::vector<uint32_t>& ring : rings_) {
    if (found_.size() >= enough) return;
    for (int table = 0; table < tables; ++table) {
      const int32_t* first = first_.data() + (static_cast<size_t>(table) << bits);
      const uint32_t bucket = coder_.bucket_of(code, table);
      for (const uint32_t pattern : ring) {
        for (int32_t slot = first[bucket ^ pattern]; slot >= 0;
             slot = links_[static_cast<size_t>(slot * tables + table)].next) {
          uint32_t& seen = seen_[static_cast<size_t>(slot)];
          if (seen != num_probes_) found_.push_back(slot);
          seen = num_probes_;
        }
      }
    }
  }
}

void LshIndex::nearest(const float* query, int64_t most, std::vector<int32_t>& out) {
  const uint64_t code = coder_.code(query);
  probe(code, static_cast<size_t>(most));
  ranked_.clear();
  for (const int32_t slot : found_) {
    const auto distance =
        static_cast<uint64_t>(std::popcount(code ^ codes_[static_cast<size_t>(slot)]));
    ranked_.push_back(distance << 32 | static_cast<uint32_t>(slot));
  }
  const auto count = std::min(static_cast<size_t>(most), ranked_.size());
  std::partial_sort(ranked_.begin(), ranked_.begin() + static_cast<int64_t>(count), ranked_.end());
  out.clear();
  for (size_t i = 0; i < count; ++i) out.push_back(static_cast<int32_t>(ranked_[i] & 0xffffffffU));
}

void LshIndex::bucket(const float* query, std::vector<int32_t>& out) {
  probe(coder_.code(query), std::numeric_limits<size_t>::max());
  out.assign(found_.begin(), found_.end());
  std::sort(out.begin(), out.end());
}

}  // namespace longtake
