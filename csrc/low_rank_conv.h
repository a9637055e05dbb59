// Convolution with a factorised weight, y = u * (v * x) + bias: plain data, no torch include.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace smoothk {

enum class Layout { kChannelsFirst, kChannelsLast };  // of a batch of images in memory: NCHW or NHWC, dense

// Channel counts are those of one group. Taps that fall outside the image read zero, so that the output's size and the
// padding before the first row and column say everything about padding.
//
//   channel scheme: v [groups*rank, in_channels, kernel_h, kernel_w], u [groups*out_channels, rank, 1, 1]
//   spatial scheme: v [groups*rank, in_channels, kernel_h, 1],        u [groups*out_channels, rank, 1, kernel_w]
struct LowRankConvShape {
  int64_t batch = 0, groups = 1, in_channels = 0, rank = 0, out_channels = 0;
  int64_t height = 0, width = 0;          // of the input
  int64_t out_height = 0, out_width = 0;  // of the output
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  bool spatial = false;

  // Of the intermediate z = v * x, [batch, groups*rank, out_height, z_width()].
  int64_t z_width() const { return spatial ? width : out_width; }
};

// What the shapes of the factors say: channels, kernel and scheme. They are taken as checked.
inline LowRankConvShape factors_shape(const std::vector<int64_t>& v, const std::vector<int64_t>& u, int64_t groups) {
  const bool spatial = u[3] > 1;
  return {.groups = groups,
          .in_channels = v[1],
          .rank = u[1],
          .out_channels = u[0] / groups,
          .kernel_h = v[2],
          .kernel_w = spatial ? u[3] : v[3],
          .spatial = spatial};
}

// The shape of a call on an `input` of these sizes.
inline LowRankConvShape conv_shape(const std::vector<int64_t>& v, const std::vector<int64_t>& u, int64_t groups,
                                   const std::vector<int64_t>& input, const std::vector<int64_t>& stride,
                                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                                   const std::vector<int64_t>& output_size) {
  LowRankConvShape shape = factors_shape(v, u, groups);
  shape.batch = input[0], shape.height = input[2], shape.width = input[3];
  shape.out_height = output_size[0], shape.out_width = output_size[1];
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.pad_h = padding[0], shape.pad_w = padding[1];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  return shape;
}

struct LowRankConvArguments {
  LowRankConvShape shape = {};
  Dtype dtype = Dtype::kFloat32;  // of input, residual, output, z and bias; sums are float32
  Layout input_layout = Layout::kChannelsFirst, output_layout = Layout::kChannelsFirst;
  const void* input = nullptr;
  const void* bias = nullptr;      // [groups*out_channels] or null
  const void* residual = nullptr;  // added before the ReLU; laid out as the output, or null
  bool relu = false;
  void* output = nullptr;
  void* z = nullptr;  // the intermediate, channels last, for the backward pass; null: not wanted
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
