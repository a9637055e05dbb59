// Launches the fused low-rank convolution and the kernel that packs its factors.
#include <cuda_runtime.h>

#include "low_rank_conv.h"
#include "low_rank_conv_kernel.cuh"
#include "low_rank_conv_pack.cuh"

namespace smoothk::cuda {
namespace {

const char* message(cudaError_t status) { return status == cudaSuccess ? nullptr : cudaGetErrorString(status); }

template <class Kernel, class... Arguments>
const char* launch_kernel(Kernel* kernel, int64_t blocks, int32_t shared_bytes, void* stream,
                          const Arguments&... arguments) {
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess) return message(status);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return message(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// The kernel for each rank up to kMaxRank in steps of 16.
template <Dtype kDtype, bool kSpatial>
auto kernel_for(int64_t rank) {
  constexpr decltype(&low_rank_conv_kernel<kDtype, 1, kSpatial>) kernels[] = {
      low_rank_conv_kernel<kDtype, 1, kSpatial>, low_rank_conv_kernel<kDtype, 2, kSpatial>,
      low_rank_conv_kernel<kDtype, 3, kSpatial>, low_rank_conv_kernel<kDtype, 4, kSpatial>,
      low_rank_conv_kernel<kDtype, 5, kSpatial>, low_rank_conv_kernel<kDtype, 6, kSpatial>,
      low_rank_conv_kernel<kDtype, 7, kSpatial>, low_rank_conv_kernel<kDtype, 8, kSpatial>};
  return kernels[(rank - 1) / 16];
}

template <Dtype kDtype>
auto kernel_for(const LowRankConvShape& shape) {
  return shape.spatial ? kernel_for<kDtype, true>(shape.rank) : kernel_for<kDtype, false>(shape.rank);
}

auto kernel_for(const LowRankConvShape& shape, Dtype dtype) {
  return dtype == Dtype::kBFloat16  ? kernel_for<Dtype::kBFloat16>(shape)
         : dtype == Dtype::kFloat16 ? kernel_for<Dtype::kFloat16>(shape)
                                    : kernel_for<Dtype::kFloat32>(shape);
}

}  // namespace

const char* low_rank_conv(const LowRankConvArguments& arguments, const void* packed, void* stream) {
  int device = 0, shared_limit = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (status != cudaSuccess) return message(status);
  LowRankConvLaunch launch;
  if (!plan_low_rank_conv(arguments, packed, shared_limit, launch)) return "the kernel does not take this case";
  return launch_kernel(kernel_for(arguments.shape, arguments.dtype), launch.blocks, launch.shared_bytes, stream,
                       launch);
}

const char* low_rank_conv_pack(const LowRankConvShape& shape, Dtype dtype, const void* v, const void* u, void* packed,
                               void* stream) {
  const LowRankConvFactors factors = factors_of(shape, dtype, v, u, packed);
  const auto kernel = dtype == Dtype::kBFloat16  ? low_rank_conv_pack_kernel<Dtype::kBFloat16>
                      : dtype == Dtype::kFloat16 ? low_rank_conv_pack_kernel<Dtype::kFloat16>
                                                 : low_rank_conv_pack_kernel<Dtype::kFloat32>;
  return launch_kernel(kernel, (factors.size + kThreads - 1) / kThreads, 0, stream, factors);
}

}  // namespace smoothk::cuda
