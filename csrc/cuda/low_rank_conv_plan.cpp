// How the fused low-rank convolution is cut into blocks; runs on the host, at every call.
#include <algorithm>
#include <array>
#include <limits>

#include "low_rank_conv.h"

namespace smoothk::cuda {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr int64_t kItemBytes = 12 << 10;  // of v at a time, where a tap is not more: 64 to 96 mma a warp and barrier
constexpr int64_t kMaxTilePixels = kWarpPixels * kThreads / 32 * kMaxWarpTiles;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

int64_t output_chunk(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? kOutputChunk<Dtype::kFloat32> : kOutputChunk<Dtype::kBFloat16>;
}

int64_t padded_rank(const LowRankConvShape& shape) { return divide_up(shape.rank, 16) * 16; }

bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

bool is_taken(const LowRankConvArguments& arguments) {
  const LowRankConvShape& shape = arguments.shape;
  if (arguments.dtype == Dtype::kFloat64 || arguments.input_layout != Layout::kChannelsLast ||
      arguments.output_layout != Layout::kChannelsLast || shape.groups != 1) {
    return false;
  }
  if (shape.in_channels * bytes_of(arguments.dtype) % 16 != 0 || !aligned(arguments.input, 16)) return false;
  for (int64_t positive : {shape.batch, shape.in_channels, shape.rank, shape.out_channels, shape.height, shape.width,
                           shape.out_height, shape.out_width, shape.kernel_h, shape.kernel_w, shape.stride_h,
                           shape.stride_w, shape.dilation_h, shape.dilation_w}) {
    if (positive < 1 || positive > kMaxInt) return false;
  }
  // Positions of taps, also of those outside the image, are 32-bit numbers.
  for (auto [size, stride, kernel, dilation, pad] :
       {std::array{shape.out_height, shape.stride_h, shape.kernel_h, shape.dilation_h, shape.pad_h},
        std::array{shape.out_width, shape.stride_w, shape.kernel_w, shape.dilation_w, shape.pad_w}}) {
    if (pad < 0 || pad > kMaxInt / 2 || (size + kMaxTilePixels) * stride + kernel * dilation > kMaxInt / 2) {
      return false;
    }
  }
  // So are those of pixels in a batch, of z and of the output; channels are counted in 64 bits.
  const int64_t columns = std::max(shape.out_width, shape.z_width());
  return shape.rank <= kMaxRank && shape.kernel_h * shape.kernel_w <= kMaxTaps &&
         shape.batch <= kMaxInt / shape.out_height / columns;
}

// Tiles of `tile_w` columns and of as many rows and images as make no more than `pixels`; false if that is none.
bool set_tile(const LowRankConvShape& shape, int64_t tile_w, int64_t pixels, LowRankConvLaunch& launch) {
  int64_t z_w = tile_w;
  if (shape.spatial && tile_w == shape.out_width) {
    z_w = shape.width;
  } else if (shape.spatial) {
    z_w = std::min(shape.width, (tile_w - 1) * shape.stride_w + (shape.kernel_w - 1) * shape.dilation_w + 1);
  }
  const int64_t row_pixels = std::max(tile_w, z_w);
  if (row_pixels > pixels) return false;
  const int64_t tiles_h = divide_up(shape.out_height, pixels / row_pixels);
  const int64_t tile_h = divide_up(shape.out_height, tiles_h);
  const bool whole = tile_w == shape.out_width && tiles_h == 1;
  const int64_t tile_n = whole ? std::min(shape.batch, pixels / (row_pixels * tile_h)) : 1;
  const int64_t tiles_w = divide_up(shape.out_width, tile_w);
  const int64_t halo_h = (tile_h - 1) * shape.stride_h + (shape.kernel_h - 1) * shape.dilation_h + 1;
  const int64_t halo_w =
      shape.spatial ? z_w : (tile_w - 1) * shape.stride_w + (shape.kernel_w - 1) * shape.dilation_w + 1;
  launch.tile_n = static_cast<int32_t>(tile_n);
  launch.tile_h = static_cast<int32_t>(tile_h);
  launch.tile_w = static_cast<int32_t>(tile_w);
  launch.tiles_h = static_cast<int32_t>(tiles_h);
  launch.tiles_w = static_cast<int32_t>(tiles_w);
  launch.z_tile_w = static_cast<int32_t>(z_w);
  launch.halo_h = static_cast<int32_t>(halo_h);
  launch.halo_w = static_cast<int32_t>(halo_w);
  launch.blocks = divide_up(shape.batch, tile_n) * tiles_h * tiles_w;
  return true;
}

// Whether the tiles' parts of z make all of it. Taps may skip columns, but a tile of the full width computes every one.
bool covers_z(const LowRankConvShape& shape, const LowRankConvLaunch& launch) {
  const int64_t reach = (shape.kernel_w - 1) * shape.dilation_w;
  return !shape.spatial || launch.tiles_w == 1 ||
         (shape.stride_w <= reach + 1 &&
          (shape.out_width - 1) * shape.stride_w - shape.pad_w + reach >= shape.width - 1);
}

// Lays out the shared memory of a tile; false if it does not fit.
bool set_shared(const LowRankConvArguments& arguments, int64_t pixels, int64_t shared_limit,
                LowRankConvLaunch& launch) {
  const int64_t pixel_bytes = arguments.shape.in_channels * bytes_of(arguments.dtype);
  const int64_t image_bytes = arguments.shape.height * arguments.shape.width * pixel_bytes;
  const int64_t halo = int64_t{launch.tile_n} * launch.halo_h * launch.halo_w;
  const int64_t rank_bytes = padded_rank(arguments.shape) * bytes_of(arguments.dtype);
  const int64_t z_bytes = arguments.shape.spatial ? (pixels + 1) * (rank_bytes + 16) : 0;
  const int64_t weights_at = divide_up(std::max(launch.input_slots * halo * kPixelBytes, z_bytes), 128) * 128;
  const int64_t offsets_at = weights_at + kStages * launch.weights_bytes;
  const int64_t shared_bytes = offsets_at + 4 * halo;
  // The input's offsets within the tile's images are 32-bit numbers of 16 bytes.
  if (shared_bytes > shared_limit || launch.tile_n * image_bytes / 16 > kMaxInt) return false;
  launch.weights_at = static_cast<int32_t>(weights_at);
  launch.offsets_at = static_cast<int32_t>(offsets_at);
  launch.shared_bytes = static_cast<int32_t>(shared_bytes);
  return true;
}

void set_shape(const LowRankConvShape& shape, LowRankConvLaunch& launch) {
  launch.batch = static_cast<int32_t>(shape.batch);
  launch.height = static_cast<int32_t>(shape.height);
  launch.width = static_cast<int32_t>(shape.width);
  launch.in_channels = static_cast<int32_t>(shape.in_channels);
  launch.rank = static_cast<int32_t>(shape.rank);
  launch.out_channels = static_cast<int32_t>(shape.out_channels);
  launch.out_height = static_cast<int32_t>(shape.out_height);
  launch.out_width = static_cast<int32_t>(shape.out_width);
  launch.z_width = static_cast<int32_t>(shape.z_width());
  launch.stride_h = static_cast<int32_t>(shape.stride_h);
  launch.stride_w = static_cast<int32_t>(shape.stride_w);
  launch.pad_h = static_cast<int32_t>(shape.pad_h);
  launch.pad_w = static_cast<int32_t>(shape.pad_w);
  launch.dilation_h = static_cast<int32_t>(shape.dilation_h);
  launch.dilation_w = static_cast<int32_t>(shape.dilation_w);
}

void set_tensors(const LowRankConvArguments& arguments, const void* packed, LowRankConvLaunch& launch) {
  const LowRankConvShape& shape = arguments.shape;
  const int64_t element = bytes_of(arguments.dtype), vector = 4 * element;
  launch.input = arguments.input;
  launch.v = packed;
  launch.u = static_cast<const char*>(packed) + low_rank_conv_packed_v_size(shape, arguments.dtype) * element;
  launch.bias = arguments.bias;
  launch.residual = arguments.residual;
  launch.output = arguments.output;
  launch.z = arguments.z;
  launch.relu = arguments.relu;
  launch.whole_z = shape.rank % 4 == 0 && aligned(arguments.z, vector);
  launch.whole_output = shape.out_channels % 4 == 0 && aligned(arguments.output, vector) &&
                        aligned(arguments.residual, vector) && aligned(arguments.bias, vector);
}

// Fills what does not depend on the tile.
bool set_items(const LowRankConvShape& shape, Dtype dtype, LowRankConvLaunch& launch) {
  const int64_t element = bytes_of(dtype), chunk = output_chunk(dtype);
  const int64_t taps = shape.kernel_h * (shape.spatial ? 1 : shape.kernel_w);
  const int64_t tap_bytes = padded_rank(shape) * kSliceBytes, second_bytes = chunk * padded_rank(shape) * element;
  const int64_t most_taps = std::max<int64_t>(std::max(kItemBytes, second_bytes) / tap_bytes, 1);
  const int64_t taps_per_item = divide_up(taps, divide_up(taps, most_taps));
  const int64_t items_per_slice = divide_up(taps, taps_per_item);
  const int64_t slices = divide_up(shape.in_channels * element, kSliceBytes);
  const int64_t chunks = divide_up(shape.out_channels, chunk);
  const int64_t second_kernel_w = shape.spatial ? shape.kernel_w : 1;
  if (slices * items_per_slice + chunks * second_kernel_w > kMaxInt) return false;
  launch.slices = static_cast<int32_t>(slices);
  launch.chunks = static_cast<int32_t>(chunks);
  launch.taps = static_cast<int32_t>(taps);
  launch.items_per_slice = static_cast<int32_t>(items_per_slice);
  launch.taps_per_item = static_cast<int32_t>(taps_per_item);
  launch.second_kernel_w = static_cast<int32_t>(second_kernel_w);
  launch.first_kernel_w = static_cast<int32_t>(shape.spatial ? 1 : shape.kernel_w);
  // Two slices where the one being read outlasts kStages - 1 items, and one more where each item is a slice.
  launch.input_slots = static_cast<int32_t>(std::min<int64_t>(items_per_slice == 1 ? kStages : 2, slices));
  launch.weights_bytes = static_cast<int32_t>(std::max(launch.taps_per_item * tap_bytes, second_bytes));
  return true;
}

// The cheapest tile of up to `pixels`: the work of a block is about that of `pixels`, whatever their number, and loads.
bool set_best_tile(const LowRankConvArguments& arguments, int64_t pixels, int64_t shared_limit,
                   LowRankConvLaunch& launch) {
  LowRankConvLaunch best{};
  int64_t best_cost = std::numeric_limits<int64_t>::max();
  for (int64_t most = pixels; most > 0; most /= 2) {
    for (int64_t widest = most; widest > 0; widest /= 2) {
      const int64_t tile_w = divide_up(arguments.shape.out_width, divide_up(arguments.shape.out_width, widest));
      if (!set_tile(arguments.shape, tile_w, most, launch)) continue;
      if (!set_shared(arguments, pixels, shared_limit, launch) || launch.blocks > kMaxInt) continue;
      if (arguments.z && !covers_z(arguments.shape, launch)) continue;
      const int64_t cost = launch.blocks * (2 * pixels + int64_t{launch.tile_n} * launch.halo_h * launch.halo_w);
      if (cost < best_cost) best = launch, best_cost = cost;
    }
  }
  launch = best;
  launch.warp_tiles = static_cast<int32_t>(kMaxWarpTiles * pixels / kMaxTilePixels);
  return best.blocks > 0;
}

}  // namespace

