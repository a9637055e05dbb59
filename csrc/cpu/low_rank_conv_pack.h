// The factors of a low-rank convolution as the kernel reads them.
#pragma once

#include <cstdint>

#include "../low_rank_conv.h"
#include "low_rank_conv_kernel.h"
#include "scratch.h"

namespace smoothk::cpu {

inline int64_t padded(int64_t columns) { return ceil_div(columns, kPanel) * kPanel; }

// One of the two weights as a matrix.
struct Factor {
  int64_t columns, taps, channels;
  int64_t depth() const { return taps * channels; }
  // The last columns, where they are few, are there once more, one after the other.
  int64_t dots() const { return channels % kPanel == 0 && columns % kPanel <= kMostDots ? columns % kPanel : 0; }
  int64_t size() const { return (padded(columns) + dots()) * depth(); }
};

inline Factor first_factor(const LowRankConvShape& s) {
  return {s.rank, s.kernel_h * (s.spatial ? 1 : s.kernel_w), s.in_channels};
}

inline Factor second_factor(const LowRankConvShape& s) { return {s.out_channels, s.spatial ? s.kernel_w : 1, s.rank}; }

}  // namespace smoothk::cpu
