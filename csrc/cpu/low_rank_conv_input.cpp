#include "low_rank_conv_input.h"

#include <algorithm>

namespace smoothk::cpu {

void LowRankConvInput::read_band(int64_t group, int64_t begin, int64_t end, const InputBuffers& b) const {
  const int64_t pixels = z_pixels(end - begin);
  float* band = b.band;
  for (int64_t r = begin, rows; r < end; r += rows) {
    const int64_t image = r / s_.out_height, y = r % s_.out_height;
    rows = std::min(end - r, s_.out_height - y);
    const float* start = band;
    if (in_place_) {
      start = static_cast<const float*>(input_) + (image * s_.height + y * s_.stride_h) * row_pitch_ +
              group * s_.in_channels;
    } else {
      const int64_t top = y * s_.stride_h - s_.pad_h;
      for (int64_t i = 0; i < read_rows(rows); ++i) {
        read_row(image, group, top + i * row_step_, band, b.widened);
        band += row_pitch_;
      }
    }
    for (int64_t i = 0; i < rows; ++i, start += row_stride_ * row_pitch_) {
      for (int64_t run = 0; run < runs_; ++run) {
        const int64_t tap = run * taps_per_run_;
        const float* p =
            start + tap / kernel_w_ * s_.dilation_h * row_pitch_ + tap % kernel_w_ * dilation_w_ * pixel_pitch_;
        const float** entry = b.table + run * pixels + z_pixels(r - begin + i);
        for (int64_t x = 0; x < s_.z_width(); ++x) entry[x] = p + x * stride_w_ * pixel_pitch_;
      }
    }
  }
}

void LowRankConvInput::read_row(int64_t image, int64_t group, int64_t y, float* to, float* widened) const {
  const int64_t c = s_.in_channels, left = std::min(pad_w_, span_w_), width = std::min(s_.width, span_w_ - left);
  if (y < 0 || y >= s_.height) {
    std::fill_n(to, row_pitch_, 0.0f);
    return;
  }
  std::fill_n(to, left * c, 0.0f);
  std::fill_n(to + (left + width) * c, (span_w_ - left - width) * c, 0.0f);
  to += left * c;
  if (input_layout_ == Layout::kChannelsLast) {
    const int64_t at = ((image * s_.height + y) * s_.width * s_.groups + group) * c;
    return kernels_.widen(dtype_, advance(input_, at), s_.groups * c, to, c, width, c);
  }
  const int64_t plane = s_.height * s_.width;
  const void* from = advance(input_, (image * s_.groups + group) * c * plane + y * s_.width);
  if (dtype_ == Dtype::kFloat32) {
    return kernels_.transpose(static_cast<const float*>(from), plane, c, width, to, c);
  }
  kernels_.widen(dtype_, from, plane, widened, width, c, width);
  kernels_.transpose(widened, width, c, width, to, c);
}

void LowRankConvInput::read_pixels(int64_t group, int64_t first, int64_t pixels, float* to, int64_t pitch,
                                   float* widened) const {
  const int64_t c = s_.in_channels, plane = s_.height * s_.width;
  if (input_layout_ == Layout::kChannelsFirst) {
    const int64_t at = (first / plane * s_.groups + group) * c * plane + first % plane;
    return kernels_.widen(dtype_, advance(input_, at), plane, to, pitch, c, pixels);
  }
  const int64_t from_pitch = s_.groups * c;
  const void* from = advance(input_, first * from_pitch + group * c);
  if (dtype_ == Dtype::kFloat32) {
    return kernels_.transpose(static_cast<const float*>(from), from_pitch, pixels, c, to, pitch);
  }
  kernels_.widen(dtype_, from, from_pitch, widened, c, pixels, c);
  kernels_.transpose(widened, c, pixels, c, to, pitch);
}

void LowRankConvInput::read_planes(int64_t group, int64_t row, int64_t rows, const InputBuffers& b,
                                   int64_t band_pitch) const {
  const int64_t image = row / s_.out_height, top = row % s_.out_height - s_.pad_h, pitch = plane_row();
  const int64_t begin = std::clamp<int64_t>(-top, 0, read_rows(rows));
  const int64_t end = std::clamp<int64_t>(s_.height - top, begin, read_rows(rows));
  const int64_t left = std::min(pad_w_, pitch), width = std::min(s_.width, pitch - left);
  float* const start = b.band + begin * pitch + left;
  for (int64_t c = 0; c < s_.in_channels; ++c) {
    float* to = start + c * band_pitch;
    std::fill(b.band + c * band_pitch, to, 0.0f);
    for (int64_t y = begin; y < end; ++y, to += pitch) std::fill(to + width, to + pitch, 0.0f);
    std::fill(to, b.band + (c + 1) * band_pitch, 0.0f);
  }
  for (int64_t y = begin; y < end; ++y) {
    const int64_t first = (image * s_.height + top + y) * s_.width;
    read_pixels(group, first, width, start + (y - begin) * pitch, band_pitch, b.widened);
  }
}

}  // namespace smoothk::cpu