int64_t low_rank_conv_packed_v_size(const LowRankConvShape& shape, Dtype dtype) {
  const int64_t slice = kSliceBytes / bytes_of(dtype);
  const int64_t taps = shape.kernel_h * (shape.spatial ? 1 : shape.kernel_w);
  return divide_up(shape.in_channels, slice) * slice * taps * padded_rank(shape);
}

int64_t low_rank_conv_packed_size(const LowRankConvShape& shape, Dtype dtype) {
  const int64_t chunk = output_chunk(dtype), taps = shape.spatial ? shape.kernel_w : 1;
  return low_rank_conv_packed_v_size(shape, dtype) +
         divide_up(shape.out_channels, chunk) * chunk * taps * padded_rank(shape);
}

bool plan_low_rank_conv(const LowRankConvArguments& arguments, const void* packed, const Device& device,
                        LowRankConvLaunch& launch) {
  const LowRankConvShape& shape = arguments.shape;
  launch = {};
  if (!is_taken(arguments) || !aligned(packed, 16) || !set_items(shape, arguments.dtype, launch)) return false;
  set_shape(shape, launch);
  set_tensors(arguments, packed, launch);
  LowRankConvLaunch half = launch;
  if (!set_best_tile(arguments, kMaxTilePixels, device.shared_limit, launch)) return false;
  // Smaller blocks load more weights in all, but leave no multiprocessor without work.
  if (launch.blocks < device.multiprocessors &&
      set_best_tile(arguments, kMaxTilePixels / 2, device.shared_limit, half)) {
    launch = half;
  }
  return true;
}

}  // namespace smoothk::cuda
