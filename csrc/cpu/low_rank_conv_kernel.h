// The vector loops of the low-rank convolution. Their source is compiled once per instruction set, each time into a
// namespace of its own: no inline function may be shared between the copies, or the linker could pick the wrong one.
#pragma once

#include <cstdint>

#include "../types.h"

namespace smoothk::cpu {

constexpr int64_t kPanel = 16;  // columns that packed weights have side by side: [panel][depth][kPanel]

// out[i][n] = sum over runs r and k < length of rows[r * row_pitch + i][from + k] * weights[r * length + k][n]
struct PixelProduct {
  const float* const* rows;
  int64_t row_pitch, from;
  int64_t pixels, runs, length;
  const float* panels;
  int64_t panel_pitch, columns;
  float* out;
  int64_t out_pitch;
  bool accumulate;        // the sum goes on from what out has
  bool padded;            // out has room for whole panels
  const float* bias;      // whole panels, or null
  const float* residual;  // of the pitch of out, or null
  bool relu;
};

struct LowRankConvKernels {
  void (*multiply)(const PixelProduct& product);
  // to[j][i] = from[i][j]
  void (*transpose)(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch);
  void (*widen)(Dtype dtype, const void* from, float* to, int64_t count);
  // to = from + residual, which may be null, then the ReLU. `to` may be `from`.
  void (*finish)(Dtype dtype, const float* from, const void* residual, bool relu, void* to, int64_t count);
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
