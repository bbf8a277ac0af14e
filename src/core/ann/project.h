// The one product that the index and the merge metric need: rows of vectors through a small matrix.
#pragma once

#include <cstdint>

namespace longtake {

// out [rows, outputs] = x [rows, dim] m [dim, outputs], f32; out must not overlap the others.
void project(const float* x, int64_t rows, int64_t dim, const float* m, int64_t outputs,
             float* out);

// out [rows] = x [rows, dim] v [dim].
void dots(const float* x, int64_t rows, int64_t dim, const float* v, float* out);

// mass [count] += softmax of logits [count], which are overwritten.
void add_softmax(float* logits, int64_t count, float* mass);

// Squared Euclidean distance of a [dim] and b [dim].
float square_distance(const float* a, const float* b, int64_t dim);

}  // namespace longtake
