// Operators of the low-rank convolution on the CPU: schemas, the checks that protect memory, allocation, registration.
// Full checks with messages for users are in smoothk/low_rank_conv.py.
#include "ops_low_rank_conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

namespace smoothk {
namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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
                                               const Ints& numbers, bool relu, bool channels_last, bool with_z) {
  STD_TORCH_CHECK(input.is_cpu(), "input must be on the CPU");
  const LowRankConvShape shape = checked_shape(input, numbers);
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
                      packed.numel() == cpu::low_rank_conv_packed_size(shape),
                  "packed must come from low_rank_conv_pack for these factors");

  const ScalarType dtype = input.scalar_type();
  const Ints sizes = output_sizes(shape);
  const Layout layout = channels_last ? Layout::kChannelsLast : Layout::kChannelsFirst;
  Tensor output = empty_images(sizes, dtype, layout);
  Tensor z =
      with_z ? empty_images(intermediate_sizes(shape), dtype, Layout::kChannelsLast) : torch::stable::empty({0}, dtype);

  LowRankConvArguments arguments;
  arguments.shape = shape, arguments.dtype = dtype_of(input), arguments.relu = relu;
  const auto input_layout = layout_of(input);
  const Tensor dense_input = input_layout ? input : torch::stable::contiguous(input);
  arguments.input_layout = input_layout.value_or(Layout::kChannelsFirst), arguments.output_layout = layout;
  arguments.input = dense_input.const_data_ptr();
  Tensor dense_bias, dense_residual;
  if (bias) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->scalar_type() == dtype && bias->dim() == 1 && bias->numel() == sizes[1],
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
      "low_rank_conv_fused(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, int[] numbers, bool relu, bool "
      "channels_last, bool with_z) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(smoothk, CPU, m) {
  m.impl("low_rank_conv_pack", TORCH_BOX(&smoothk::low_rank_conv_pack));
  m.impl("low_rank_conv_fused", TORCH_BOX(&smoothk::low_rank_conv_fused));
}
