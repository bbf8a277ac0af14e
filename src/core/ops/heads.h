// From one matrix product to the inputs of attention: queries, keys and values.
#pragma once

#include <cstdint>
#include <span>

#include "device/context.h"
#include "tensor/tensor.h"

namespace longtake {

inline constexpr size_t kMaxHeadParts = 3;

// What becomes of one part of the product's columns, in this order.
struct HeadPart {
  View norm;             // [N D] f32: rms_norm over all heads with this weight; empty: none
  bool rotates = false;  // rope (ops/rope.h)
  View out;              // [L, N, D] f32 | bf16, rounded once; empty: nobody wants this part
};

// x [L, P N D] f32: P parts of all heads each. cos, sin [L, D/2] f32; unused when nothing rotates.
// The outputs have one shape and dtype.
void split_heads(Context& ctx, View x, std::span<const HeadPart> parts, View cos, View sin,
                 float eps);

// Throws Error unless split_heads can make the parts of [rows, columns]. False: nobody wants any.
bool expect_heads(int64_t rows, int64_t columns, std::span<const HeadPart> parts, View cos,
                  View sin);

namespace cpu {
extern decltype(longtake::split_heads) split_heads;
}

namespace cuda {
extern decltype(longtake::split_heads) split_heads;
}

}  // namespace longtake
