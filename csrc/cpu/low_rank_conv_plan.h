// How the CPU computes a low-rank convolution: what follows from its shape, dtype and layouts alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../low_rank_conv.h"
#include "low_rank_conv_kernel.h"
#include "low_rank_conv_pack.h"
#include "scratch.h"

namespace smoothk::cpu {

constexpr int64_t kBandBytes = 384 << 10;  // of the input: half an L2 cache is left for weights and output
constexpr int64_t kStepBytes = 32 << 10;   // of weights or planes, that stay in L1
constexpr int64_t kMostTaps = 49;          // of planes

// Rows of pixels are counted through the batch: row r is row r % out_height of image r / out_height.
class LowRankConvPlan {
 protected:
  LowRankConvPlan(const LowRankConvArguments& arguments, const LowRankConvKernels& kernels);

  // `count` entries of the dtype further; null stays null.
  const void* advance(const void* p, int64_t count) const {
    return p ? static_cast<const char*>(p) + count * size_of_entry() : nullptr;
  }
  void* advance(void* p, int64_t count) const { return static_cast<char*>(p) + count * size_of_entry(); }

  int64_t z_pitch() const { return padded(s_.rank); }
  int64_t z_pixels(int64_t rows) const { return rows * s_.z_width(); }
  int64_t z_size(int64_t rows) const { return z_pixels(rows) * z_pitch(); }
  int64_t out_pixels(int64_t rows) const { return rows * s_.out_width; }
  int64_t out_plane() const { return s_.out_height * s_.out_width; }
  int64_t all_channels() const { return s_.groups * s_.out_channels; }

  // Rows of the input that so many rows of an image read.
  int64_t read_rows(int64_t rows) const { return (rows - 1) * row_stride_ + reach_h_; }
  int64_t band_size(int64_t rows) const;

  bool one_tap() const {
    return first_.taps == 1 && s_.pad_h == 0 && pad_w_ == 0 && s_.out_height == s_.height && s_.out_width == s_.width;
  }
  // A row of a plane, with the zeros after it that taps outside read: they are also those before the next.
  int64_t plane_row() const {
    return one_tap() ? s_.width : std::min(span_w_, s_.width + std::max(pad_w_, span_w_ - pad_w_ - s_.width));
  }
  int64_t flat_size(int64_t rows) const { return (rows - 1) * plane_row() + s_.out_width; }
  int64_t plane_pitch(int64_t rows) const;

  const LowRankConvKernels& kernels_;
  const LowRankConvShape& s_;
  const Dtype dtype_;
  // Of one pixel both layouts are the same.
  const Layout input_layout_, output_layout_;
  const Factor first_ = first_factor(s_), second_ = second_factor(s_);
  const int64_t rows_ = s_.batch * s_.out_height;
  const int64_t block_ = kernels_.plane_vectors * kPanel;  // pixels that are rearranged at once
  // Of the first convolution.
  const int64_t kernel_w_ = s_.spatial ? 1 : s_.kernel_w, stride_w_ = s_.spatial ? 1 : s_.stride_w;
  const int64_t pad_w_ = s_.spatial ? 0 : s_.pad_w, dilation_w_ = s_.spatial ? 1 : s_.dilation_w;
  const int64_t reach_h_ = (s_.kernel_h - 1) * s_.dilation_h + 1;
  const int64_t span_w_ = (s_.z_width() - 1) * stride_w_ + (kernel_w_ - 1) * dilation_w_ + 1;
  bool in_place_;                // the input is read where it lies
  bool planes_in_, planes_out_;  // as planes, or as pixels
  int64_t row_step_, row_stride_, row_pitch_, pixel_pitch_;
  // A run is the part of the depth that lies together in the input; a step is what is multiplied at once.
  int64_t runs_, run_length_, taps_per_run_, pieces_, piece_length_, runs_per_step_, steps_;
  int64_t slices_;  // of the depth, where each weight is read by one thread

 private:
  int64_t size_of_entry() const { return dtype_ == Dtype::kFloat32 ? 4 : 2; }
  void cut_depth();
  bool prefers_planes() const;
  bool splits_weights() const;
};

}  // namespace smoothk::cpu
