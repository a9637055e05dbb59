// The fused low-rank convolution on CUDA: what it takes, its launchers, and what the launcher tells the kernel; plain
// data, no torch and no CUDA include.
#pragma once

#include "../low_rank_conv.h"

namespace smoothk::cuda {

constexpr int kThreads = 128;
constexpr int kWarpPixels = 16;  // of z and of the output at a time; a warp has up to kMaxWarpTiles times as many
constexpr int kMaxWarpTiles = 2;
constexpr int kStages = 3;       // of the ring buffer of weights
constexpr int kSliceBytes = 64;  // of an input pixel in shared memory at a time: two operands deep
constexpr int kPixelBytes = 80;  // its pitch: eight neighbours lie in different banks
constexpr int kMaxRank = 128;
constexpr int kMaxTaps = 1 << 12;

// Output channels that a block computes at a time: what fits in registers.
template <Dtype kDtype>
constexpr int kOutputChunk = kDtype == Dtype::kFloat32 ? 32 : 64;

// A block computes tile_n images x tile_h rows x tile_w columns of the output, all channels, from as much of z. It
// walks through items, of which kStages - 1 are on their way: first (slice of input channels, some of v's taps), then
// (chunk of output channels, tap of u). The input's part of a slice comes with the first item of the slice.
struct LowRankConvLaunch {
  const void *input, *v, *u, *bias, *residual;  // v and u: the two parts of the packed factors
  void *output, *z;
  int32_t batch, height, width, in_channels, rank, out_channels, out_height, out_width, z_width;
  int32_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int32_t first_kernel_w, second_kernel_w;  // of the first convolution and, in the spatial scheme, of the second
  int32_t tile_n, tile_h, tile_w, tiles_h, tiles_w;
  int32_t warp_tiles;      // times kWarpPixels that a warp has: the more, the fewer blocks load all the weights
  int32_t z_tile_w;        // columns of z that the block computes; tile_w in the channel scheme
  int32_t halo_h, halo_w;  // rows and columns of the input that it reads of an image
  int32_t slices, taps, taps_per_item, items_per_slice, chunks;
  int32_t input_slots;  // slices of the input in shared memory
  int32_t relu;
  int32_t whole_z, whole_output;  // whether channels come in aligned fours
  // Bytes from the start of shared memory; the input, later z, is at 0.
  int32_t weights_at, weights_bytes, offsets_at;
  int32_t shared_bytes;
  int64_t blocks;
};

struct Device {
  int64_t multiprocessors;
  int64_t shared_limit;  // bytes a block can have
};

// False where the kernel does not take the case. Pointers of `arguments` are read for their alignment only.
bool plan_low_rank_conv(const LowRankConvArguments& arguments, const void* packed, const Device& device,
                        LowRankConvLaunch& launch);

// Number of entries, of the input's dtype, of the packed factors, and of those the number that v takes.
int64_t low_rank_conv_packed_size(const LowRankConvShape& shape, Dtype dtype);
int64_t low_rank_conv_packed_v_size(const LowRankConvShape& shape, Dtype dtype);

// Launchers. The result is null, or what went wrong. `stream` is a cudaStream_t of the current device.
const char* low_rank_conv_pack(const LowRankConvShape& shape, Dtype dtype, const void* v, const void* u, void* packed,
                               void* stream);
const char* low_rank_conv(const LowRankConvArguments& arguments, const void* packed, void* stream);

}  // namespace smoothk::cuda
