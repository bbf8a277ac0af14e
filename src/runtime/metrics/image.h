// How far two pictures are apart. Pictures are rgb [H, W, 3] u8 of equal size.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace longtake {

using Pixels = std::span<const uint8_t>;

inline constexpr double kMostPsnr = 99;  // what equal pictures are said to have

// 10 log10(255^2 / mean squared error), dB; at most kMostPsnr. With a mask [H, W], over pixels
// where it is not 0.
double psnr(Pixels a, Pixels b, std::span<const uint8_t> mask = {});

// Structural similarity (Wang et al. 2004): Gaussian window of 11 x 11, sigma 1.5, K1 .01, K2 .03,
// mean over the windows that lie inside the picture and over channels. width and height >= 11.
double ssim(Pixels a, Pixels b, int64_t width, int64_t height);

// |a - b| / |b|.
double relative_l2(std::span<const float> a, std::span<const float> b);
double relative_l2(std::span<const double> a, std::span<const double> b);

// Mean absolute difference of neighbouring pixels, both directions: sharpness, to be divided by the
// truth's.
double gradient(Pixels picture, int64_t width, int64_t height);

}  // namespace longtake
