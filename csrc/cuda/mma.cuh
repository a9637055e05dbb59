// What a kernel needs to know of a dtype: the tensor-core instruction, its operands, and four neighbours in memory.
// This is the portable form, mma.sync, of sm_80 and later; wgmma would be another such struct.
//
// A has 16 rows of 32 bytes (`kDepth` entries), B 8 columns as deep, C 16 rows of 8 columns. Of C, lane 4g+q has rows
// g and g+8, of each columns 2q and 2q+1. Two mma side by side make 16 columns, and these are numbered so that a lane
// has four neighbours, 4q to 4q+3: whole sectors move between registers and memory without a shuffle.
#pragma once

#include "../types.h"
#include "ptx.cuh"

namespace smoothk::cuda {

constexpr int kPair = 16;        // columns of two mma
constexpr int kPairBytes = 512;  // their B: 16 bytes a lane, 2 words for the first mma and 2 for the second
constexpr int kDepthBytes = 32;  // of a row of A

// Number of column n of the first or second mma.
__host__ __device__ constexpr int column(int second, int n) { return n / 2 * 4 + second * 2 + n % 2; }

struct HalfLayout {
  using Element = uint16_t;
  using Vector = uint2;  // four neighbours
  static constexpr int kDepth = 16;

  // The row of B that entry `entry` of word `word` of lane 4g+q holds.
  __host__ __device__ static constexpr int depth(int q, int word, int entry) { return 2 * q + 8 * word + entry; }

  // The column of C that `to_operand` puts at depth k of A.
  __host__ __device__ static constexpr int column_at(int k) { return column(k / 8, k % 8); }

  // C's rows g and g+8, 16 columns, as A.
  __device__ static void to_operand(const Vector (&rows)[2], uint32_t (&a)[1][4]) {
    a[0][0] = rows[0].x, a[0][1] = rows[1].x, a[0][2] = rows[0].y, a[0][3] = rows[1].y;
  }

  __device__ static void load_a(uint32_t (&a)[4], uint32_t from) { ldmatrix(a, from); }
};

template <class M>
__device__ void unpack_halves(uint2 vector, float (&v)[4]) {
  v[0] = M::widen(static_cast<uint16_t>(vector.x)), v[1] = M::widen(static_cast<uint16_t>(vector.x >> 16));
  v[2] = M::widen(static_cast<uint16_t>(vector.y)), v[3] = M::widen(static_cast<uint16_t>(vector.y >> 16));
}

template <Dtype>
struct Mma;

template <>
struct Mma<Dtype::kBFloat16> : HalfLayout {
  __device__ static Element narrow(float value) { return static_cast<Element>(pack_bf16(value, 0)); }
  __device__ static Element to_factor(float value) { return narrow(value); }
  __device__ static float widen(Element value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }
  __device__ static Vector pack(const float (&v)[4]) { return {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])}; }
  __device__ static void unpack(Vector vector, float (&v)[4]) { unpack_halves<Mma>(vector, v); }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_bf16(c, a, b0, b1);
  }
};

template <>
struct Mma<Dtype::kFloat16> : HalfLayout {
  __device__ static Element narrow(float value) { return static_cast<Element>(pack_fp16(value, 0)); }
  __device__ static Element to_factor(float value) { return narrow(value); }
  __device__ static float widen(Element value) { return unpack_fp16(value); }
  __device__ static Vector pack(const float (&v)[4]) { return {pack_fp16(v[0], v[1]), pack_fp16(v[2], v[3])}; }
  __device__ static void unpack(Vector vector, float (&v)[4]) { unpack_halves<Mma>(vector, v); }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_fp16(c, a, b0, b1);
  }
};

// float32 in memory, rounded to TF32 (nearest, ties away) on the way into the tensor cores.
template <>
struct Mma<Dtype::kFloat32> {
  using Element = float;
  using Vector = uint4;
  static constexpr int kDepth = 8;

  __host__ __device__ static constexpr int depth(int q, int word, int) { return q + 4 * word; }
  // Columns 0 to 15 are two operands: `column_at(k)`, k up to 16.
  __host__ __device__ static constexpr int column_at(int k) { return column(k / 8, k % 4 * 2 + k / 4 % 2); }

  __device__ static void to_operand(const Vector (&rows)[2], uint32_t (&a)[2][4]) {
    const uint32_t first[4] = {rows[0].x, rows[1].x, rows[0].y, rows[1].y};
    const uint32_t second[4] = {rows[0].z, rows[1].z, rows[0].w, rows[1].w};
    for (int i = 0; i < 4; ++i) a[0][i] = round_tf32(first[i]), a[1][i] = round_tf32(second[i]);
  }

  __device__ static void load_a(uint32_t (&a)[4], uint32_t from) {
    ldmatrix(a, from);
    for (int i = 0; i < 4; ++i) a[i] = round_tf32(a[i]);
  }

  __device__ static Element narrow(float value) { return value; }
  __device__ static Element to_factor(float value) { return bits_to_float(round_tf32(float_to_bits(value))); }
  __device__ static float widen(Element value) { return value; }
  __device__ static Vector pack(const float (&v)[4]) {
    return {float_to_bits(v[0]), float_to_bits(v[1]), float_to_bits(v[2]), float_to_bits(v[3])};
  }
  __device__ static void unpack(Vector vector, float (&v)[4]) {
    v[0] = bits_to_float(vector.x), v[1] = bits_to_float(vector.y);
    v[2] = bits_to_float(vector.z), v[3] = bits_to_float(vector.w);
  }
  __device__ static void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_tf32(c, a, b0, b1);
  }
};

}  // namespace smoothk::cuda
