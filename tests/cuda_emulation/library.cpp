// The emulated kernels as a C library, which tests/emulated_cuda.py calls.
#include "../../csrc/cuda/low_rank_conv.cu"

using smoothk::Dtype;
using smoothk::LowRankConvArguments;

namespace cuda = smoothk::cuda;

namespace {

// Sizes in the order of LowRankConvShape.
LowRankConvArguments make_arguments(const int64_t* sizes, int dtype) {
  LowRankConvArguments arguments = {};
  std::copy(sizes, sizes + 17, &arguments.shape.batch);
  arguments.shape.spatial = sizes[17] != 0;
  arguments.dtype = static_cast<Dtype>(dtype);
  arguments.input_layout = arguments.output_layout = smoothk::Layout::kChannelsLast;
  return arguments;
}

}  // namespace

extern "C" {

void set_reversed(bool reversed) { emulation::reversed = reversed; }
void declare_memory(const void* start, size_t bytes) { emulation::declare_memory(start, bytes); }
void forget_memory() { emulation::forget_memory(); }

int64_t low_rank_conv_packed_size(const int64_t* sizes, int dtype) {
  const LowRankConvArguments arguments = make_arguments(sizes, dtype);
  return cuda::low_rank_conv_packed_size(arguments.shape, arguments.dtype);
}

const char* low_rank_conv_pack(const int64_t* sizes, int dtype, const void* v, const void* u, void* packed) {
  const LowRankConvArguments arguments = make_arguments(sizes, dtype);
  return cuda::low_rank_conv_pack(arguments.shape, arguments.dtype, v, u, packed, nullptr);
}

const char* low_rank_conv(const int64_t* sizes, int dtype, const void* input, const void* packed, const void* bias,
                          const void* residual, bool relu, void* output, void* z, int multiprocessors,
                          int shared_limit) {
  LowRankConvArguments arguments = make_arguments(sizes, dtype);
  arguments.input = input, arguments.bias = bias, arguments.residual = residual;
  arguments.relu = relu, arguments.output = output, arguments.z = z;
  emulated_multiprocessors = multiprocessors, emulated_shared_limit = shared_limit;
  return cuda::low_rank_conv(arguments, packed, nullptr);
}

// Writes images, rows and columns of a tile, blocks and bytes of shared memory.
bool low_rank_conv_plan(const int64_t* sizes, int dtype, bool with_z, int64_t multiprocessors, int64_t shared_limit,
                        int64_t* result) {
  LowRankConvArguments arguments = make_arguments(sizes, dtype);
  if (with_z) arguments.z = &arguments;
  cuda::LowRankConvLaunch launch;
  if (!cuda::plan_low_rank_conv(arguments, nullptr, {multiprocessors, shared_limit}, launch)) return false;
  const int64_t found[] = {launch.tile_n, launch.tile_h, launch.tile_w, launch.blocks, launch.shared_bytes};
  std::copy(std::begin(found), std::end(found), result);
  return true;
}
}
