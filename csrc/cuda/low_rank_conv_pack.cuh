// Rearranges v and u into the order in which the lanes of the low-rank convolution's warps read them: for 16 columns of
// B, kPairBytes in which each lane finds its words side by side. What is beyond the channels and the rank is zero.
//
//   v: [slice of input channels][tap][depth of the slice][16 of the rank]
//   u: [chunk of output channels][tap][depth of the rank][16 of the chunk]
#pragma once

#include "low_rank_conv.h"
#include "mma.cuh"

namespace smoothk::cuda {

struct LowRankConvFactors {
  const void *v, *u;  // [rank, in_channels, taps of v], [out_channels, rank, taps of u]
  void* packed;
  int64_t v_size, size;  // of packed, in entries: v's part and all of it
  int32_t in_channels, rank, out_channels, v_taps, u_taps, rank_pairs;
  int32_t through_memory;  // z reaches the second product as it is, not from the first one's registers
};

inline LowRankConvFactors factors_of(const LowRankConvShape& shape, Dtype dtype, const void* v, const void* u,
                                     void* packed) {
  return {v,
          u,
          packed,
          low_rank_conv_packed_v_size(shape, dtype),
          low_rank_conv_packed_size(shape, dtype),
          static_cast<int32_t>(shape.in_channels),
          static_cast<int32_t>(shape.rank),
          static_cast<int32_t>(shape.out_channels),
          static_cast<int32_t>(shape.kernel_h * (shape.spatial ? 1 : shape.kernel_w)),
          static_cast<int32_t>(shape.spatial ? shape.kernel_w : 1),
          static_cast<int32_t>((shape.rank + kPair - 1) / kPair),
          shape.spatial};
}

template <Dtype kDtype>
__global__ void low_rank_conv_pack_kernel(const LowRankConvFactors f) {
  using M = Mma<kDtype>;
  using Element = typename M::Element;
  constexpr int kLane = 16 / sizeof(Element), kWord = 4 / sizeof(Element);  // entries
  constexpr int kSliceDepths = kSliceBytes / kDepthBytes, kPairDepths = kPair / M::kDepth;
  constexpr int kChunkPairs = kOutputChunk<kDtype> / kPair;

  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= f.size) return;
  const bool is_v = at < f.v_size;
  int64_t block = (is_v ? at : at - f.v_size) / (kPairBytes / sizeof(Element));
  const int lane = static_cast<int>(at / kLane % 32), word = static_cast<int>(at % kLane / kWord);
  const int n = column(word / 2, lane / 4), k = M::depth(lane % 4, word % 2, static_cast<int>(at % kWord));

  const Element* from;
  if (is_v) {
    const int64_t rank = block % f.rank_pairs * kPair + n;
    block /= f.rank_pairs;
    const int64_t depth = block % kSliceDepths;
    block /= kSliceDepths;
    const int64_t tap = block % f.v_taps, channel = (block / f.v_taps * kSliceDepths + depth) * M::kDepth + k;
    const bool present = rank < f.rank && channel < f.in_channels;
    from = present ? static_cast<const Element*>(f.v) + (rank * f.in_channels + channel) * f.v_taps + tap : nullptr;
  } else {
    const int64_t pair = block % kChunkPairs;
    block /= kChunkPairs;
    const int depth = static_cast<int>(block % (f.rank_pairs * kPairDepths));
    block /= f.rank_pairs * kPairDepths;
    const int64_t tap = block % f.u_taps, channel = (block / f.u_taps * kChunkPairs + pair) * kPair + n;
    const int entry = depth % kPairDepths * M::kDepth + k;  // of 16 of the rank
    const int64_t rank = depth / kPairDepths * kPair + (f.through_memory ? entry : M::column_at(entry));
    const bool present = rank < f.rank && channel < f.out_channels;
    from = present ? static_cast<const Element*>(f.u) + (channel * f.rank + rank) * f.u_taps + tap : nullptr;
  }
  const float value = from ? M::widen(load_global(from)) : 0;
  store_global(static_cast<Element*>(f.packed) + at, M::to_factor(value));
}

}  // namespace smoothk::cuda
