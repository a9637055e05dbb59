// The functions of csrc/cuda/ptx.cuh on the host.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "block.h"
#include "cuda_runtime.h"

namespace smoothk::cuda {

extern unsigned char dynamic_shared[emulation::kSharedBytes];

inline uint32_t shared_address() { return emulation::kSharedStart; }

template <class T>
T read_shared(uint32_t from) {
  T value;
  std::memcpy(&value, emulation::shared(from, sizeof value), sizeof value);
  return value;
}
inline uint4 load_shared(uint32_t from) { return read_shared<uint4>(from); }
inline int32_t load_shared_int(uint32_t from) { return read_shared<int32_t>(from); }

template <class T>
void store_shared(uint32_t to, T value) {
  std::memcpy(emulation::shared(to, sizeof value), &value, sizeof value);
}

template <class T>
T load_global(const T* from) {
  emulation::check_global(from, sizeof *from);
  return *from;
}

template <class T>
void store_global(T* to, T value) {
  emulation::check_global(to, sizeof value);
  *to = value;
}

inline void cp_async(uint32_t to, const void* from, bool present) { emulation::copy_later(to, from, present); }
inline void cp_async_commit() { emulation::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulation::wait_for_copies(kPending);
}

inline float bits_to_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_to_bits(float value) { return std::bit_cast<uint32_t>(value); }

inline uint16_t to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  return static_cast<uint16_t>(std::isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_bf16(float low, float high) { return to_bf16(low) | uint32_t{to_bf16(high)} << 16; }
inline float unpack_bf16(uint16_t value) { return bits_to_float(uint32_t{value} << 16); }

inline uint16_t to_fp16(float value) { return std::bit_cast<uint16_t>(static_cast<_Float16>(value)); }
inline uint32_t pack_fp16(float low, float high) { return to_fp16(low) | uint32_t{to_fp16(high)} << 16; }
inline float unpack_fp16(uint16_t value) { return std::bit_cast<_Float16>(value); }

// To nearest, ties away from zero.
inline uint32_t round_tf32(uint32_t value) {
  return std::isnan(bits_to_float(value)) ? 0x7FFFFFFF : (value + 0x1000) & ~uint32_t{0x1FFF};
}
// The tensor cores ignore the bits that TF32 does not have.
inline float read_tf32(uint32_t value) { return bits_to_float(value & ~uint32_t{0x1FFF}); }

void ldmatrix(uint32_t (&to)[4], uint32_t from);
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

}  // namespace smoothk::cuda
