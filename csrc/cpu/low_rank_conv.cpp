// Low-rank convolution on the CPU: both convolutions band by band, so that z stays in cache.
//
// A band of the input is copied once, to channels last, float and with its padding. Then every tap is a matrix product
// whose rows are pixels of the band where they lie. A sum has one order, runs of taps and channels within, whatever the
// blocks: its bits do not depend on how the work is divided.
#include "../low_rank_conv.h"

#include <algorithm>
#include <memory>
#include <new>

#include "dtypes.h"
#include "low_rank_conv_kernel.h"

namespace smoothk::cpu {
namespace {

constexpr int64_t kBandBytes = 384 << 10;  // of the input: half an L2 cache is left for weights and output
constexpr int64_t kPanelBytes = 32 << 10;  // of weights, that stay in L1
constexpr int64_t kGrain = 256 << 10;      // multiplications that pay for a thread
constexpr int64_t kOutPixels = 48;         // of the output that are rearranged at once
constexpr int64_t kSlices = 4;             // that the depth is divided into where weights are read once

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t padded(int64_t columns) { return ceil_div(columns, kPanel) * kPanel; }

int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

const void* advance(const void* p, Dtype dtype, int64_t count) {
  return p ? static_cast<const char*>(p) + count * size_of(dtype) : nullptr;
}
void* advance(void* p, Dtype dtype, int64_t count) { return static_cast<char*>(p) + count * size_of(dtype); }

const LowRankConvKernels& choose_kernels() {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return x86_64_v4::kLowRankConv;
  if (__builtin_cpu_supports("x86-64-v3")) return x86_64_v3::kLowRankConv;
#endif
  return baseline::kLowRankConv;
}
const LowRankConvKernels& kernels = choose_kernels();

// One of the two weights as a matrix.
struct Factor {
  int64_t columns, taps, channels;
  int64_t depth() const { return taps * channels; }
  int64_t size() const { return padded(columns) * depth(); }
};

Factor first_factor(const LowRankConvShape& s) {
  return {s.rank, s.kernel_h * (s.spatial ? 1 : s.kernel_w), s.in_channels};
}

Factor second_factor(const LowRankConvShape& s) { return {s.out_channels, s.spatial ? s.kernel_w : 1, s.rank}; }

template <class T>
void pack(const Factor& factor, const T* weight, float* packed) {
  const int64_t depth = factor.depth();
  for (int64_t panel = 0; panel < factor.columns; panel += kPanel) {
    for (int64_t tap = 0; tap < factor.taps; ++tap) {
      for (int64_t c = 0; c < factor.channels; ++c) {
        for (int64_t n = panel; n < panel + kPanel; ++n) {
          *packed++ = n < factor.columns ? load(weight + n * depth + c * factor.taps + tap) : 0;
        }
      }
    }
  }
}

template <class T>
void pack_groups(const LowRankConvShape& s, const T* v, const T* u, float* packed) {
  const Factor first = first_factor(s), second = second_factor(s);
  for (int64_t g = 0; g < s.groups; ++g) {
    pack(first, v + g * first.columns * first.depth(), packed);
    packed += first.size();
    pack(second, u + g * second.columns * second.depth(), packed);
    packed += second.size();
  }
}

// Memory that a thread keeps from call to call, given out in pieces.
class Scratch {
 public:
  // After this, pieces of `bytes` in all can be taken. Earlier ones are gone.
  void reserve(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset(new (std::align_val_t{64}) char[bytes]);
      size_ = bytes;
    }
    used_ = 0;
  }

  template <class T>
  T* take(int64_t count) {
    T* result = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += bytes<T>(count);
    return result;
  }

  template <class T>
  static int64_t bytes(int64_t count) {
    return ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
  }

