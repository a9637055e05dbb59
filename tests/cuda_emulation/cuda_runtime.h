// What the kernels use of CUDA C++ and its runtime, for the host's compiler; found in place of the toolkit's header.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>

#include "block.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (::emulation::thread_index)
#define blockIdx (::emulation::block_index)

using std::max;
using std::min;

inline void __syncthreads() { emulation::barrier(); }

struct uint2 {
  uint32_t x, y;
};

struct uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  dim3(unsigned x_ = 1) : x(x_) {}
  unsigned x;
};

enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
using cudaStream_t = struct Stream*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

inline std::string emulation_error;
inline int emulated_multiprocessors = 1, emulated_shared_limit = emulation::kSharedBytes;

inline const char* cudaGetErrorString(cudaError_t) { return emulation_error.c_str(); }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? emulated_multiprocessors : emulated_shared_limit;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Expected, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               const Arguments&... arguments) {
  emulation_error =
      emulation::run(config->gridDim.x, config->blockDim.x, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return emulation_error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
