// How the CPU reads the images of a low-rank convolution: to float, and with their padding.
#pragma once

#include <cstdint>

#include "../low_rank_conv.h"
#include "low_rank_conv_kernel.h"
#include "low_rank_conv_plan.h"

namespace smoothk::cpu {

struct InputBuffers {
  const float** table;  // where rows of a PixelProduct start
  float* band;          // of the input
  float* widened;       // a row of it
};

class LowRankConvInput : protected LowRankConvPlan {
 protected:
  LowRankConvInput(const LowRankConvArguments& arguments, const LowRankConvKernels& kernels)
      : LowRankConvPlan(arguments, kernels), input_(arguments.input) {}

  // Copies what rows [begin, end) read, and enters for every run where it starts for every pixel of them.
  void read_band(int64_t group, int64_t begin, int64_t end, const InputBuffers& b) const;
  // What rows of an image read, as planes with padding.
  void read_planes(int64_t group, int64_t row, int64_t rows, const InputBuffers& b, int64_t band_pitch) const;
  // Pixels that lie together, as planes.
  void read_pixels(int64_t group, int64_t first, int64_t pixels, float* to, int64_t pitch, float* widened) const;

 private:
  void read_row(int64_t image, int64_t group, int64_t y, float* to, float* widened) const;

  const void* input_;
};

}  // namespace smoothk::cpu
