// Operators of the low-rank convolution on CUDA, whose schemas are in csrc/ops_low_rank_conv.cpp: the checks that
// protect memory, allocation, the device and its stream. float32 goes through the tensor cores as TF32: who wants
// float32 itself does not call this.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cuda/low_rank_conv.h"
#include "ops_low_rank_conv.h"

namespace smoothk {
namespace {

using torch::headeronly::MemoryFormat;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Ints sizes_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

// What the kernel reads as [sizes], beside `input`.
void check(const char* name, const Tensor& tensor, const Ints& sizes, const Tensor& input) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == input.get_device_index() &&
                      tensor.scalar_type() == input.scalar_type() && sizes_of(tensor) == sizes,
                  name, " must be on the input's device, of its dtype and of the right shape");
}

Tensor empty_like(const Tensor& tensor, const Ints& sizes, MemoryFormat format = MemoryFormat::Contiguous) {
  return torch::stable::empty(sizes, tensor.scalar_type(), std::nullopt, tensor.device(), std::nullopt, format);
}

// The kernel copies 16 bytes at a time; a tensor may start anywhere in its storage.
Tensor aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 ? tensor : torch::stable::clone(tensor);
}

// The kernel writes channels last.
Tensor in_layout(const Tensor& images, bool channels_last) {
  return channels_last ? images : torch::stable::contiguous(images);
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

void check_launch(const char* message) { STD_TORCH_CHECK(message == nullptr, "smoothk::low_rank_conv: ", message); }

Tensor low_rank_conv_pack(const Tensor& v, const Tensor& u, int64_t groups) {
  const Ints u_shape = sizes_of(u);
  check_factors(sizes_of(v), u_shape, groups);
  STD_TORCH_CHECK(v.is_cuda(), "v and u must be on one device");
  check("u", u, u_shape, v);
  const DeviceGuard guard(v.get_device_index());
  const LowRankConvShape shape = factors_shape(sizes_of(v), u_shape, groups);
  const Dtype dtype = dtype_of(v);
  Tensor packed = empty_like(v, {cuda::low_rank_conv_packed_size(shape, dtype)});
  const Tensor dense_v = torch::stable::contiguous(v), dense_u = torch::stable::contiguous(u);
  check_launch(cuda::low_rank_conv_pack(shape, dtype, dense_v.const_data_ptr(), dense_u.const_data_ptr(),
                                        packed.mutable_data_ptr(), current_stream(v)));
  return packed;
}

std::tuple<Tensor, Tensor> low_rank_conv_fused(const Tensor& input, const Tensor& packed,
                                               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                               const Ints& numbers, bool relu, bool channels_last, bool with_z) {
  STD_TORCH_CHECK(input.is_cuda(), "input must be on a CUDA device");
  LowRankConvArguments arguments;
  arguments.shape = checked_shape(input, numbers);
  arguments.dtype = dtype_of(input), arguments.relu = relu;
  arguments.input_layout = arguments.output_layout = Layout::kChannelsLast;
  const LowRankConvShape& shape = arguments.shape;
  check("packed", packed, {cuda::low_rank_conv_packed_size(shape, arguments.dtype)}, input);

  const DeviceGuard guard(input.get_device_index());
  const Ints sizes = output_sizes(shape);
  Tensor output = empty_like(input, sizes, MemoryFormat::ChannelsLast);
  Tensor z = with_z ? empty_like(input, intermediate_sizes(shape), MemoryFormat::ChannelsLast) : empty_like(input, {0});
  if (output.numel() == 0) return {in_layout(output, channels_last), z};

  // Kept until the launch: contiguous copies of what is not.
  const Tensor dense_input = aligned(torch::stable::contiguous(input, MemoryFormat::ChannelsLast));
  const Tensor dense_packed = aligned(torch::stable::contiguous(packed));
  Tensor dense_bias, dense_residual;
  if (bias) {
    check("bias", *bias, {sizes[1]}, input);
    dense_bias = torch::stable::contiguous(*bias);
    arguments.bias = dense_bias.const_data_ptr();
  }
  if (residual) {
    check("residual", *residual, sizes, input);
    dense_residual = torch::stable::contiguous(*residual, MemoryFormat::ChannelsLast);
    arguments.residual = dense_residual.const_data_ptr();
  }
  arguments.input = dense_input.const_data_ptr();
  arguments.output = output.mutable_data_ptr();
  arguments.z = with_z ? z.mutable_data_ptr() : nullptr;
  check_launch(cuda::low_rank_conv(arguments, dense_packed.const_data_ptr(), current_stream(input)));
  return {in_layout(output, channels_last), z};
}

}  // namespace
}  // namespace smoothk

STABLE_TORCH_LIBRARY_IMPL(smoothk, CUDA, m) {
  m.impl("low_rank_conv_pack", TORCH_BOX(&smoothk::low_rank_conv_pack));
  m.impl("low_rank_conv_fused", TORCH_BOX(&smoothk::low_rank_conv_fused));
}
