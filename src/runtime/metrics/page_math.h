// One query and the keys of a page (kv/page.h) in double precision, for instruments: over the page
// as it lies in memory, so that compilers see wide loops.
#pragma once

#include <cstdint>

#include "kv/page.h"

namespace longtake {

// out [num_keys] = q . k * scale + bias of the page's used slots; q [head_dim].
void page_logits(const float* q, const KvPage& page, DType dtype, int64_t head_dim, double scale,
                 double* out);

// out [head_dim] += sum of weights[slot] times the slot's value, of weights that are at least
// `least`.
void add_page_values(const double* weights, double least, const KvPage& page, DType dtype,
                     int64_t head_dim, double* out);

}  // namespace longtake
