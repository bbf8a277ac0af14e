// The one product that the index and the merge metric need: rows of vectors through a small matrix.
#pragma once

#include <cstdint>

namespace longtake {

// out [rows, outputs] = x [rows, dim] m [dim, outputs], f32; out must not overlap the others.
void project(const float* x, int64_t rows, int64_t dim, const float* m, int64_t outputs,
             float* out);

// out [rows] = x [rows, dim] v [dim].
void dots(const float* x, int64_t rows, int64_t dim, const float* v, float* out);

// out [count] = x[rows[i]] . v, x [any rows, dim].
void dots_at(const float* x, const int32_t* rows, int64_t count, int64_t dim, const float* v,
             float* out);

// mass [count] += softmax of logits [count], which are overwritten.
void add_softmax(float* logits, int64_t count, float* mass);

// terms [2 pairs]: with query (q0, q1) and key (k0, k1) of a pair, q0 k0 + q1 k1 and, `pairs`
// behind it, q0 k1 - q1 k0: what cosine and sine of a turn of the key weigh in their dot product.
// query [2, pairs]: all q0, then all q1; key [2 pairs], side by side.
void turn_terms(const float* query, const float* key, int64_t pairs, float* terms);

// x [count] = exp(x) and log(x), in place.
void exp_all(float* x, int64_t count);
void log_all(float* x, int64_t count);

// out [count] = squared Euclidean distances of rows rows[i] of x [any rows, dim] and v [dim].
void square_distances_at(const float* x, const int32_t* rows, int64_t count, int64_t dim,
                         const float* v, float* out);

// Squared Euclidean distance of a [dim] and b [dim].
float square_distance(const float* a, const float* b, int64_t dim);

}  // namespace longtake
