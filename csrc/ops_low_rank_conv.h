// What the operators of the low-rank convolution on the CPU and on CUDA check alike, so that no offset overflows.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "low_rank_conv.h"

namespace smoothk {

using Ints = std::vector<int64_t>;

inline Dtype dtype_of(const torch::stable::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Dtype::kFloat32;
    case torch::headeronly::ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// What offsets and sizes of scratch are computed from stays this small, so that none overflows. It is checked in
// floating point, which does not either.
constexpr double kMost = 0x1p56;

inline double product(const Ints& sizes) {
  double result = 1;
  for (int64_t size : sizes) result *= static_cast<double>(size);
  return result;
}

inline void check_factors(const Ints& v, const Ints& u, int64_t groups) {
  STD_TORCH_CHECK(v.size() == 4 && u.size() == 4, "v and u must have 4 dimensions");
  STD_TORCH_CHECK(std::min(*std::min_element(v.begin(), v.end()), *std::min_element(u.begin(), u.end())) > 0 &&
                      product(v) <= kMost && product(u) <= kMost,
                  "v and u must have entries, and not too many");
  STD_TORCH_CHECK(groups > 0 && v[0] % groups == 0 && v[0] / groups == u[1] && u[0] % groups == 0 && u[2] == 1 &&
                      (u[3] == 1 || v[3] == 1),
                  "v and u must be [groups*r, c_in, k_h, k_w] and [c_out, r, 1, 1], or [groups*r, c_in, k_h, 1] and "
                  "[c_out, r, 1, k_w]");
}

// Of the images with their padding.
inline void check_reach(const LowRankConvShape& s) {
  const auto span = [](int64_t size, int64_t stride, int64_t kernel, int64_t dilation) {
    return (static_cast<double>(size) * static_cast<double>(stride) +
            static_cast<double>(kernel) * static_cast<double>(dilation));
  };
  const double height = span(s.out_height, s.stride_h, s.kernel_h, s.dilation_h);
  const double width = span(s.out_width, s.stride_w, s.kernel_w, s.dilation_w);
  const double images = static_cast<double>(std::max<int64_t>(s.batch, 1)) * static_cast<double>(s.in_channels);
  STD_TORCH_CHECK(images * height * width <= kMost && static_cast<double>(std::max(s.pad_h, s.pad_w)) <= kMost,
                  "stride, padding, dilation and output_size must not reach that far");
}

// The shape of a call. Its numbers come in one list, since each list costs a call on small images about a microsecond:
// 4 sizes of v, 4 of u, groups, then 2 each of stride, padding, dilation and the output's height and width.
inline LowRankConvShape checked_shape(const torch::stable::Tensor& input, const Ints& numbers) {
  STD_TORCH_CHECK(numbers.size() == 17, "numbers must be 17, got ", numbers.size());
  auto part = [at = numbers.begin()](int64_t count) mutable { return Ints(std::exchange(at, at + count), at); };
  const Ints v_shape = part(4), u_shape = part(4);
  const int64_t groups = part(1)[0];
  const Ints stride = part(2), padding = part(2), dilation = part(2), output_size = part(2);
  check_factors(v_shape, u_shape, groups);
  STD_TORCH_CHECK(input.dim() == 4 && input.size(1) % groups == 0 && input.size(1) / groups == v_shape[1],
                  "input must be [N, groups*c_in, H, W]");
  STD_TORCH_CHECK(std::min({stride[0], stride[1], dilation[0], dilation[1]}) > 0 &&
                      std::min({padding[0], padding[1], output_size[0], output_size[1]}) >= 0,
                  "stride, padding, dilation and output_size must be numbers in their range");
  const Ints sizes = {input.size(0), input.size(1), input.size(2), input.size(3)};
  const LowRankConvShape shape = conv_shape(v_shape, u_shape, groups, sizes, stride, padding, dilation, output_size);
  check_reach(shape);
  return shape;
}

inline Ints output_sizes(const LowRankConvShape& s) {
  return {s.batch, s.groups * s.out_channels, s.out_height, s.out_width};
}

inline Ints intermediate_sizes(const LowRankConvShape& s) {
  return {s.batch, s.groups * s.rank, s.out_height, s.z_width()};
}

}  // namespace smoothk