 private:
  struct Delete {
    void operator()(char* p) const { operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<char[], Delete> memory_;
  int64_t size_ = 0, used_ = 0;
};

thread_local Scratch shared_scratch;  // of the thread that calls, for all
thread_local Scratch own_scratch;

// Rows of pixels are counted through the batch: row r is row r % out_height of image r / out_height.
class Forward {
 public:
  Forward(const LowRankConvArguments& arguments, const float* packed)
      : a_(arguments), s_(arguments.shape), packed_(packed), first_(first_factor(s_)), second_(second_factor(s_)) {
    const int64_t reach_h = (s_.kernel_h - 1) * s_.dilation_h + 1, reach_w = (kernel_w_ - 1) * dilation_w_ + 1;
    const int64_t span_h = (s_.out_height - 1) * s_.stride_h + reach_h;
    span_w_ = (s_.z_width() - 1) * stride_w_ + reach_w;
    in_place_ = a_.dtype == Dtype::kFloat32 && a_.input_layout == Layout::kChannelsLast && s_.pad_h == 0 &&
                pad_w_ == 0 && span_h <= s_.height && span_w_ <= s_.width;
    // Of the rows between those that a kernel of height 1 reads no copy is made.
    row_step_ = s_.kernel_h == 1 && !in_place_ ? s_.stride_h : 1;
    row_stride_ = s_.stride_h / row_step_;
    reach_h_ = reach_h;
    pixel_pitch_ = in_place_ ? s_.groups * s_.in_channels : s_.in_channels;
    row_pitch_ = (in_place_ ? s_.width : span_w_) * pixel_pitch_;

    const bool merged = dilation_w_ == 1 && pixel_pitch_ == s_.in_channels;  // taps side by side are one run
    taps_per_run_ = merged ? kernel_w_ : 1;
    runs_ = first_.taps / taps_per_run_;
    run_length_ = taps_per_run_ * s_.in_channels;
    const int64_t panels = std::clamp<int64_t>(ceil_div(s_.rank, kPanel), 1, 3);
    const int64_t most = kPanelBytes / (panels * kPanel * sizeof(float));
    pieces_ = ceil_div(run_length_, most);
    piece_length_ = ceil_div(run_length_, std::max<int64_t>(pieces_, 1));
    runs_per_step_ = pieces_ > 1 ? 1 : std::max<int64_t>(1, most / std::max<int64_t>(run_length_, 1));
    steps_ = pieces_ > 1 ? runs_ * pieces_ : ceil_div(runs_, runs_per_step_);
  }

  void operator()(const ParallelFor& parallel_for) {
    const int64_t rows = s_.batch * s_.out_height;
    if (rows == 0 || s_.out_width == 0 || s_.groups * s_.out_channels == 0) return;
    const int64_t bias_size = s_.groups * padded(s_.out_channels);
    const bool by_weights = splits_weights();
    const int64_t slices = std::min(kSlices, steps_), z_size = rows * s_.z_width() * z_pitch();
    shared_scratch.reserve(Scratch::bytes<float>(bias_size) +
                           (by_weights ? Scratch::bytes<float>(s_.groups * slices * z_size) : 0));
    if (a_.bias) widen_bias(shared_scratch.take<float>(bias_size));
    if (!by_weights) {
      const int64_t work = s_.z_width() * s_.rank * first_.depth() + s_.out_width * s_.out_channels * second_.depth();
      parallel_for(s_.groups * rows, ceil_div(kGrain, work + 1), [this, rows](int64_t begin, int64_t end) {
        for (int64_t group = begin / rows; begin < end; ++group) {
          const int64_t stop = std::min(end, (group + 1) * rows);
          run_bands(group, begin - group * rows, stop - group * rows);
          begin = stop;
        }
      });
      return;
    }
    slices_ = slices;
    partial_ = shared_scratch.take<float>(s_.groups * slices * z_size);
    const int64_t panels = ceil_div(s_.rank, kPanel), out_panels = ceil_div(s_.out_channels, kPanel);
    const int64_t pixels = rows * s_.z_width();
    parallel_for(s_.groups * slices * panels, ceil_div(kGrain, pixels * first_.depth() * kPanel / slices + 1),
                 [this](int64_t begin, int64_t end) { run_slices(begin, end); });
    parallel_for(s_.groups * out_panels, ceil_div(kGrain, pixels * second_.depth() * kPanel + 1),
                 [this](int64_t begin, int64_t end) { run_columns(begin, end); });
  }

 private:
  int64_t z_pitch() const { return padded(s_.rank); }
  const float* first_weights(int64_t group) const { return packed_ + group * (first_.size() + second_.size()); }
  const float* second_weights(int64_t group) const { return first_weights(group) + first_.size(); }

