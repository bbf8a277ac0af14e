#include "metrics/image.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdlib>

#include "base/error.h"

namespace longtake {
namespace {

constexpr int64_t kChannels = 3;
constexpr int64_t kWindow = 11;
constexpr double kPeak = 255;

std::array<double, kWindow> gaussian() {
  constexpr double kSigma = 1.5;
  std::array<double, kWindow> weights{};
  double sum = 0;
  for (int64_t i = 0; i < kWindow; ++i) {
    const auto x = static_cast<double>(i - kWindow / 2);
    weights[static_cast<size_t>(i)] = std::exp(-x * x / (2 * kSigma * kSigma));
    sum += weights[static_cast<size_t>(i)];
  }
  for (double& weight : weights) weight /= sum;
  return weights;
}

// Windows inside the picture only: [H, W] -> [H - 10, W - 10].
std::vector<double> blurred(const std::vector<double>& in, int64_t width, int64_t height) {
  static const std::array<double, kWindow> weights = gaussian();
  const int64_t columns = width - kWindow + 1;
  const int64_t rows = height - kWindow + 1;
  std::vector<double> across(static_cast<size_t>(height * columns), 0.0);
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t i = 0; i < kWindow; ++i) {
      const double weight = weights[static_cast<size_t>(i)];
      const double* row = in.data() + y * width + i;
      double* to = across.data() + y * columns;
      for (int64_t x = 0; x < columns; ++x) to[x] += weight * row[x];
    }
  }
  std::vector<double> out(static_cast<size_t>(rows * columns), 0.0);
  for (int64_t y = 0; y < rows; ++y) {
    for (int64_t i = 0; i < kWindow; ++i) {
      const double weight = weights[static_cast<size_t>(i)];
      const double* row = across.data() + (y + i) * columns;
      double* to = out.data() + y * columns;
      for (int64_t x = 0; x < columns; ++x) to[x] += weight * row[x];
    }
  }
  return out;
}

template <typename T>
double relative_distance(std::span<const T> a, std::span<const T> b) {
  LONGTAKE_CHECK(a.size() == b.size());
  double difference = 0, norm = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double d = double{a[i]} - double{b[i]};
    difference += d * d;
    norm += double{b[i]} * double{b[i]};
  }
  return difference == 0 ? 0 : std::sqrt(difference / norm);
}

}  // namespace

double psnr(Pixels a, Pixels b, std::span<const uint8_t> mask) {
  LONGTAKE_CHECK(a.size() == b.size() && !a.empty());
  LONGTAKE_CHECK(mask.empty() || mask.size() * kChannels == a.size());
  int64_t sum = 0, count = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!mask.empty() && mask[i / kChannels] == 0) continue;
    const int64_t difference = int64_t{a[i]} - int64_t{b[i]};
    sum += difference * difference;
    ++count;
  }
  LONGTAKE_CHECK(count > 0, "an empty mask");
  if (sum == 0) return kMostPsnr;
  const double mean = static_cast<double>(sum) / static_cast<double>(count);
  return std::min(kMostPsnr, 10 * std::log10(kPeak * kPeak / mean));
}

double ssim(Pixels a, Pixels b, int64_t width, int64_t height) {
  constexpr double kC1 = (0.01 * kPeak) * (0.01 * kPeak);
  constexpr double kC2 = (0.03 * kPeak) * (0.03 * kPeak);
  LONGTAKE_CHECK(width >= kWindow && height >= kWindow);
  const auto size = static_cast<size_t>(width * height);
  LONGTAKE_CHECK(a.size() == size * kChannels && b.size() == a.size());
  double sum = 0;
  size_t count = 0;
  std::vector<double> x(size), y(size), xx(size), yy(size), xy(size);
  for (size_t channel = 0; channel < kChannels; ++channel) {
    for (size_t i = 0; i < size; ++i) {
      x[i] = a[i * kChannels + channel];
      y[i] = b[i * kChannels + channel];
      xx[i] = x[i] * x[i];
      yy[i] = y[i] * y[i];
      xy[i] = x[i] * y[i];
    }
    const auto mx = blurred(x, width, height), my = blurred(y, width, height);
    const auto mxx = blurred(xx, width, height), myy = blurred(yy, width, height);
    const auto mxy = blurred(xy, width, height);
    for (size_t i = 0; i < mx.size(); ++i) {
      const double vx = mxx[i] - mx[i] * mx[i];
      const double vy = myy[i] - my[i] * my[i];
      const double cov = mxy[i] - mx[i] * my[i];
      sum += (2 * mx[i] * my[i] + kC1) * (2 * cov + kC2) /
             ((mx[i] * mx[i] + my[i] * my[i] + kC1) * (vx + vy + kC2));
    }
    count += mx.size();
  }
  return sum / static_cast<double>(count);
}

double relative_l2(std::span<const float> a, std::span<const float> b) {
  return relative_distance(a, b);
}

double relative_l2(std::span<const double> a, std::span<const double> b) {
  return relative_distance(a, b);
}

double gradient(Pixels picture, int64_t width, int64_t height) {
  LONGTAKE_CHECK(static_cast<int64_t>(picture.size()) == width * height * kChannels);
  const auto at = [&](int64_t y, int64_t x, int64_t c) {
    return int{picture[static_cast<size_t>((y * width + x) * kChannels + c)]};
  };
  int64_t across = 0, down = 0;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t c = 0; c < kChannels; ++c) {
        if (x + 1 < width) across += std::abs(at(y, x + 1, c) - at(y, x, c));
        if (y + 1 < height) down += std::abs(at(y + 1, x, c) - at(y, x, c));
      }
    }
  }
  const auto mean = [](int64_t sum, int64_t rows, int64_t columns) {
    return static_cast<double>(sum) /
           static_cast<double>(std::max<int64_t>(1, rows * columns * kChannels));
  };
  return mean(across, height, width - 1) + mean(down, height - 1, width);
}

}  // namespace longtake
