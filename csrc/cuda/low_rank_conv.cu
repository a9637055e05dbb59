// Launches the fused low-rank convolution and the kernel that packs its factors.
#include <cuda_runtime.h>

#include <utility>

#include "low_rank_conv.h"
#include "low_rank_conv_kernel.cuh"
#include "low_rank_conv_pack.cuh"

namespace smoothk::cuda {
namespace {

const char* message(cudaError_t status) {
  if (status == cudaSuccess) return nullptr;
  cudaGetLastError();  // or the next check of somebody else finds it
  return cudaGetErrorString(status);
}

template <class Function, class... Arguments>
const char* launch_kernel(Function* kernel, int64_t blocks, int32_t shared_bytes, void* stream,
                          const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return message(cudaLaunchKernelEx(&config, kernel, arguments...));
}

using Kernel = void (*)(const LowRankConvLaunch);

// For each rank up to kMaxRank in steps of 16.
template <Dtype kDtype, bool kSpatial, int kWarpTiles, int... kRankPairs>
Kernel kernel_for(int64_t rank, std::integer_sequence<int, kRankPairs...>) {
  static_assert(sizeof...(kRankPairs) * kPair == kMaxRank);
  constexpr Kernel kernels[] = {low_rank_conv_kernel<kDtype, kRankPairs + 1, kSpatial, kWarpTiles>...};
  return kernels[(rank - 1) / kPair];
}

template <Dtype kDtype, bool kSpatial>
Kernel kernel_for(const LowRankConvLaunch& launch) {
  constexpr std::make_integer_sequence<int, kMaxRank / kPair> ranks;
  return launch.warp_tiles == 1 ? kernel_for<kDtype, kSpatial, 1>(launch.rank, ranks)
                                : kernel_for<kDtype, kSpatial, kMaxWarpTiles>(launch.rank, ranks);
}

template <Dtype kDtype>
Kernel kernel_for(bool spatial, const LowRankConvLaunch& launch) {
  return spatial ? kernel_for<kDtype, true>(launch) : kernel_for<kDtype, false>(launch);
}

Kernel kernel_for(const LowRankConvArguments& arguments, const LowRankConvLaunch& launch) {
  const bool spatial = arguments.shape.spatial;
  return arguments.dtype == Dtype::kBFloat16  ? kernel_for<Dtype::kBFloat16>(spatial, launch)
         : arguments.dtype == Dtype::kFloat16 ? kernel_for<Dtype::kFloat16>(spatial, launch)
                                              : kernel_for<Dtype::kFloat32>(spatial, launch);
}

const char* current_device(Device& device) {
  int number = 0, multiprocessors = 0, shared_limit = 0;
  cudaError_t status = cudaGetDevice(&number);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, number);
  if (status == cudaSuccess) {
    status = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, number);
  }
  device = {multiprocessors, shared_limit};
  return message(status);
}

}  // namespace

const char* low_rank_conv(const LowRankConvArguments& arguments, const void* packed, void* stream) {
  Device device;
  if (const char* failure = current_device(device)) return failure;
  LowRankConvLaunch launch;
  if (!plan_low_rank_conv(arguments, packed, device, launch)) return "the kernel does not take this case";
  const Kernel kernel = kernel_for(arguments, launch);
  // All there is, whatever this launch needs: the attribute is the kernel's, and other threads launch it too.
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(device.shared_limit));
  if (status != cudaSuccess) return message(status);
  return launch_kernel(kernel, launch.blocks, launch.shared_bytes, stream, launch);
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