  // Where there are few pixels, reading the weights takes the time: each thread reads its part.
  bool splits_weights() const {
    const int64_t rows = s_.batch * s_.out_height, weights = first_.size() * sizeof(float);
    const int64_t band = band_size(rows) * sizeof(float);
    return weights > kBandBytes && band <= kBandBytes && weights > 2 * band;
  }

  void widen_bias(float* bias) {
    const int64_t pitch = padded(s_.out_channels);
    for (int64_t g = 0; g < s_.groups; ++g) {
      kernels.widen(a_.dtype, advance(a_.bias, a_.dtype, g * s_.out_channels), bias + g * pitch, s_.out_channels);
      std::fill(bias + g * pitch + s_.out_channels, bias + (g + 1) * pitch, 0.0f);
    }
    bias_ = bias;
  }

  // Rows of the input that some rows of an image need, and at most those that `rows` rows of several images need.
  int64_t copied_rows(int64_t rows) const { return (rows - 1) * row_stride_ + reach_h_; }
  int64_t band_size(int64_t rows) const {
    if (in_place_) return 0;
    const int64_t images = std::min(rows, (rows - 1) / s_.out_height + 2);
    return ((rows - images) * row_stride_ + images * reach_h_ + images) * row_pitch_;
  }
  int64_t widened_size() const {
    const bool needed = a_.dtype != Dtype::kFloat32 && a_.input_layout == Layout::kChannelsFirst && !in_place_;
    return needed ? s_.in_channels * s_.width : 0;
  }
  int64_t out_block_size() const { return kOutPixels * padded(s_.out_channels); }

  void run_bands(int64_t group, int64_t begin, int64_t end) {
    const int64_t row_bytes =
        (row_stride_ * row_pitch_ + s_.z_width() * z_pitch()) * static_cast<int64_t>(sizeof(float));
    int64_t most = std::max<int64_t>(1, kBandBytes / std::max<int64_t>(row_bytes, 1));
    if (most > s_.out_height) most -= most % s_.out_height;
    const int64_t bands = ceil_div(end - begin, most), rows = ceil_div(end - begin, bands);
    const int64_t pixels = rows * s_.z_width(), out_pixels = rows * s_.out_width;
    const int64_t table_size = std::max(runs_ * pixels, second_.taps * out_pixels);
    Scratch& scratch = own_scratch;
    scratch.reserve(Scratch::bytes<const float*>(table_size) + Scratch::bytes<float>(band_size(rows)) +
                    Scratch::bytes<float>(widened_size()) + Scratch::bytes<float>((pixels + 1) * z_pitch()) +
                    2 * Scratch::bytes<float>(out_block_size()));
    const auto table = scratch.take<const float*>(table_size);
    const auto band = scratch.take<float>(band_size(rows)), widened = scratch.take<float>(widened_size());
    const auto z = scratch.take<float>((pixels + 1) * z_pitch());
    const auto block = scratch.take<float>(out_block_size()), turned = scratch.take<float>(out_block_size());
    for (int64_t r = begin; r < end; r += rows) {
      const int64_t count = std::min(rows, end - r);
      read_band(group, r, r + count, band, widened, table);
      multiply_first(group, table, count * s_.z_width(), 0, steps_, 0, s_.rank, z);
      if (a_.z) write_z(group, r, count, z);
      point_to_z(count, z, table);
      multiply_second(group, r * s_.out_width, count * s_.out_width, table, 0, s_.out_channels, block, turned);
    }
  }

  // Parts of z by (group, slice of the depth, panel).
  void run_slices(int64_t begin, int64_t end) {
    const int64_t rows = s_.batch * s_.out_height, pixels = rows * s_.z_width(), panels = ceil_div(s_.rank, kPanel);
    Scratch& scratch = own_scratch;
    scratch.reserve(Scratch::bytes<const float*>(runs_ * pixels) + Scratch::bytes<float>(band_size(rows)) +
                    Scratch::bytes<float>(widened_size()));
    const auto table = scratch.take<const float*>(runs_ * pixels);
    const auto band = scratch.take<float>(band_size(rows)), widened = scratch.take<float>(widened_size());
    for (int64_t at = begin, last_group = -1; at < end;) {
      const int64_t part = at / panels, group = part / slices_, slice = part % slices_;
      const int64_t stop = std::min(end, (part + 1) * panels), first_panel = at - part * panels;
      if (group != last_group) read_band(group, 0, rows, band, widened, table);
      multiply_first(group, table, pixels, steps_ * slice / slices_, steps_ * (slice + 1) / slices_,
                     first_panel * kPanel, std::min((stop - part * panels) * kPanel, s_.rank),
                     partial_ + part * pixels * z_pitch());
      at = stop;
      last_group = group;
    }
  }

