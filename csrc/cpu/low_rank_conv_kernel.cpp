#include "low_rank_conv_kernel.h"

#include "dtypes.h"

#ifndef SMOOTHK_ISA
#define SMOOTHK_ISA baseline
#endif

namespace smoothk::cpu::SMOOTHK_ISA {
namespace {

// The tile of sums that stays in registers: kRows pixels times kWide panels.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 8, kWide = 3;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kWide = 1;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRows = 6, kWide = 1;
#else
constexpr int kLanes = 4, kRows = 3, kWide = 1;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

SMOOTHK_INLINE Vector read(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
SMOOTHK_INLINE void write(float* p, Vector x) { *reinterpret_cast<Unaligned*>(p) = x; }

SMOOTHK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <int R, int P>
void tile(const PixelProduct& product, int64_t pixel, int64_t panel) {
  constexpr int V = P * kPanel / kLanes, kPerPanel = kPanel / kLanes;
  const int64_t pitch = product.panel_pitch, first_column = panel * kPanel, out_pitch = product.out_pitch;
  float* out = product.out + pixel * out_pitch + first_column;
  Vector sum[R][V] = {};
  if (product.accumulate) {
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) sum[i][v] = read(out + i * out_pitch + v * kLanes);
    }
  }
  const float* weights = product.panels + panel * pitch;
  for (int64_t run = 0; run < product.runs; ++run) {
    const float* const* rows = product.rows + run * product.row_pitch + pixel;
    const float* row[R];
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) row[i] = rows[i] + product.from;
    for (int64_t k = 0; k < product.length; ++k) {
      Vector w[V];
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) w[v] = read(weights + v / kPerPanel * pitch + v % kPerPanel * kLanes);
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) {
        const float a = row[i][k];
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) sum[i][v] += a * w[v];
      }
      weights += kPanel;
    }
  }
  const bool whole = product.padded || first_column + P * kPanel <= product.columns;
  const int64_t valid = product.columns - first_column;
  if (product.bias) {
#pragma GCC unroll 32
    for (int v = 0; v < V; ++v) {
      const Vector bias = read(product.bias + first_column + v * kLanes);
#pragma GCC unroll 32
      for (int i = 0; i < R; ++i) sum[i][v] += bias;
    }
  }
  if (whole) {
    const float* residual = product.residual + pixel * out_pitch + first_column;
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) {
        Vector x = sum[i][v];
        if (product.residual) x += read(residual + i * out_pitch + v * kLanes);
        if (product.relu) x = x < 0 ? Vector{} : x;
        write(out + i * out_pitch + v * kLanes, x);
      }
    }
  } else {
    alignas(64) float last[R][P * kPanel];
#pragma GCC unroll 32
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 32
      for (int v = 0; v < V; ++v) write(last[i] + v * kLanes, sum[i][v]);
    }
    for (int i = 0; i < R; ++i) {
      const int64_t at = pixel * out_pitch + first_column + i * out_pitch;
      for (int64_t n = 0; n < valid; ++n) {
        float x = last[i][n];
        if (product.residual) x += product.residual[at + n];
        product.out[at + n] = product.relu && x < 0 ? 0 : x;
      }
    }
  }
}

template <int P, int R = kRows>
SMOOTHK_INLINE void tile_of(int64_t rows, const PixelProduct& product, int64_t pixel, int64_t panel) {
  if constexpr (R > 0) {
    if (rows == R) return tile<R, P>(product, pixel, panel);
    tile_of<P, R - 1>(rows, product, pixel, panel);
  }
}

void multiply(const PixelProduct& product) {
  const int64_t panels = (product.columns + kPanel - 1) / kPanel;
  const int64_t strips = (product.pixels + kRows - 1) / kRows;  // of as equal heights as they can have
  for (int64_t panel = 0; panel < panels;) {
    // 4 panels are 2 and 2.
    const int64_t left = panels - panel, wide = left == kWide + 1 ? (kWide + 1) / 2 : least(left, kWide);
    for (int64_t strip = 0, pixel = 0; strip < strips; ++strip) {
      const int64_t end = product.pixels * (strip + 1) / strips;
      if (wide == 1) tile_of<1>(end - pixel, product, pixel, panel);
      if constexpr (kWide >= 2) {
        if (wide == 2) tile_of<2>(end - pixel, product, pixel, panel);
      }
      if constexpr (kWide >= 3) {
        if (wide == 3) tile_of<3>(end - pixel, product, pixel, panel);
      }
      pixel = end;
    }
    panel += wide;
  }
}

