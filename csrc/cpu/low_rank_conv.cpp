// Low-rank convolution on the CPU: both convolutions band by band, so that z stays in cache.
//
// A band of the input is copied once, to float and with its padding. Then every tap is a matrix product that reads the
// band where it lies, in one of two ways: pixels of all channels times vectors of columns, or, where these are few,
// columns times vectors of pixels. A sum has one order, which the shape fixes, whatever the blocks: its bits do not
// depend on how the work is divided.
#include "../low_rank_conv.h"

#include <algorithm>

#include "low_rank_conv_input.h"
#include "low_rank_conv_kernel.h"
#include "scratch.h"
#include "simd.h"

namespace smoothk::cpu {
namespace {

constexpr int64_t kGrain = 256 << 10;          // multiplications that pay for a thread
constexpr int64_t kMostBlocks = 8;             // of pixels that go to a plane one after the other
constexpr int64_t kTogetherBytes = 128 << 10;  // of z that these have, in L2

constexpr const LowRankConvKernels* kCopies[] = SMOOTHK_COPIES(kLowRankConv);

thread_local Scratch shared_scratch;  // of the thread that calls, for all
thread_local Scratch own_scratch;

class Forward : LowRankConvInput {
 public:
  Forward(const LowRankConvArguments& arguments, const float* packed)
      : LowRankConvInput(arguments, *kCopies[simd_index()]), a_(arguments), packed_(packed) {}

  void operator()(const ParallelFor& parallel_for) {
    if (out_pixels(rows_) == 0 || all_channels() == 0) return;
    const int64_t bias_size = a_.bias ? s_.groups * padded(s_.out_channels) : 0;
    const int64_t partial_size = slices_ > 1 ? s_.groups * slices_ * z_size(rows_) : 0;
    shared_scratch.reserve(Scratch::bytes<float>(bias_size) + Scratch::bytes<float>(partial_size));
    if (a_.bias) widen_bias(shared_scratch.take<float>(bias_size));
    partial_ = shared_scratch.take<float>(partial_size);
    const int64_t first_work = z_pixels(1) * s_.rank * first_.depth();
    const int64_t second_work = out_pixels(1) * s_.out_channels * second_.depth();
    if (slices_ == 1) {
      const int64_t grain = ceil_div(kGrain, first_work + second_work + 1);
      return parallel_for(s_.groups * rows_, grain, [this](int64_t begin, int64_t end) { run_rows(begin, end); });
    }
    const int64_t parts = slices_ * ceil_div(s_.rank, kPanel), out_panels = ceil_div(s_.out_channels, kPanel);
    parallel_for(s_.groups * parts, ceil_div(kGrain * parts, rows_ * first_work),
                 [this](int64_t begin, int64_t end) { run_slices(begin, end); });
    parallel_for(s_.groups * out_panels, ceil_div(kGrain * out_panels, rows_ * second_work),
                 [this](int64_t begin, int64_t end) { run_columns(begin, end); });
  }

 private:
  // What a thread works on.
  struct Buffers : InputBuffers {
    float* z;              // of pixels or planes
    float* blocks;         // z once more, by blocks of pixels: [block][rank][block_]
    float *sums, *turned;  // a block of the output
  };

  const float* first_weights(int64_t group) const { return packed_ + group * (first_.size() + second_.size()); }
  const float* second_weights(int64_t group) const { return first_weights(group) + first_.size(); }
  const float* bias_of(int64_t group, int64_t column) const {
    return bias_ ? bias_ + group * padded(s_.out_channels) + column : nullptr;
  }

  void widen_bias(float* bias) {
    const int64_t pitch = padded(s_.out_channels);
    std::fill_n(bias, s_.groups * pitch, 0.0f);
    kernels_.widen(dtype_, a_.bias, s_.out_channels, bias, pitch, s_.groups, s_.out_channels);
    bias_ = bias;
  }