  // Parts of the output by (group, panel).
  void run_columns(int64_t begin, int64_t end) {
    const int64_t rows = s_.batch * s_.out_height, out_pixels = rows * s_.out_width;
    const int64_t z_size = rows * s_.z_width() * z_pitch(), panels = ceil_div(s_.out_channels, kPanel);
    Scratch& scratch = own_scratch;
    scratch.reserve(Scratch::bytes<const float*>(second_.taps * out_pixels) +
                    Scratch::bytes<float>(z_size + z_pitch()) + 2 * Scratch::bytes<float>(out_block_size()));
    const auto table = scratch.take<const float*>(second_.taps * out_pixels);
    const auto z = scratch.take<float>(z_size + z_pitch());
    const auto block = scratch.take<float>(out_block_size()), turned = scratch.take<float>(out_block_size());
    for (int64_t at = begin; at < end;) {
      const int64_t group = at / panels, stop = std::min(end, (group + 1) * panels);
      const float* partial = partial_ + group * slices_ * z_size;
      const float* sum = partial;
      for (int64_t slice = 1; slice < slices_; ++slice) {
        kernels.finish(Dtype::kFloat32, sum, partial + slice * z_size, false, z, z_size);
        sum = z;
      }
      if (slices_ == 1) std::copy_n(partial, z_size, z);
      if (a_.z && at == group * panels) write_z(group, 0, rows, z);
      point_to_z(rows, z, table);
      multiply_second(group, 0, out_pixels, table, (at - group * panels) * kPanel,
                      std::min((stop - group * panels) * kPanel, s_.out_channels), block, turned);
      at = stop;
    }
  }

  // Copies what rows [begin, end) need, and enters for every run where it starts for every pixel of them.
  void read_band(int64_t group, int64_t begin, int64_t end, float* band, float* widened, const float** table) {
    const int64_t pixels = (end - begin) * s_.z_width();
    for (int64_t r = begin; r < end;) {
      const int64_t image = r / s_.out_height, y = r % s_.out_height;
      const int64_t rows = std::min(end - r, s_.out_height - y);
      const float* start = band;
      if (in_place_) {
        start = static_cast<const float*>(a_.input) + (image * s_.height + y * s_.stride_h) * row_pitch_ +
                group * s_.in_channels;
      } else {
        const int64_t copied = copied_rows(rows), top = y * s_.stride_h - s_.pad_h;
        for (int64_t i = 0; i < copied; ++i, band += row_pitch_) {
          copy_row(image, group, top + i * row_step_, band, widened);
        }
      }
      for (int64_t i = 0; i < rows; ++i, start += row_stride_ * row_pitch_) {
        for (int64_t run = 0; run < runs_; ++run) {
          const int64_t tap = run * taps_per_run_;
          const float* p =
              start + tap / kernel_w_ * s_.dilation_h * row_pitch_ + tap % kernel_w_ * dilation_w_ * pixel_pitch_;
          const float** entry = table + run * pixels + (r - begin + i) * s_.z_width();
          for (int64_t x = 0; x < s_.z_width(); ++x) entry[x] = p + x * stride_w_ * pixel_pitch_;
        }
      }
      r += rows;
    }
  }

