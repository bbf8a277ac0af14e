// The rotations of a chunk's tokens by frame, row and column, as Wan lays out its heads.
#pragma once

#include <cstdint>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

struct RopeGrid {
  int64_t rows = 0, columns = 0;            // tokens of a frame
  int64_t time_pairs = 0, space_pairs = 0;  // pairs of a head that turn with the frame; with the
                                            // row, then as many with the column
  double theta = 10000;
};

// cos, sin [L, time_pairs + 2 space_pairs] f32, L a multiple of rows * columns: token (f, y, x)
// turns its pairs i by (clock + f) theta^(-i / time_pairs), y theta^(-i / space_pairs) and
// x theta^(-i / space_pairs). clock [1] i64: the chunk's first frame. Angles in double.
void rope_grid(Context& ctx, View clock, const RopeGrid& grid, View cos, View sin);

namespace cpu {
extern decltype(longtake::rope_grid) rope_grid;
}

namespace cuda {
extern decltype(longtake::rope_grid) rope_grid;
}

}  // namespace longtake