  Buffers buffers(int64_t rows) const {
    const bool widens = dtype_ != Dtype::kFloat32 && (input_layout_ == Layout::kChannelsLast) == planes_in_;
    const int64_t table = planes_in_ ? block_ : std::max(runs_ * z_pixels(rows), second_.taps * out_pixels(rows));
    const int64_t band = planes_in_ ? s_.in_channels * plane_pitch(rows) : band_size(rows);
    const int64_t widened = widens ? s_.in_channels * std::max(s_.width, block_) : 0;
    const int64_t z = planes_in_ ? z_pitch() * padded(flat_size(rows) + block_) : z_size(rows) + z_pitch();
    const int64_t blocks = planes_in_ || planes_out_ ? (out_pixels(rows) + block_) * s_.rank : 0;
    const int64_t sums = block_ * padded(s_.out_channels), turned = sums;
    Scratch& scratch = own_scratch;
    scratch.reserve(Scratch::bytes<const float*>(table) + Scratch::bytes<float>(band) + Scratch::bytes<float>(widened) +
                    Scratch::bytes<float>(z) + Scratch::bytes<float>(blocks) + Scratch::bytes<float>(sums) +
                    Scratch::bytes<float>(turned));
    return {{scratch.take<const float*>(table), scratch.take<float>(band), scratch.take<float>(widened)},
            scratch.take<float>(z),
            scratch.take<float>(blocks),
            scratch.take<float>(sums),
            scratch.take<float>(turned)};
  }

  void run_rows(int64_t begin, int64_t end) {
    for (int64_t group = begin / rows_, stop; begin < end; ++group, begin = stop) {
      stop = std::min(end, (group + 1) * rows_);
      const auto run = planes_in_ ? &Forward::run_planes : &Forward::run_pixels;
      (this->*run)(group, begin - group * rows_, stop - group * rows_);
    }
  }

  // Both convolutions of rows [begin, end), band by band.
  void run_pixels(int64_t group, int64_t begin, int64_t end) {
    const int64_t row_bytes = (row_stride_ * row_pitch_ + z_size(1)) * static_cast<int64_t>(sizeof(float));
    int64_t most = std::max<int64_t>(1, kBandBytes / std::max<int64_t>(row_bytes, 1));
    if (most > s_.out_height) most -= most % s_.out_height;
    const int64_t rows = ceil_div(end - begin, ceil_div(end - begin, most));
    const Buffers b = buffers(rows);
    for (int64_t r = begin; r < end; r += rows) {
      const int64_t count = std::min(rows, end - r);
      read_band(group, r, r + count, b);
      multiply_first(group, b.table, z_pixels(count), 0, steps_, 0, s_.rank, b.z);
      finish_pixels(group, r, count, 0, s_.out_channels, b);
    }
  }

  // The same with the input as planes, of one image at a time.
  void run_planes(int64_t group, int64_t begin, int64_t end) {
    const int64_t row_bytes = (s_.in_channels + s_.rank) * plane_row() * static_cast<int64_t>(sizeof(float));
    const int64_t most = std::clamp<int64_t>(kBandBytes / std::max<int64_t>(row_bytes, 1), 1, s_.out_height);
    const int64_t rows = ceil_div(s_.out_height, ceil_div(s_.out_height, most));
    const int64_t band_pitch = plane_pitch(rows), z_row = padded(flat_size(rows) + block_);
    const Buffers b = buffers(rows);
    for (int64_t r = begin, count; r < end; r += count) {
      count = std::min({rows, end - r, s_.out_height - r % s_.out_height});
      const int64_t first = r * s_.out_width, pixels = out_pixels(count);
      if (one_tap()) {
        for (int64_t p = 0; p < pixels; p += block_) {
          const int64_t part = std::min(block_, pixels - p);
          read_pixels(group, first + p, part, b.band, block_, b.widened);
          multiply_first(group, b.band, band_pitch, part, b.blocks + p * s_.rank, block_);
        }
      } else {
        read_planes(group, r, count, b, band_pitch);
        multiply_first(group, b.band, band_pitch, flat_size(count), b.z, z_row);
        close_gaps(b.z, z_row, count, b.blocks);
      }
      for (int64_t p = 0; p < pixels && (a_.z || !planes_out_); p += block_) {
        const int64_t part = std::min(block_, pixels - p);
        kernels_.transpose(b.blocks + p * s_.rank, block_, s_.rank, part, b.z, z_pitch());
        if (a_.z) write_z(group, first + p, part, b.z);
        for (int64_t i = 0; i < part; ++i) b.table[i] = b.z + i * z_pitch();
        if (!planes_out_) multiply_second(group, first + p, part, 0, s_.out_channels, b);
      }
      if (planes_out_) multiply_blocks(group, first, pixels, b.blocks, 0, s_.out_channels, b.sums);
    }
  }