  void copy_row(int64_t image, int64_t group, int64_t y, float* to, float* widened) {
    const int64_t c = s_.in_channels, left = std::min(pad_w_, span_w_);
    const bool inside = 0 <= y && y < s_.height;
    const int64_t width = inside ? std::min(s_.width, span_w_ - left) : 0;
    std::fill_n(to, inside ? left * c : row_pitch_, 0.0f);
    if (!inside) return;
    std::fill_n(to + (left + width) * c, (span_w_ - left - width) * c, 0.0f);
    to += left * c;
    if (a_.input_layout == Layout::kChannelsLast) {
      const void* from = advance(a_.input, a_.dtype, ((image * s_.height + y) * s_.width * s_.groups + group) * c);
      if (s_.groups == 1) return kernels.widen(a_.dtype, from, to, width * c);
      for (int64_t x = 0; x < width; ++x) {
        kernels.widen(a_.dtype, advance(from, a_.dtype, x * s_.groups * c), to + x * c, c);
      }
      return;
    }
    const int64_t plane = s_.height * s_.width;
    const void* from = advance(a_.input, a_.dtype, (image * s_.groups + group) * c * plane + y * s_.width);
    if (a_.dtype == Dtype::kFloat32) {
      return kernels.transpose(static_cast<const float*>(from), plane, c, width, to, c);
    }
    for (int64_t i = 0; i < c; ++i) {
      kernels.widen(a_.dtype, advance(from, a_.dtype, i * plane), widened + i * width, width);
    }
    kernels.transpose(widened, width, c, width, to, c);
  }

  // Columns [begin, end) of z, over some steps of the depth.
  void multiply_first(int64_t group, const float* const* table, int64_t pixels, int64_t step, int64_t last_step,
                      int64_t begin, int64_t end, float* z) {
    const int64_t depth = first_.depth();
    PixelProduct product{};
    product.row_pitch = product.pixels = pixels;
    product.panel_pitch = depth * kPanel;
    product.columns = end - begin;
    product.out = z + begin;
    product.out_pitch = z_pitch();
    product.padded = true;
    for (; step < last_step; ++step) {
      const int64_t run = pieces_ > 1 ? step / pieces_ : step * runs_per_step_;
      product.from = pieces_ > 1 ? step % pieces_ * piece_length_ : 0;
      product.runs = std::min(runs_per_step_, runs_ - run);
      product.length = std::min(piece_length_, run_length_ - product.from);
      product.rows = table + run * pixels;
      product.panels = first_weights(group) + begin * depth + (run * run_length_ + product.from) * kPanel;
      kernels.multiply(product);
      product.accumulate = true;
    }
  }

  void write_z(int64_t group, int64_t row, int64_t rows, const float* z) {
    for (int64_t i = 0; i < rows * s_.z_width(); ++i) {
      const int64_t pixel = row * s_.z_width() + i;
      kernels.finish(a_.dtype, z + i * z_pitch(), nullptr, false,
                     advance(a_.z, a_.dtype, (pixel * s_.groups + group) * s_.rank), s_.rank);
    }
  }

  // Enters for every tap of u where it reads z for every pixel. Behind z lie zeros, for taps outside.
  void point_to_z(int64_t rows, float* z, const float** table) {
    float* zero = z + rows * s_.z_width() * z_pitch();
    std::fill_n(zero, z_pitch(), 0.0f);
    for (int64_t tap = 0; tap < second_.taps; ++tap) {
      for (int64_t row = 0; row < rows; ++row) {
        const float* start = z + row * s_.z_width() * z_pitch();
        for (int64_t x = 0; x < s_.out_width; ++x) {
          const int64_t at = s_.spatial ? x * s_.stride_w + tap * s_.dilation_w - s_.pad_w : x;
          *table++ = 0 <= at && at < s_.z_width() ? start + at * z_pitch() : zero;
        }
      }
    }
  }

