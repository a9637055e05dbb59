// The fused low-rank convolution, y = u * (v * x) + bias + residual, ReLU: what one block does; see LowRankConvLaunch.
//
// x reaches shared memory once per block, with its halo, and every tap reads it there, shifted: ldmatrix takes an
// address for each row of A, so any pixel can be a row. z stays in the registers of the warp that computed it and is
// the second product's A there. In the spatial scheme, where a pixel of y needs its neighbours' z, z goes through
// shared memory instead. A warp computes 16 pixels at a time, those of the tiles warp, warp + kWarps, ...
#pragma once

#include "low_rank_conv.h"
#include "mma.cuh"

namespace smoothk::cuda {

constexpr int kWarps = kThreads / 32;

template <Dtype kDtype, int kRankPairs, bool kSpatial, int kWarpTiles>
class LowRankConvBlock {
  using M = Mma<kDtype>;
  using Element = typename M::Element;
  using Vector = typename M::Vector;
  static constexpr int kTilePixels = kWarpPixels * kWarps * kWarpTiles;
  static constexpr int kPairDepths = kPair / M::kDepth;  // operands A that 16 columns of C make
  static constexpr int kSliceDepths = kSliceBytes / kDepthBytes;
  static constexpr int kChunkPairs = kOutputChunk<kDtype> / kPair;
  static constexpr int kTapBytes = kSliceDepths * kRankPairs * kPairBytes;
  static constexpr int kChunkBytes = kRankPairs * kPairDepths * kChunkPairs * kPairBytes;  // of one tap of u
  static constexpr int kZBytes = kRankPairs * kPair * sizeof(Element) + 16;  // pitch: eight rows in different banks

  // C of 16 pixels by 16 * kPairs channels, for each of the warp's tiles.
  template <int kPairs>
  using Sums = float[kWarpTiles][2 * kPairs][4];

 public:
  __device__ explicit LowRankConvBlock(const LowRankConvLaunch& launch) : p(launch) {
    int32_t tile = blockIdx.x;
    column0 = tile % p.tiles_w * p.tile_w;
    tile /= p.tiles_w;
    row0 = tile % p.tiles_h * p.tile_h;
    image0 = tile / p.tiles_h * p.tile_n;
    z_column0 = kSpatial ? max(column0 * p.stride_w - p.pad_w, 0) : column0;
    halo = p.tile_n * p.halo_h * p.halo_w;
  }

  __device__ void run() {
    fill_offsets();
    __syncthreads();
    for (int32_t item = 0; item < kStages - 1; ++item) load(item);
    Sums<kRankPairs> sums = {};
    first_product(sums);
    uint32_t operands[kWarpTiles][kRankPairs][kPairDepths][4];
    if (kSpatial) __syncthreads();  // z overwrites the input
    finish_z(sums, operands);
    second_product(operands);
  }

 private:
  // Where each pixel of the halo lies in the input, in units of 16 bytes from the tile's first image; -1: outside.
  __device__ void fill_offsets() {
    const int32_t pixel_vectors = p.in_channels * static_cast<int32_t>(sizeof(Element)) / 16;
    const int32_t left = kSpatial ? z_column0 : column0 * p.stride_w - p.pad_w;
#pragma unroll 1
    for (int32_t i = threadIdx.x; i < halo; i += kThreads) {
      const int32_t image = i / p.halo_w / p.halo_h;
      const int32_t row = row0 * p.stride_h - p.pad_h + i / p.halo_w % p.halo_h, column = left + i % p.halo_w;
      const bool inside = image0 + image < p.batch && row >= 0 && row < p.height && column >= 0 && column < p.width;
      store_shared(shared + p.offsets_at + 4 * i,
                   inside ? ((image * p.height + row) * p.width + column) * pixel_vectors : -1);
    }
  }