  // Parts of z by (group, slice of the depth, panel).
  void run_slices(int64_t begin, int64_t end) {
    const int64_t pixels = z_pixels(rows_), panels = ceil_div(s_.rank, kPanel);
    const Buffers b = buffers(rows_);
    for (int64_t at = begin, last_group = -1, stop; at < end; at = stop) {
      const int64_t part = at / panels, group = part / slices_, slice = part % slices_, first_panel = part * panels;
      stop = std::min(end, first_panel + panels);
      if (group != last_group) read_band(group, 0, rows_, b);
      multiply_first(group, b.table, pixels, steps_ * slice / slices_, steps_ * (slice + 1) / slices_,
                     (at - first_panel) * kPanel, std::min((stop - first_panel) * kPanel, s_.rank),
                     partial_ + part * z_size(rows_));
      last_group = group;
    }
  }

  // Parts of the output by (group, panel).
  void run_columns(int64_t begin, int64_t end) {
    const int64_t size = z_size(rows_), panels = ceil_div(s_.out_channels, kPanel);
    const Buffers b = buffers(rows_);
    for (int64_t at = begin, stop; at < end; at = stop) {
      const int64_t group = at / panels, first_panel = group * panels;
      stop = std::min(end, first_panel + panels);
      const float *part = partial_ + group * slices_ * size, *sum = part;
      for (int64_t slice = 1; slice < slices_; ++slice, sum = b.z) {
        kernels_.finish(Dtype::kFloat32, sum, 0, part + slice * size, false, b.z, 0, 1, size);
      }
      finish_pixels(group, 0, rows_, (at - first_panel) * kPanel,
                    std::min((stop - first_panel) * kPanel, s_.out_channels), b);
    }
  }

  // Columns [begin, end) of z of pixels, over some steps of the depth.
  void multiply_first(int64_t group, const float* const* table, int64_t pixels, int64_t step, int64_t last_step,
                      int64_t begin, int64_t end, float* z) {
    const int64_t depth = first_.depth(), tiled = s_.rank - first_.dots();
    PixelProduct product{};
    product.row_pitch = pixels;
    product.pixels = pixels;
    product.panel_pitch = depth * kPanel;
    product.columns = std::min(end, tiled) - begin;
    product.out = z + begin;
    product.out_pitch = z_pitch();
    product.padded = true;
    if (end > tiled) multiply_dots(group, table, pixels, step, last_step, z + tiled);
    for (; step < last_step && product.columns > 0; ++step) {
      const int64_t run = pieces_ > 1 ? step / pieces_ : step * runs_per_step_;
      product.rows = table + run * pixels;
      product.from = pieces_ > 1 ? step % pieces_ * piece_length_ : 0;
      product.runs = std::min(runs_per_step_, runs_ - run);
      product.length = std::min(piece_length_, run_length_ - product.from);
      product.panels = first_weights(group) + begin * depth + (run * run_length_ + product.from) * kPanel;
      kernels_.multiply_pixels(product);
      product.accumulate = true;
    }
  }

  // The columns that are no panels. A run at a time, or what the steps have of it: sums over lanes are few.
  void multiply_dots(int64_t group, const float* const* table, int64_t pixels, int64_t step, int64_t last_step,
                     float* z) {
    const auto depth_of = [this](int64_t i) {
      return pieces_ > 1 ? i / pieces_ * run_length_ + std::min(i % pieces_ * piece_length_, run_length_)
                         : std::min(i * runs_per_step_, runs_) * run_length_;
    };
    const int64_t begin = depth_of(step), end = depth_of(last_step);
    DotProduct product{};
    product.row_pitch = pixels;
    product.pixels = pixels;
    product.run_pitch = run_length_;
    product.column_pitch = first_.depth();
    product.columns = first_.dots();
    product.out = z;
    product.out_pitch = z_pitch();
    for (int64_t k = begin, whole; k < end; k += product.runs * product.length) {
      product.from = k % run_length_;
      whole = product.from == 0 ? (end - k) / run_length_ : 0;
      product.runs = std::max<int64_t>(whole, 1);
      product.length = whole > 0 ? run_length_ : std::min(run_length_ - product.from, end - k);
      product.rows = table + k / run_length_ * pixels;
      product.weights = first_weights(group) + padded(s_.rank) * first_.depth() + k;
      kernels_.multiply_dots(product);
      product.accumulate = true;
    }
  }