typedef float Vector4 __attribute__((vector_size(16)));
typedef float Unaligned4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Vector8 __attribute__((vector_size(32)));
typedef float Unaligned8 __attribute__((vector_size(32), aligned(4), may_alias));

SMOOTHK_INLINE Vector8 pair(const float* low, const float* high) {
  const Vector4 a = *reinterpret_cast<const Unaligned4*>(low), b = *reinterpret_cast<const Unaligned4*>(high);
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
}

// Columns 0 to 3 of eight rows.
SMOOTHK_INLINE void transpose_half(const float* from, int64_t pitch, float* to, int64_t to_pitch) {
  Vector8 row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) row[i] = pair(from + i * pitch, from + (i + 4) * pitch);
  const Vector8 a = __builtin_shufflevector(row[0], row[1], 0, 8, 1, 9, 4, 12, 5, 13);
  const Vector8 b = __builtin_shufflevector(row[0], row[1], 2, 10, 3, 11, 6, 14, 7, 15);
  const Vector8 c = __builtin_shufflevector(row[2], row[3], 0, 8, 1, 9, 4, 12, 5, 13);
  const Vector8 d = __builtin_shufflevector(row[2], row[3], 2, 10, 3, 11, 6, 14, 7, 15);
  *reinterpret_cast<Unaligned8*>(to) = __builtin_shufflevector(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
  *reinterpret_cast<Unaligned8*>(to + to_pitch) = __builtin_shufflevector(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
  *reinterpret_cast<Unaligned8*>(to + 2 * to_pitch) = __builtin_shufflevector(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
  *reinterpret_cast<Unaligned8*>(to + 3 * to_pitch) = __builtin_shufflevector(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
}

// Where the last block of eight would stick out it starts earlier.
void transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch) {
  if (rows < 8 || columns < 4) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) to[j * to_pitch + i] = from[i * from_pitch + j];
    }
    return;
  }
  for (int64_t i = 0; i < rows; i += 8) {
    i = least(i, rows - 8);
    for (int64_t j = 0; j < columns; j += 4) {
      j = least(j, columns - 4);
      transpose_half(from + i * from_pitch + j, from_pitch, to + j * to_pitch + i, to_pitch);
    }
  }
}

template <class T>
SMOOTHK_INLINE void widen_from(const void* from, float* __restrict to, int64_t count) {
  const T* in = static_cast<const T*>(from);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = load(in + i);
}

void widen(Dtype dtype, const void* from, float* to, int64_t count) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return widen_from<BFloat16>(from, to, count);
    case Dtype::kFloat16:
      return widen_from<Float16>(from, to, count);
    default:
      return widen_from<float>(from, to, count);
  }
}

template <class T>
SMOOTHK_INLINE void finish_as(const float* from, const void* residual, bool relu, void* to, int64_t count) {
  const T* more = static_cast<const T*>(residual);
  T* out = static_cast<T*>(to);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float x = from[i];
    if (more) x += load(more + i);
    store(out + i, relu && x < 0 ? 0.0f : x);
  }
}

void finish(Dtype dtype, const float* from, const void* residual, bool relu, void* to, int64_t count) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return finish_as<BFloat16>(from, residual, relu, to, count);
    case Dtype::kFloat16:
      return finish_as<Float16>(from, residual, relu, to, count);
    default:
      return finish_as<float>(from, residual, relu, to, count);
  }
}

}  // namespace

const LowRankConvKernels kLowRankConv = {multiply, transpose, widen, finish};

}  // namespace smoothk::cpu::SMOOTHK_ISA