  // Starts the copies of item `item` into shared memory.
  __device__ void load(int32_t item) {
    const int32_t first_items = p.slices * p.items_per_slice;
    const uint32_t to = shared + p.weights_at + item % kStages * p.weights_bytes;
    if (item < first_items) {
      const int32_t slice = item / p.items_per_slice, tap = item % p.items_per_slice * p.taps_per_item;
      if (tap == 0) load_input(slice);
      copy(to, p.v, int64_t{slice} * p.taps + tap, min(p.taps_per_item, p.taps - tap), kTapBytes);
    } else if (item < first_items + p.chunks * p.second_kernel_w) {
      copy(to, p.u, item - first_items, 1, kChunkBytes);
    }
    cp_async_commit();
  }

  __device__ void load_input(int32_t slice) {
    constexpr int kVectors = kSliceBytes / 16;
    const int32_t pixel_vectors = p.in_channels * static_cast<int32_t>(sizeof(Element)) / 16;
    const auto* from =
        static_cast<const unsigned char*>(p.input) + int64_t{image0} * p.height * p.width * pixel_vectors * 16;
    const uint32_t to = shared + slice % p.input_slots * halo * kPixelBytes;
    for (int32_t i = threadIdx.x; i < halo * kVectors; i += kThreads) {
      const int32_t pixel = i / kVectors, vector = i % kVectors, channel = slice * kVectors + vector;
      const int32_t offset = load_shared_int(shared + p.offsets_at + 4 * pixel);
      const bool present = offset >= 0 && channel < pixel_vectors;
      cp_async(to + pixel * kPixelBytes + vector * 16, from + (present ? int64_t{offset + channel} * 16 : 0), present);
    }
  }

  // `count` of the parts of `bytes` each, from part `first` on.
  __device__ void copy(uint32_t to, const void* packed, int64_t first, int32_t count, int32_t bytes) {
    const auto* from = static_cast<const unsigned char*>(packed) + first * bytes;
    for (int32_t i = threadIdx.x * 16; i < count * bytes; i += kThreads * 16) cp_async(to + i, from + i, true);
  }

  // Waits for item `item`, starts the copies of a later one in the place of item - 1, and says where this lane's part
  // of the weights begins.
  __device__ uint32_t next(int32_t item) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // everybody's copies have arrived, and nobody reads item - 1 any more
    load(item + kStages - 1);
    return shared + p.weights_at + item % kStages * p.weights_bytes + lane * 16;
  }

