// Operators of the low-rank convolution on the CPU: schemas, the checks that protect memory, allocation, registration.
// Full checks with messages for users are in smoothk/low_rank_conv.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "low_rank_conv.h"

namespace smoothk {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// What offsets and sizes of scratch are computed from stays this small, so that none overflows. It is checked in
// floating point, which does not either.
constexpr double kMost = 0x1p56;

double product(const Ints& sizes) {
  double result = 1;
  for (int64_t size : sizes) result *= static_cast<double>(size);
  return result;
}

void check_factors(const Ints& v, const Ints& u, int64_t groups) {
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
void check_reach(const LowRankConvShape& s) {
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

// Layout of a dense batch of images; images that are both count as channels first.
std::optional<Layout> layout_of(const Tensor& images) {
  const auto sizes = images.sizes(), strides = images.strides();
  const auto dense = [&](std::initializer_list<int> inner_to_outer) {
    int64_t expected = 1;
    for (int d : inner_to_outer) {
      if (sizes[d] > 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  };
  if (dense({3, 2, 1, 0})) return Layout::kChannelsFirst;
  if (dense({1, 3, 2, 0})) return Layout::kChannelsLast;
  return std::nullopt;
}

void check_images(const char* name, const Tensor& images, const Ints& sizes, ScalarType dtype) {
  const auto actual = images.sizes();
  STD_TORCH_CHECK(images.is_cpu() && images.scalar_type() == dtype, name, " must be on the CPU, of the input's dtype");
  STD_TORCH_CHECK(std::equal(actual.begin(), actual.end(), sizes.begin(), sizes.end()), name, " has the wrong shape");
}

Tensor empty_images(const Ints& sizes, ScalarType dtype, Layout layout) {
  return torch::stable::empty(sizes, dtype, std::nullopt, std::nullopt, std::nullopt,
                              layout == Layout::kChannelsLast ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

Tensor low_rank_conv_pack(const Tensor& v, const Tensor& u, int64_t groups) {
  const Ints v_shape(v.sizes().begin(), v.sizes().end()), u_shape(u.sizes().begin(), u.sizes().end());
  check_factors(v_shape, u_shape, groups);
  const LowRankConvShape shape = factors_shape(v_shape, u_shape, groups);
  STD_TORCH_CHECK(v.is_cpu() && u.is_cpu() && v.scalar_type() == u.scalar_type(),
                  "v and u must be on the CPU, of one dtype");
  const Dtype dtype = dtype_of(v);
  Tensor packed = torch::stable::empty({cpu::low_rank_conv_packed_size(shape)}, ScalarType::Float);
  cpu::low_rank_conv_pack(shape, dtype, torch::stable::contiguous(v).const_data_ptr(),
                          torch::stable::contiguous(u).const_data_ptr(), packed.mutable_data_ptr<float>());
  return packed;
}

std::tuple<Tensor, Tensor> low_rank_conv_fused(const Tensor& input, const Tensor& packed,
                                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                               const Ints& v_shape, const Ints& u_shape, const Ints& stride,
                                               const Ints& padding, const Ints& dilation, const Ints& output_size,
                                               int64_t groups, bool relu, bool channels_last, bool with_z) {
  check_factors(v_shape, u_shape, groups);
  LowRankConvShape shape = factors_shape(v_shape, u_shape, groups);
  STD_TORCH_CHECK(
      input.is_cpu() && input.dim() == 4 && input.size(1) % groups == 0 && input.size(1) / groups == shape.in_channels,
      "input must be [N, groups*c_in, H, W] on the CPU");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 2 && dilation.size() == 2 && output_size.size() == 2 &&
                      std::min({stride[0], stride[1], dilation[0], dilation[1]}) > 0 &&
                      std::min({padding[0], padding[1], output_size[0], output_size[1]}) >= 0,
                  "stride, padding, dilation and output_size must be two numbers in their range");
  shape.batch = input.size(0), shape.height = input.size(2), shape.width = input.size(3);
  shape.out_height = output_size[0], shape.out_width = output_size[1];
  shape.stride_h = stride[0], shape.stride_w = stride[1];
  shape.pad_h = padding[0], shape.pad_w = padding[1];
  shape.dilation_h = dilation[0], shape.dilation_w = dilation[1];
  check_reach(shape);
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
                      packed.numel() == cpu::low_rank_conv_packed_size(shape),
                  "packed must come from low_rank_conv_pack for these factors");

  const ScalarType dtype = input.scalar_type();
  const Ints sizes = {shape.batch, u_shape[0], shape.out_height, shape.out_width};
  const Layout layout = channels_last ? Layout::kChannelsLast : Layout::kChannelsFirst;
  Tensor output = empty_images(sizes, dtype, layout);
  Tensor z =
      with_z ? empty_images({shape.batch, v_shape[0], shape.out_height, shape.z_width()}, dtype, Layout::kChannelsLast)
             : torch::stable::empty({0}, dtype);

  LowRankConvArguments arguments;
  arguments.shape = shape, arguments.dtype = dtype_of(input), arguments.relu = relu;
  const auto input_layout = layout_of(input);
  const Tensor dense_input = input_layout ? input : torch::stable::contiguous(input);
  arguments.input_layout = input_layout.value_or(Layout::kChannelsFirst), arguments.output_layout = layout;
  arguments.input = dense_input.const_data_ptr();
  Tensor dense_bias, dense_residual;
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == dtype && bias->dim() == 1 && bias->numel() == u_shape[0],
                    "bias must be [c_out], of the input's dtype");
    dense_bias = torch::stable::contiguous(*bias);
    arguments.bias = dense_bias.const_data_ptr();
  }
  if (residual) {
    check_images("residual", *residual, sizes, dtype);
    dense_residual =
        torch::stable::contiguous(*residual, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
    arguments.residual = dense_residual.const_data_ptr();
  }
  arguments.output = output.mutable_data_ptr();
  if (with_z) arguments.z = z.mutable_data_ptr();
  cpu::low_rank_conv(arguments, packed.const_data_ptr<float>(), [](int64_t size, int64_t grain, const auto& body) {
    torch::stable::parallel_for(0, size, grain, body);
  });
  return {output, z};
}

}  // namespace
}  // namespace smoothk

STABLE_TORCH_LIBRARY_FRAGMENT(smoothk, m) {
  m.def("low_rank_conv_pack(Tensor v, Tensor u, int groups) -> Tensor");
  m.def(
      "low_rank_conv_fused(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, int[] v_shape, int[] u_shape, "
      "int[] stride, int[] padding, int[] dilation, int[] output_size, int groups, bool relu, bool channels_last, "
      "bool with_z) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(smoothk, CPU, m) {
  m.impl("low_rank_conv_pack", TORCH_BOX(&smoothk::low_rank_conv_pack));
  m.impl("low_rank_conv_fused", TORCH_BOX(&smoothk::low_rank_conv_fused));
}
