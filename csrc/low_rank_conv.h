// Convolution with a factorised weight, y = u * (v * x) + bias: plain data, no torch include.
#pragma once

#include <cstdint>

#include "types.h"

namespace smoothk {

enum class Layout { kChannelsFirst, kChannelsLast };  // of a batch of images in memory: NCHW or NHWC, dense

// Channel counts are those of one group. Taps that fall outside the image read zero, so that the output's size and the
// padding before the first row and column say everything about padding.
//
//   channel scheme: v [groups*rank, in_channels, kernel_h, kernel_w], u [groups*out_channels, rank, 1, 1]
//   spatial scheme: v [groups*rank, in_channels, kernel_h, 1],        u [groups*out_channels, rank, 1, kernel_w]
struct LowRankConvShape {
  int64_t batch, groups, in_channels, rank, out_channels;
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  bool spatial;

  // Of the intermediate z = v * x, [batch, groups*rank, out_height, z_width()].
  int64_t z_width() const { return spatial ? width : out_width; }
};

struct LowRankConvArguments {
  LowRankConvShape shape;
  Dtype dtype;  // of input, residual, output, z and bias; sums are float32
  Layout input_layout, output_layout;
  const void* input;
  const void* bias;      // [groups*out_channels] or null
  const void* residual;  // added before the ReLU; laid out as the output, or null
  bool relu;
  void* output;
  void* z;  // the intermediate, channels last, for the backward pass; null: not wanted
};

namespace cpu {

// Number of floats that the packed factors take.
int64_t low_rank_conv_packed_size(const LowRankConvShape& shape);

// Rearranges v and u, contiguous and of `dtype`, for the kernel. Depends on channels, groups, kernel and scheme of the
// shape and on nothing else of it.
void low_rank_conv_pack(const LowRankConvShape& shape, Dtype dtype, const void* v, const void* u, float* packed);

// The same bits however the work is divided.
void low_rank_conv(const LowRankConvArguments& arguments, const float* packed, const ParallelFor& parallel_for);

}  // namespace cpu
}  // namespace smoothk