  // sums = v * x
  __device__ void first_product(Sums<kRankPairs>& sums) {
    uint32_t pixels[kWarpTiles];
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
      // Beyond the tile any pixel will do: nothing is stored of it.
      const int32_t i = min(tile_start(t) + lane % 16, p.tile_n * p.tile_h * p.z_tile_w - 1);
      const int32_t line = i / p.z_tile_w, row = line / p.tile_h * p.halo_h + line % p.tile_h * p.stride_h;
      const int32_t column = i % p.z_tile_w * (kSpatial ? 1 : p.stride_w);
      pixels[t] = shared + (row * p.halo_w + column) * kPixelBytes + lane / 16 * 16;
    }
    int32_t item = 0;
    for (int32_t slice = 0; slice < p.slices; ++slice) {
      const int32_t slot = slice % p.input_slots * halo;
      int32_t tap_row = 0, tap_column = 0;
      for (int32_t tap = 0; tap < p.taps;) {
        uint32_t weights = next(item++);
        for (const int32_t end = min(tap + p.taps_per_item, p.taps); tap < end; ++tap, weights += kTapBytes) {
          const int32_t shift = tap_row * p.dilation_h * p.halo_w + tap_column * p.dilation_w;
#pragma unroll
          for (int d = 0; d < kSliceDepths; ++d) {
            uint32_t a[kWarpTiles][4];
#pragma unroll
            for (int t = 0; t < kWarpTiles; ++t) {
              M::load_a(a[t], pixels[t] + (slot + shift) * kPixelBytes + d * kDepthBytes);
            }
            multiply<kRankPairs>(sums, a, weights + d * kRankPairs * kPairBytes);
          }
          if (++tap_column == p.first_kernel_w) tap_column = 0, ++tap_row;
        }
      }
    }
  }

  // sums += A B for every tile, with B of 16 * kPairs columns
  template <int kPairs>
  __device__ void multiply(Sums<kPairs>& sums, const uint32_t (&a)[kWarpTiles][4], uint32_t weights) {
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const uint4 b = load_shared(weights + pair * kPairBytes);
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
        M::multiply(sums[t][2 * pair], a[t], b.x, b.y);
        M::multiply(sums[t][2 * pair + 1], a[t], b.z, b.w);
      }
    }
  }

  // Rounds z, stores it where it is wanted, and leaves it to the second product: in `operands` or in shared memory.
  __device__ void finish_z(const Sums<kRankPairs>& sums, uint32_t (&operands)[kWarpTiles][kRankPairs][kPairDepths][4]) {
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
      int32_t at[2];
      for (int half = 0; half < 2; ++half) {
        at[half] = p.z ? position(row_of_sums(t, half), p.z_tile_w, z_column0, p.z_width) : -1;
      }
#pragma unroll
      for (int pair = 0; pair < kRankPairs; ++pair) {
        const int32_t channel = pair * kPair + lane % 4 * 4;
        Vector rows[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float values[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // Beyond the rank zero times infinity may have made NaN.
            values[i] = channel + i < p.rank ? sums[t][2 * pair + i / 2][2 * half + i % 2] : 0;
          }
          rows[half] = M::pack(values);
          if (at[half] >= 0) store_channels(p.z, at[half], p.rank, channel, values, p.whole_z);
          if (kSpatial) store_shared(z_address(row_of_sums(t, half)) + channel * sizeof(Element), rows[half]);
        }
        if (!kSpatial) M::to_operand(rows, operands[t][pair]);
      }
    }
    if (kSpatial && threadIdx.x < kZBytes / 16) store_shared(z_address(kTilePixels) + threadIdx.x * 16, uint4{});
  }

  // Address of row `row` of z in shared memory; row kTilePixels is that of all columns outside the image.
  __device__ uint32_t z_address(int32_t row) const { return shared + row * kZBytes; }

  // y = u * z, stored
  __device__ void second_product(const uint32_t (&operands)[kWarpTiles][kRankPairs][kPairDepths][4]) {
    int32_t at[kWarpTiles][2];
    int32_t lines[kWarpTiles], columns[kWarpTiles];  // of z: the lane's row of A, for tap 0
#pragma unroll
    for (int t = 0; t < kWarpTiles; ++t) {
      for (int half = 0; half < 2; ++half) {
        at[t][half] = position(row_of_sums(t, half), p.tile_w, column0, p.out_width);
      }
      const int32_t i = min(tile_start(t) + lane % 16, p.tile_n * p.tile_h * p.tile_w - 1);
      lines[t] = i / p.tile_w * p.z_tile_w - z_column0;
      columns[t] = (column0 + i % p.tile_w) * p.stride_w - p.pad_w;
    }
    int32_t item = p.slices * p.items_per_slice;
    for (int32_t chunk = 0; chunk < p.chunks; ++chunk) {
      Sums<kChunkPairs> sums = {};
      for (int32_t tap = 0; tap < p.second_kernel_w; ++tap) {
        const uint32_t weights = next(item++);
        uint32_t pixels[kWarpTiles];
#pragma unroll
        for (int t = 0; t < kWarpTiles; ++t) {
          const int32_t column = columns[t] + tap * p.dilation_w;
          pixels[t] = z_address(column >= 0 && column < p.width ? lines[t] + column : kTilePixels) + lane / 16 * 16;
        }
#pragma unroll
        for (int d = 0; d < kRankPairs * kPairDepths; ++d) {
          uint32_t a[kWarpTiles][4];
#pragma unroll
          for (int t = 0; t < kWarpTiles; ++t) {
            if (kSpatial) {
              M::load_a(a[t], pixels[t] + d * kDepthBytes);
            } else {
#pragma unroll
              for (int i = 0; i < 4; ++i) a[t][i] = operands[t][d / kPairDepths][d % kPairDepths][i];
            }
          }
          multiply<kChunkPairs>(sums, a, weights + d * kChunkPairs * kPairBytes);
        }
      }
      store_output(sums, at, chunk);
    }
  }

  __device__ void store_output(const Sums<kChunkPairs>& sums, const int32_t (&at)[kWarpTiles][2], int32_t chunk) {
#pragma unroll
    for (int pair = 0; pair < kChunkPairs; ++pair) {
      const int32_t channel = (chunk * kChunkPairs + pair) * kPair + lane % 4 * 4;
      float bias[4] = {};
      if (p.bias) load_channels(p.bias, 0, p.out_channels, channel, bias, p.whole_output);
#pragma unroll
      for (int t = 0; t < kWarpTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (at[t][half] < 0) continue;
          float added[4] = {};
          if (p.residual) load_channels(p.residual, at[t][half], p.out_channels, channel, added, p.whole_output);
          float values[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float value = sums[t][2 * pair + i / 2][2 * half + i % 2] + bias[i] + added[i];
            values[i] = p.relu && value < 0 ? 0 : value;
          }
          store_channels(p.output, at[t][half], p.out_channels, channel, values, p.whole_output);
        }
      }
    }
  }

  __device__ int32_t tile_start(int t) const { return (t * kWarps + warp) * kWarpPixels; }
  __device__ int32_t row_of_sums(int t, int half) const { return tile_start(t) + half * 8 + lane / 4; }

  // Number of the pixel, in a batch of images `width` wide, that pixel i of a tile is; -1 if it is none.
  __device__ int32_t position(int32_t i, int32_t tile_width, int32_t first_column, int32_t width) const {
    const int32_t line = i / tile_width, column = first_column + i % tile_width;
    const int32_t image = image0 + line / p.tile_h, row = row0 + line % p.tile_h;
    const bool inside = line < p.tile_n * p.tile_h && image < p.batch && row < p.out_height && column < width;
    return inside ? (image * p.out_height + row) * width + column : -1;
  }

  // Channels `channel` to channel + 3 of pixel `pixel`, those that are there.
  __device__ static void load_channels(const void* from, int32_t pixel, int32_t channels, int32_t channel,
                                       float (&values)[4], bool whole) {
    const Element* first = static_cast<const Element*>(from) + int64_t{pixel} * channels + channel;
    if (whole) {
      if (channel < channels) M::unpack(load_global(reinterpret_cast<const Vector*>(first)), values);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = channel + i < channels ? M::widen(load_global(first + i)) : 0;
    }
  }

  __device__ static void store_channels(void* to, int32_t pixel, int32_t channels, int32_t channel,
                                        const float (&values)[4], bool whole) {
    Element* first = static_cast<Element*>(to) + int64_t{pixel} * channels + channel;
    if (whole) {
      if (channel < channels) store_global(reinterpret_cast<Vector*>(first), M::pack(values));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (channel + i < channels) store_global(first + i, M::narrow(values[i]));
      }
    }
  }

  const LowRankConvLaunch& p;
  const uint32_t shared = shared_address();
  const int32_t lane = static_cast<int32_t>(threadIdx.x % 32), warp = static_cast<int32_t>(threadIdx.x / 32);
  int32_t image0, row0, column0;  // of the tile of the output
  int32_t z_column0;              // the first column of z that the block computes
  int32_t halo;                   // pixels of the input
};

// Blocks an SM that the registers are shared among, without spilling any.
template <Dtype kDtype, int kRankPairs>
constexpr int kResidentBlocks = kDtype != Dtype::kFloat32 && kRankPairs <= 4 ? 3 : 2;

template <Dtype kDtype, int kRankPairs, bool kSpatial, int kWarpTiles>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<kDtype, kRankPairs>)
    low_rank_conv_kernel(const __grid_constant__ LowRankConvLaunch launch) {
  LowRankConvBlock<kDtype, kRankPairs, kSpatial, kWarpTiles>(launch).run();
}

}  // namespace smoothk::cuda