  // Channels [begin, end) of `pixels` pixels of the output from the pixel `first` on.
  void multiply_second(int64_t group, int64_t first, int64_t pixels, const float* const* table, int64_t begin,
                       int64_t end, float* block, float* turned) {
    const bool wide = a_.dtype == Dtype::kFloat32, last = a_.output_layout == Layout::kChannelsLast;
    const int64_t channels = s_.groups * s_.out_channels, channel = group * s_.out_channels + begin;
    PixelProduct product{};
    product.rows = table;
    product.row_pitch = product.pixels = pixels;
    product.runs = second_.taps;
    product.length = s_.rank;
    product.panels = second_weights(group) + begin * second_.depth();
    product.panel_pitch = second_.depth() * kPanel;
    product.columns = end - begin;
    product.bias = bias_ ? bias_ + group * padded(s_.out_channels) + begin : nullptr;
    product.relu = a_.relu && wide && (last || !a_.residual);
    if (wide && last) {
      product.out = static_cast<float*>(a_.output) + first * channels + channel;
      product.residual = static_cast<const float*>(advance(a_.residual, a_.dtype, first * channels + channel));
      product.out_pitch = channels;
      return kernels.multiply(product);
    }
    product.out = block;
    product.out_pitch = padded(end - begin);
    product.padded = true;
    for (int64_t p = 0; p < pixels; p += kOutPixels) {
      product.pixels = std::min(kOutPixels, pixels - p);
      product.rows = table + p;
      kernels.multiply(product);
      if (last) {
        for (int64_t i = 0; i < product.pixels; ++i) {
          const int64_t at = (first + p + i) * channels + channel;
          finish(block + i * product.out_pitch, at, end - begin);
        }
      } else {
        turn(first + p, product.pixels, channel, end - begin, block, product.out_pitch, turned);
      }
    }
  }

  // Writes a block of pixels to channels-first output.
  void turn(int64_t first, int64_t pixels, int64_t channel, int64_t count, const float* block, int64_t pitch,
            float* turned) {
    const int64_t plane = s_.out_height * s_.out_width, channels = s_.groups * s_.out_channels;
    for (int64_t i = 0; i < pixels;) {
      const int64_t image = (first + i) / plane, run = std::min(pixels - i, (image + 1) * plane - first - i);
      const int64_t at = (image * channels + channel) * plane + (first + i) % plane;
      if (a_.dtype == Dtype::kFloat32) {
        kernels.transpose(block + i * pitch, pitch, run, count, static_cast<float*>(a_.output) + at, plane);
        for (int64_t n = 0; n < count && a_.residual; ++n) {
          finish(static_cast<float*>(a_.output) + at + n * plane, at + n * plane, run);
        }
      } else {
        kernels.transpose(block + i * pitch, pitch, run, count, turned, run);
        for (int64_t n = 0; n < count; ++n) finish(turned + n * run, at + n * plane, run);
      }
      i += run;
    }
  }

  void finish(const float* from, int64_t at, int64_t count) {
    kernels.finish(a_.dtype, from, advance(a_.residual, a_.dtype, at), a_.relu, advance(a_.output, a_.dtype, at),
                   count);
  }

  const LowRankConvArguments& a_;
  const LowRankConvShape& s_;
  const float* packed_;
  const Factor first_, second_;
  // Of the first convolution.
  const int64_t kernel_w_ = s_.spatial ? 1 : s_.kernel_w, stride_w_ = s_.spatial ? 1 : s_.stride_w;
  const int64_t pad_w_ = s_.spatial ? 0 : s_.pad_w, dilation_w_ = s_.spatial ? 1 : s_.dilation_w;
  bool in_place_;
  int64_t reach_h_, span_w_, row_step_, row_stride_, row_pitch_, pixel_pitch_;
  // A run is the part of the depth that lies together in the input; a step is what is multiplied at once.
  int64_t runs_, run_length_, taps_per_run_, pieces_, piece_length_, runs_per_step_, steps_;
  const float* bias_ = nullptr;
  int64_t slices_ = 1;
  float* partial_ = nullptr;  // [group][slice][pixel][z_pitch]
};

}  // namespace

int64_t low_rank_conv_packed_size(const LowRankConvShape& shape) {
  return shape.groups * (first_factor(shape).size() + second_factor(shape).size());
}

void low_rank_conv_pack(const LowRankConvShape& shape, Dtype dtype, const void* v, const void* u, float* packed) {
  const auto pack_as = [&]<class T>(const T* first) { pack_groups(shape, first, static_cast<const T*>(u), packed); };
  switch (dtype) {
    case Dtype::kBFloat16:
      return pack_as(static_cast<const BFloat16*>(v));
    case Dtype::kFloat16:
      return pack_as(static_cast<const Float16*>(v));
    default:
      return pack_as(static_cast<const float*>(v));
  }
}

void low_rank_conv(const LowRankConvArguments& arguments, const float* packed, const ParallelFor& parallel_for) {
  Forward(arguments, packed)(parallel_for);
}

}  // namespace smoothk::cpu