  // All columns of z, of planes.
  void multiply_first(int64_t group, const float* band, int64_t band_pitch, int64_t size, float* z, int64_t z_row) {
    int64_t shifts[kMostTaps];
    for (int64_t tap = 0; tap < first_.taps; ++tap) {
      shifts[tap] = tap / kernel_w_ * s_.dilation_h * plane_row() + tap % kernel_w_ * dilation_w_;
    }
    PlaneProduct product{};
    product.plane_pitch = band_pitch;
    product.shifts = shifts;
    product.taps = first_.taps;
    product.tap_pitch = s_.in_channels * kPanel;
    product.panel_pitch = first_.depth() * kPanel;
    product.columns = s_.rank;
    product.out_pitch = z_row;
    const int64_t read = s_.kernel_h * (block_ + 2 * kPanel) * static_cast<int64_t>(sizeof(float));  // of a plane
    const int64_t step = std::max<int64_t>(1, kStepBytes / read);
    for (int64_t p = 0; p < size; p += block_) {
      product.vectors = ceil_div(std::min(block_, size - p), kPanel);
      product.out = z + p;
      for (int64_t c = 0; c < s_.in_channels; c += step) {
        product.planes = band + c * band_pitch + p;
        product.channels = std::min(step, s_.in_channels - c);
        product.panels = first_weights(group) + c * kPanel;
        product.accumulate = c > 0;
        kernels_.multiply_planes(product);
      }
    }
  }

  // From planes whose rows have gaps to blocks.
  void close_gaps(const float* z, int64_t z_row, int64_t rows, float* blocks) {
    for (int64_t y = 0, p = 0; y < rows; ++y, z += plane_row()) {
      for (int64_t x = 0, count; x < s_.out_width; x += count, p += count) {
        count = std::min(s_.out_width - x, block_ - p % block_);
        float* to = blocks + p / block_ * block_ * s_.rank + p % block_;
        kernels_.widen(Dtype::kFloat32, z + x, z_row, to, block_, s_.rank, count);
      }
    }
  }

  // What follows on z of pixels: columns [begin, end) of the output.
  void finish_pixels(int64_t group, int64_t row, int64_t rows, int64_t begin, int64_t end, const Buffers& b) {
    if (a_.z && begin == 0) write_z(group, z_pixels(row), z_pixels(rows), b.z);
    const int64_t first = out_pixels(row), pixels = out_pixels(rows);
    if (planes_out_) {
      for (int64_t p = 0; p < pixels; p += block_) {
        kernels_.transpose(b.z + p * z_pitch(), z_pitch(), std::min(block_, pixels - p), s_.rank,
                           b.blocks + p * s_.rank, block_);
      }
      multiply_blocks(group, first, pixels, b.blocks, begin, end, b.sums);
    } else {
      point_to_z(rows, b.z, b.table);
      multiply_second(group, first, pixels, begin, end, b);
    }
  }

  void write_z(int64_t group, int64_t pixel, int64_t pixels, const float* z) {
    const int64_t pitch = s_.groups * s_.rank, at = pixel * pitch + group * s_.rank;
    kernels_.finish(dtype_, z, z_pitch(), nullptr, false, advance(a_.z, at), pitch, pixels, s_.rank);
  }

  // Enters for every tap of u where it reads z for every pixel. Behind z lie zeros, for taps outside.
  void point_to_z(int64_t rows, float* z, const float** table) {
    float* zero = z + z_size(rows);
    std::fill_n(zero, z_pitch(), 0.0f);
    for (int64_t tap = 0; tap < second_.taps; ++tap) {
      for (int64_t row = 0; row < rows; ++row) {
        for (int64_t x = 0; x < s_.out_width; ++x) {
          const int64_t at = s_.spatial ? x * s_.stride_w + tap * s_.dilation_w - s_.pad_w : x;
          *table++ = 0 <= at && at < s_.z_width() ? z + z_size(row) + at * z_pitch() : zero;
        }
      }
    }
  }

  // Channels [begin, end) of `pixels` pixels of the output from the pixel `first` on.
  void multiply_second(int64_t group, int64_t first, int64_t pixels, int64_t begin, int64_t end, const Buffers& b) {
    const int64_t channel = group * s_.out_channels + begin;
    PixelProduct product{};
    product.rows = b.table;
    product.row_pitch = product.pixels = pixels;
    product.runs = second_.taps;
    product.length = s_.rank;
    product.panels = second_weights(group) + begin * second_.depth();
    product.panel_pitch = second_.depth() * kPanel;
    product.columns = end - begin;
    product.epilogue.bias = bias_of(group, begin);
    const int64_t at = first * all_channels() + channel;
    if (dtype_ == Dtype::kFloat32 && output_layout_ == Layout::kChannelsLast) {
      product.out = static_cast<float*>(a_.output) + at;
      product.out_pitch = all_channels();
      product.epilogue.residual = static_cast<const float*>(advance(a_.residual, at));
      product.epilogue.relu = a_.relu;
      return kernels_.multiply_pixels(product);
    }
    product.out = b.sums;
    product.out_pitch = padded(end - begin);
    product.padded = true;
    for (int64_t p = 0; p < pixels; p += block_) {
      product.pixels = std::min(block_, pixels - p);
      product.rows = b.table + p;
      kernels_.multiply_pixels(product);
      if (output_layout_ == Layout::kChannelsLast) {
        finish(b.sums, product.out_pitch, at + p * all_channels(), all_channels(), product.pixels, end - begin);
      } else {
        for_images(first + p, product.pixels, channel, [&](int64_t to, int64_t i, int64_t run) {
          kernels_.transpose(b.sums + i * product.out_pitch, product.out_pitch, run, end - begin, b.turned, block_);
          finish(b.turned, block_, to, out_plane(), end - begin, run);
        });
      }
    }
  }

