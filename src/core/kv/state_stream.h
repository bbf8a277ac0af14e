// How the state of a cache is written as bytes, on every device alike: what it is of, a few numbers
// of the policy, pages of kPageTokens keys of every head (page.h), and what else the policy knows.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <vector>

#include "kv/cache.h"
#include "kv/page.h"

namespace longtake {

void write_int(std::ostream& out, int64_t value);
int64_t read_int(std::istream& in);  // throws Error(kInput) at the stream's end

// policy: the policy's own numbers.
void write_state_header(std::ostream& out, const CacheOptions& options,
                        const std::vector<int64_t>& policy);
// Returns those. Throws Error(kInput) for the state of another cache.
std::vector<int64_t> read_state_header(std::istream& in, const CacheOptions& options);

void write_state_page(std::ostream& out, const KvPage& page, const CacheOptions& options);
// Throws Error(kInput) for what is no page.
void read_state_page(std::istream& in, KvPage& page, const CacheOptions& options);

}  // namespace longtake
