// The Python module smoothk._C_cuda: importing it registers the operators on CUDA. No tensor passes through pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/low_rank_conv.h"

namespace {

using Ints = std::vector<int64_t>;

smoothk::Dtype dtype_of(const std::string& name) {
  if (name == "float32") return smoothk::Dtype::kFloat32;
  if (name == "bfloat16") return smoothk::Dtype::kBFloat16;
  if (name == "float16") return smoothk::Dtype::kFloat16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got " + name);
}

int64_t packed_size(const Ints& v, const Ints& u, int64_t groups, const std::string& dtype) {
  return smoothk::cuda::low_rank_conv_packed_size(smoothk::factors_shape(v, u, groups), dtype_of(dtype));
}

int64_t blocks(const Ints& v, const Ints& u, const Ints& input, const Ints& stride, const Ints& padding,
               const Ints& dilation, const Ints& output_size, int64_t groups, const std::string& dtype, bool with_z,
               int64_t multiprocessors, int64_t shared_limit) {
  smoothk::LowRankConvArguments arguments;
  arguments.shape = smoothk::conv_shape(v, u, groups, input, stride, padding, dilation, output_size);
  arguments.dtype = dtype_of(dtype);
  arguments.input_layout = arguments.output_layout = smoothk::Layout::kChannelsLast;
  alignas(16) static char aligned[16];
  if (with_z) arguments.z = aligned;
  smoothk::cuda::LowRankConvLaunch launch;
  const bool taken = smoothk::cuda::plan_low_rank_conv(arguments, nullptr, {multiprocessors, shared_limit}, launch);
  return taken ? launch.blocks : 0;
}

}  // namespace

PYBIND11_MODULE(_C_cuda, m) {
  m.doc() = "CUDA kernels of smoothk";
  m.attr("architectures") = SMOOTHK_CUDA_ARCHITECTURES;
  m.def("low_rank_conv_packed_size", &packed_size, "Entries of the packed form of factors of these shapes.");
  m.def(
      "low_rank_conv_blocks", &blocks,
      "Thread blocks of a convolution of these shapes, channels last, on a GPU of so many multiprocessors and bytes of "
      "shared memory a block; 0 where the kernel does not take it.");
}