  // The same for channels-first output, from blocks of z: several at once, so that a plane gets many pixels in a row,
  // as far as they stay in cache.
  void multiply_blocks(int64_t group, int64_t first, int64_t pixels, const float* blocks, int64_t begin, int64_t end,
                       float* sums) {
    const int64_t block_bytes = block_ * std::max<int64_t>(s_.rank, 1) * static_cast<int64_t>(sizeof(float));
    const int64_t together = std::clamp<int64_t>(kTogetherBytes / block_bytes, 1, kMostBlocks);
    const int64_t columns = together > 1 ? kPanel : end - begin;
    for (int64_t p = 0, count; p < pixels; p += count) {
      count = std::min(together * block_, pixels - p);
      for (int64_t column = begin; column < end; column += columns) {
        const int64_t last = std::min(column + columns, end);
        for (int64_t q = p; q < p + count; q += block_) {
          multiply_block(group, first + q, std::min(block_, p + count - q), blocks + q * s_.rank, column, last, sums);
        }
      }
    }
  }

  void multiply_block(int64_t group, int64_t first, int64_t pixels, const float* block, int64_t begin, int64_t end,
                      float* sums) {
    const int64_t channel = group * s_.out_channels + begin, shift = 0;
    PlaneProduct product{};
    product.planes = block;
    product.plane_pitch = block_;
    product.shifts = &shift;
    product.vectors = ceil_div(pixels, kPanel);
    product.taps = 1;
    product.channels = s_.rank;
    product.panels = second_weights(group) + begin * s_.rank;
    product.panel_pitch = s_.rank * kPanel;
    product.columns = end - begin;
    product.out = sums;
    product.out_pitch = block_;
    product.epilogue = {bias_of(group, begin), nullptr, false};
    const bool whole = pixels % kPanel == 0 && first % out_plane() + pixels <= out_plane();
    for_images(first, pixels, channel, [&](int64_t at, int64_t i, int64_t run) {
      if (dtype_ == Dtype::kFloat32 && whole) {
        product.out = static_cast<float*>(a_.output) + at;
        product.out_pitch = out_plane();
        product.epilogue.residual = static_cast<const float*>(advance(a_.residual, at));
        product.epilogue.relu = a_.relu;
        return kernels_.multiply_planes(product);
      }
      if (i == 0) kernels_.multiply_planes(product);
      finish(sums + i, block_, at, out_plane(), end - begin, run);
    });
  }

  // f(offset in the output, offset in the block, pixels) for the parts of a block that lie in one image each.
  template <class F>
  void for_images(int64_t first, int64_t pixels, int64_t channel, F f) {
    for (int64_t i = 0, run; i < pixels; i += run) {
      const int64_t image = (first + i) / out_plane(), at = (first + i) % out_plane();
      run = std::min(pixels - i, out_plane() - at);
      f((image * all_channels() + channel) * out_plane() + at, i, run);
    }
  }

  void finish(const float* from, int64_t pitch, int64_t at, int64_t out_pitch, int64_t rows, int64_t columns) {
    kernels_.finish(dtype_, from, pitch, advance(a_.residual, at), a_.relu, advance(a_.output, at), out_pitch, rows,
                    columns);
  }

  const LowRankConvArguments& a_;
  const float* packed_;
  const float* bias_ = nullptr;
  float* partial_ = nullptr;  // [group][slice][pixel][z_pitch]
};

}  // namespace

void low_rank_conv(const LowRankConvArguments& arguments, const float* packed, const ParallelFor& parallel_for) {
  Forward(arguments, packed)(parallel_for);
}

}  // namespace smoothk::cpu
