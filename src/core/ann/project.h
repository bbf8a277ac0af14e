// The one product that the index and the merge metric need: rows of vectors through a small matrix.
#pragma once

#include <cstdint>

namespace longtake {

// out [rows, outputs] = x [rows, dim] m [dim, outputs], f32; out must not overlap the others.
void project(const float* x, int64_t rows, int64_t dim, const float* m, int64_t outputs,
             float* out);

// out [rows]: bit e is set where that product's column e, of at most 64, is above 0.
void project_signs(const float* x, int64_t rows, int64_t dim, const float* m, int64_t outputs,
                   uint64_t* out);

// out [rows] = x [rows, dim] v [dim].
void dots(const float* x, int64_t rows, int64_t dim, const float* v, float* out);

// mass [count] += softmax of logits [count], which are overwritten.
void add_softmax(float* logits, int64_t count, float* mass);

// out [count] = squared Euclidean distances of rows rows[i] of x [any rows, dim] and v [dim].
void square_distances_at(const float* x, const int32_t* rows, int64_t count, int64_t dim,
                         const float* v, float* out);

// x [dim] goes the share `way` of its way to `to` [dim]; 1: it is there exactly. Returns the
// squared distance that they had.
float approach(float* x, const float* to, float way, int64_t dim);

// Rows rows[i] of x [any rows, dim], of which -1 is none, will be read soon.
inline void prefetch_rows(const float* x, const int32_t* rows, int64_t count, int64_t dim) {
  constexpr int64_t kLine = 16;  // floats
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t d = 0; rows[i] >= 0 && d < dim; d += kLine)
      __builtin_prefetch(x + rows[i] * dim + d);
  }
}

// Squared Euclidean distance of a [dim] and b [dim].
float square_distance(const float* a, const float* b, int64_t dim);

}  // namespace longtake
