// The vector loops of the low-rank convolution. Their source is compiled once per instruction set (simd.h).
#pragma once

#include <cstdint>

#include "../types.h"

namespace smoothk::cpu {

constexpr int64_t kPanel = 16;    // columns that packed weights have side by side: [panel][depth][kPanel]
constexpr int64_t kMostDots = 8;  // columns that may be left over, and lie one after the other

// What becomes of a sum, in this order.
struct Epilogue {
  const float* bias;      // of a column, whole panels of them, or null
  const float* residual;  // laid out as the sums, or null
  bool relu;
};

// Pixels whose channels lie together: each is read as a scalar, for vectors of columns.
//
//   out[i][n] = sum over runs r and k < length of rows[r * row_pitch + i][from + k] * weights[r * length + k][n]
struct PixelProduct {
  const float* const* rows;
  int64_t row_pitch, from;
  int64_t pixels, runs, length;
  const float* panels;
  int64_t panel_pitch, columns;
  float* out;
  int64_t out_pitch;
  bool accumulate;  // the sum goes on from what out has
  bool padded;      // out has room for whole panels
  Epilogue epilogue;
};

// The same for a few columns, of which a panel would waste most: vectors go along the depth instead.
struct DotProduct {
  const float* const* rows;
  int64_t row_pitch, from;
  int64_t pixels, runs, length;  // a multiple of kPanel
  const float* weights;          // runs of the first column
  int64_t run_pitch, column_pitch, columns;
  float* out;
  int64_t out_pitch;
  bool accumulate;
};

// Channels whose pixels lie together: weights are read as scalars, for vectors of pixels.
//
//   out[n][i] = sum over taps t and c < channels of planes[c * plane_pitch + shifts[t] + i] * weights[t][c][n]
struct PlaneProduct {
  const float* planes;
  int64_t plane_pitch;
  const int64_t* shifts;
  int64_t vectors;  // of kPanel pixels
  int64_t taps, channels;
  const float* panels;
  int64_t tap_pitch, panel_pitch, columns;
  float* out;
  int64_t out_pitch;
  bool accumulate;
  Epilogue epilogue;
};

struct LowRankConvKernels {
  int64_t plane_vectors;  // at most in a PlaneProduct
  void (*multiply_pixels)(const PixelProduct& product);
  void (*multiply_dots)(const DotProduct& product);
  void (*multiply_planes)(const PlaneProduct& product);
  // to[j][i] = from[i][j]
  void (*transpose)(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch);
  void (*widen)(Dtype dtype, const void* from, int64_t from_pitch, float* to, int64_t to_pitch, int64_t rows,
                int64_t columns);
  // to = from + residual, which may be null and is laid out as `to`, then the ReLU. `to` may be `from`.
  void (*finish)(Dtype dtype, const float* from, int64_t from_pitch, const void* residual, bool relu, void* to,
                 int64_t to_pitch, int64_t rows, int64_t columns);
};

namespace baseline {
extern const LowRankConvKernels kLowRankConv;
}
namespace x86_64_v3 {
extern const LowRankConvKernels kLowRankConv;
}
namespace x86_64_v4 {
extern const LowRankConvKernels kLowRankConv;
}

}  // namespace smoothk::cpu
