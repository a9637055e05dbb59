#include "low_rank_conv_plan.h"

namespace smoothk::cpu {
namespace {

constexpr int64_t kSlices = 4;

Layout layout_of(Layout layout, int64_t pixels) { return pixels == 1 ? Layout::kChannelsLast : layout; }

}  // namespace

LowRankConvPlan::LowRankConvPlan(const LowRankConvArguments& arguments, const LowRankConvKernels& kernels)
    : kernels_(kernels),
      s_(arguments.shape),
      dtype_(arguments.dtype),
      input_layout_(layout_of(arguments.input_layout, s_.height * s_.width)),
      output_layout_(layout_of(arguments.output_layout, out_plane())) {
  const int64_t span_h = (s_.out_height - 1) * s_.stride_h + reach_h_;
  in_place_ = dtype_ == Dtype::kFloat32 && input_layout_ == Layout::kChannelsLast && s_.pad_h == 0 && pad_w_ == 0 &&
              span_h <= s_.height && span_w_ <= s_.width;
  // Of the rows between those that a kernel of height 1 reads no copy is made.
  row_step_ = s_.kernel_h == 1 && !in_place_ ? s_.stride_h : 1;
  row_stride_ = s_.stride_h / row_step_;
  pixel_pitch_ = in_place_ ? s_.groups * s_.in_channels : s_.in_channels;
  row_pitch_ = (in_place_ ? s_.width : span_w_) * pixel_pitch_;
  cut_depth();
  planes_out_ = !s_.spatial && output_layout_ == Layout::kChannelsFirst;
  planes_in_ = prefers_planes();
  slices_ = !planes_in_ && splits_weights() ? kSlices : 1;
}

void LowRankConvPlan::cut_depth() {
  const bool merged = dilation_w_ == 1 && pixel_pitch_ == s_.in_channels;  // taps side by side are one run
  taps_per_run_ = merged ? kernel_w_ : 1;
  runs_ = first_.taps / taps_per_run_;
  run_length_ = std::max<int64_t>(taps_per_run_ * s_.in_channels, 1);
  const int64_t panels = std::clamp<int64_t>(ceil_div(s_.rank, kPanel), 1, 4);
  const int64_t most = kStepBytes / (panels * kPanel * static_cast<int64_t>(sizeof(float)));
  pieces_ = ceil_div(run_length_, most);
  piece_length_ = std::min(run_length_, padded(ceil_div(run_length_, pieces_)));
  pieces_ = ceil_div(run_length_, piece_length_);
  runs_per_step_ = pieces_ > 1 ? 1 : most / run_length_;
  steps_ = ceil_div(runs_ * pieces_, runs_per_step_);
}

int64_t LowRankConvPlan::band_size(int64_t rows) const {
  if (in_place_) return 0;
  const int64_t images = std::min(rows, (rows - 1) / s_.out_height + 2);  // at most: strides may be the longer ones
  return ((rows - images) * row_stride_ + images * std::max(reach_h_, row_stride_)) * row_pitch_;
}

// Of an odd number of cache lines, so that planes do not compete for the same places in the cache.
int64_t LowRankConvPlan::plane_pitch(int64_t rows) const {
  return one_tap() ? block_ : ceil_div((read_rows(rows) + 1) * plane_row() + block_, 2 * kPanel) * 2 * kPanel + kPanel;
}

// Estimates both ways, in columns of multiplications at full speed. Tiles of one panel wait for loads, and so do
// vectors that are not aligned.
bool LowRankConvPlan::prefers_planes() const {
  if (s_.spatial || s_.stride_h != 1 || s_.stride_w != 1 || first_.taps > kMostTaps) return false;
  const bool last = input_layout_ == Layout::kChannelsLast;
  const double transposed = 11.0 / static_cast<double>(first_.taps), dots = static_cast<double>(first_.dots());
  const double columns = static_cast<double>(padded(s_.rank - first_.dots()));
  const double pixels = columns * (columns > kPanel ? 1.3 : 2.5) + dots * 2.5 + (last ? 0 : transposed);
  const double planes = static_cast<double>(s_.rank) * (one_tap() ? 1.3 : 1.9) + (last ? transposed : 0);
  return planes * static_cast<double>(padded(flat_size(s_.out_height))) < pixels * static_cast<double>(out_plane());
}

// Where there are few pixels, reading the weights takes the time: each thread reads its part.
bool LowRankConvPlan::splits_weights() const {
  const int64_t weights = first_.size() * sizeof(float), band = band_size(rows_) * sizeof(float);
  return z_pixels(rows_) > 0 && steps_ >= kSlices && weights > kBandBytes && band <= kBandBytes && weights > 2 * band;
}

}  // namespace smoothk::cpu
