#include "low_rank_conv_pack.h"

#include "dtypes.h"

namespace smoothk::cpu {
namespace {

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
  for (int64_t n = factor.columns - factor.dots(); n < factor.columns; ++n) {
    for (int64_t tap = 0; tap < factor.taps; ++tap) {
      for (int64_t c = 0; c < factor.channels; ++c) *packed++ = load(weight + n * depth + c * factor.taps + tap);
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

}  // namespace smoothk::cpu
