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

// x [count] = exp(x) and log(x), in place.
void exp_all(float* x, int64_t count);
void log_all(float* x, int64_t count);

// Squared Euclidean distance of a [dim] and b [dim].
float square_distance(const float* a, const float* b, int64_t dim);

}  // namespace longtake
