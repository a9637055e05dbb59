// Loads and stores of the dtypes, half precision as float. Plain integer arithmetic, which compilers vectorize for any
// instruction set. Nothing of std::, whose inline functions sources compiled for different sets would share.
#pragma once

#include <cstdint>

#define SMOOTHK_INLINE inline __attribute__((always_inline))

namespace smoothk::cpu {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

SMOOTHK_INLINE float load(const float* p) { return *p; }
SMOOTHK_INLINE double load(const double* p) { return *p; }
SMOOTHK_INLINE float load(const BFloat16* p) { return __builtin_bit_cast(float, uint32_t{p->bits} << 16); }
SMOOTHK_INLINE float load(const Float16* p) {
  constexpr uint32_t kRebias = 112u << 23, kOne = 1u << 23, kInf = 31u << 23;
  const uint32_t magnitude = (p->bits & 0x7fffu) << 13;
  const float subnormal = static_cast<float>(static_cast<int32_t>(p->bits & 0x3ffu)) * 0x1p-24f;
  const uint32_t normal = magnitude + (magnitude < kInf ? kRebias : 2 * kRebias);
  const uint32_t bits = magnitude < kOne ? __builtin_bit_cast(uint32_t, subnormal) : normal;
  return __builtin_bit_cast(float, bits | (p->bits & 0x8000u) << 16);
}

SMOOTHK_INLINE void store(float* p, float x) { *p = x; }
SMOOTHK_INLINE void store(double* p, double x) { *p = x; }
// These round to nearest even. NaN is set apart: rounding could turn it into Inf.
SMOOTHK_INLINE void store(BFloat16* p, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
SMOOTHK_INLINE void store(Float16* p, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves multiples of the smallest half in the last bits.
  const uint32_t subnormal = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000;
  uint32_t rounded = magnitude < 113u << 23 ? subnormal : normal;
  rounded = magnitude < 143u << 23 ? rounded : 0x7c00;
  rounded = x != x ? 0x7e00 : rounded;
  p->bits = static_cast<uint16_t>(rounded | ((bits >> 16) & 0x8000));
}

template <class T>
using Compute = decltype(load(static_cast<const T*>(nullptr)));

}  // namespace smoothk::cpu
