// csrc/ops_cuda.cpp with the CPU in the place of CUDA: its operators run the emulated kernels on CPU tensors.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace torch::stable::emulated {

struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};

inline AOTITorchError current_stream(int32_t, void** stream) { return *stream = nullptr, TORCH_SUCCESS; }

}  // namespace torch::stable::emulated

#define CUDA CPU
#define is_cuda is_cpu
#define accelerator emulated
#define aoti_torch_get_current_cuda_stream torch::stable::emulated::current_stream
#include "../../csrc/ops_cuda.cpp"
