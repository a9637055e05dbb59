#include "low_rank_conv_kernel.h"

#include "dtypes.h"

#ifndef SMOOTHK_ISA
#define SMOOTHK_ISA baseline
#endif

namespace smoothk::cpu::SMOOTHK_ISA {
namespace {

// A tile of sums stays in registers: rows, of which scalars are read, times panels, of which vectors are.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kWidest = 4;
constexpr int kRows[] = {0, 12, 12, 8, 6};  // by panels
#elif defined(__AVX2__)
constexpr int kLanes = 8, kWidest = 1;
constexpr int kRows[] = {0, 6};
#elif defined(__aarch64__)
constexpr int kLanes = 4, kWidest = 1;
constexpr int kRows[] = {0, 6};
#else
constexpr int kLanes = 4, kWidest = 1;
constexpr int kRows[] = {0, 3};
#endif
constexpr int kPlaneVectors = kWidest < 3 ? kWidest : 3, kPlaneRows = kRows[kPlaneVectors];
constexpr int kDots = kLanes == 16 ? 24 : 12;  // sums in registers
constexpr int kPerPanel = kPanel / kLanes;

typedef float Vector4 __attribute__((vector_size(16)));
typedef float Vector8 __attribute__((vector_size(32)));
typedef float Vector16 __attribute__((vector_size(64)));
typedef float Unaligned4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float Unaligned8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

SMOOTHK_INLINE Vector read(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
SMOOTHK_INLINE void write(float* p, Vector x) { *reinterpret_cast<Unaligned*>(p) = x; }

SMOOTHK_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Loops over registers have to vanish.
#ifdef __clang__
#define SMOOTHK_UNROLL _Pragma("unroll")
#else
#define SMOOTHK_UNROLL _Pragma("GCC unroll 32")
#endif

template <int R, int V>
struct Tile {
  Vector sum[R][V] = {};

  SMOOTHK_INLINE void read_from(const float* p, int64_t pitch) {
    SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
      SMOOTHK_UNROLL for (int v = 0; v < V; ++v) sum[i][v] = read(p + i * pitch + v * kLanes);
    }
  }

  SMOOTHK_INLINE void add_from(const float* p, int64_t pitch) {
    SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
      SMOOTHK_UNROLL for (int v = 0; v < V; ++v) sum[i][v] += read(p + i * pitch + v * kLanes);
    }
  }

  SMOOTHK_INLINE void clamp() {
    SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
      SMOOTHK_UNROLL for (int v = 0; v < V; ++v) sum[i][v] = sum[i][v] < 0 ? Vector{} : sum[i][v];
    }
  }

  SMOOTHK_INLINE void write_to(float* p, int64_t pitch) const {
    SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
      SMOOTHK_UNROLL for (int v = 0; v < V; ++v) write(p + i * pitch + v * kLanes, sum[i][v]);
    }
  }

  // sum[i][v] += left(i) * right(v), where left(i) is a scalar or a vector and right(v) points to a vector
  template <class S, class W>
  SMOOTHK_INLINE void add_product(S left, W right) {
    Vector w[V];
    SMOOTHK_UNROLL for (int v = 0; v < V; ++v) w[v] = read(right(v));
    SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
      const auto a = left(i);
      SMOOTHK_UNROLL for (int v = 0; v < V; ++v) sum[i][v] += a * w[v];
    }
  }
};
#define SMOOTHK_AT(i) [&](int i) __attribute__((always_inline))

template <int R, int P>
void multiply_tile(const PixelProduct& product, int64_t pixel, int64_t panel) {
  const int64_t pitch = product.panel_pitch, column = panel * kPanel, at = pixel * product.out_pitch + column;
  Tile<R, P * kPerPanel> tile;
  if (product.accumulate) tile.read_from(product.out + at, product.out_pitch);
  const float* weights = product.panels + panel * pitch;
  for (int64_t run = 0; run < product.runs; ++run) {
    const float* row[R];
    SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
      row[i] = product.rows[run * product.row_pitch + pixel + i] + product.from;
    }
    for (int64_t k = 0; k < product.length; ++k) {
      tile.add_product(
          SMOOTHK_AT(i) { return row[i][k]; },
          SMOOTHK_AT(v) { return weights + v / kPerPanel * pitch + v % kPerPanel * kLanes; });
      weights += kPanel;
    }
  }
  const Epilogue& last = product.epilogue;
  if (last.bias) tile.add_from(last.bias + column, 0);
  if (product.padded || column + P * kPanel <= product.columns) {
    if (last.residual) tile.add_from(last.residual + at, product.out_pitch);
    if (last.relu) tile.clamp();
    return tile.write_to(product.out + at, product.out_pitch);
  }
  alignas(64) float sums[R][P * kPanel];
  tile.write_to(sums[0], P * kPanel);
  for (int i = 0; i < R; ++i) {
    for (int64_t n = 0, to = at + i * product.out_pitch; n < product.columns - column; ++n, ++to) {
      const float x = sums[i][n] + (last.residual ? last.residual[to] : 0);
      product.out[to] = last.relu && x < 0 ? 0 : x;
    }
  }
}

template <class V>
SMOOTHK_INLINE float total(V x) {
  if constexpr (sizeof(V) == sizeof(Vector16)) {
    return total(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
  } else if constexpr (sizeof(V) == sizeof(Vector8)) {
    return total(__builtin_shufflevector(x, x, 0, 1, 2, 3) + __builtin_shufflevector(x, x, 4, 5, 6, 7));
  } else {
    x += __builtin_shufflevector(x, x, 2, 3, 0, 1);
    return x[0] + x[1];
  }
}

template <int R, int Q>
void multiply_tile(const DotProduct& product, int64_t pixel) {
  const int64_t pitch = product.column_pitch;
  Tile<R, Q> tile;
  for (int64_t run = 0; run < product.runs; ++run) {
    const float *weights = product.weights + run * product.run_pitch, *row[R];
    SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
      row[i] = product.rows[run * product.row_pitch + pixel + i] + product.from;
    }
    for (int64_t k = 0; k < product.length; k += kLanes) {
      tile.add_product(SMOOTHK_AT(i) { return read(row[i] + k); }, SMOOTHK_AT(q) { return weights + k + q * pitch; });
    }
  }
  SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
    float* out = product.out + (pixel + i) * product.out_pitch;
    SMOOTHK_UNROLL for (int q = 0; q < Q; ++q) out[q] = total(tile.sum[i][q]) + (product.accumulate ? out[q] : 0);
  }
}

template <int R, int V>
void multiply_tile(const PlaneProduct& product, int64_t column) {
  const int64_t pitch = product.plane_pitch;
  const float* panel = product.panels + column / kPanel * product.panel_pitch + column % kPanel;
  float* out = product.out + column * product.out_pitch;
  Tile<R, V * kPerPanel> tile;
  if (product.accumulate) tile.read_from(out, product.out_pitch);
  for (int64_t tap = 0; tap < product.taps; ++tap) {
    const float *pixels = product.planes + product.shifts[tap], *weights = panel + tap * product.tap_pitch;
    for (int64_t c = 0; c < product.channels; ++c) {
      tile.add_product(SMOOTHK_AT(i) { return weights[i]; }, SMOOTHK_AT(v) { return pixels + v * kLanes; });
      pixels += pitch;
      weights += kPanel;
    }
  }
  const Epilogue& last = product.epilogue;
  if (last.bias) {
    SMOOTHK_UNROLL for (int i = 0; i < R; ++i) {
      SMOOTHK_UNROLL for (int v = 0; v < V * kPerPanel; ++v) tile.sum[i][v] += last.bias[column + i];
    }
  }
  if (last.residual) tile.add_from(last.residual + column * product.out_pitch, product.out_pitch);
  if (last.relu) tile.clamp();
  tile.write_to(out, product.out_pitch);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Turns what is known only now into a template argument: f(n) with n a constant, one of 1 to N.
template <int N, class F>
SMOOTHK_INLINE void with_constant(int64_t n, F f) {
  if constexpr (N > 0) {
    if (n == N) return f(Constant<N>{});
    with_constant<N - 1>(n, f);
  }
}

void multiply_pixels(const PixelProduct& product) {
  const int64_t panels = (product.columns + kPanel - 1) / kPanel;
  for (int64_t panel = 0; panel < panels;) {
    const int64_t left = panels - panel;
    // 5 panels are 3 and 2: one alone is slow.
    const int64_t wide = left == kWidest + 1 ? (kWidest + 2) / 2 : least(left, kWidest);
    with_constant<kWidest>(wide, [&](auto p) {
      constexpr int rows = kRows[p.value];
      const int64_t strips = (product.pixels + rows - 1) / rows;  // of as equal heights as they can have
      for (int64_t strip = 0, pixel = 0; strip < strips; ++strip) {
        const int64_t end = product.pixels * (strip + 1) / strips;
        with_constant<rows>(end - pixel, [&](auto r) { multiply_tile<r.value, p.value>(product, pixel, panel); });
        pixel = end;
      }
    });
    panel += wide;
  }
}

void multiply_dots(const DotProduct& product) {
  with_constant<kMostDots>(product.columns, [&](auto q) {
    constexpr int rows = least(kDots / q.value, 8);
    int64_t pixel = 0;
    for (; pixel + rows <= product.pixels; pixel += rows) multiply_tile<rows, q.value>(product, pixel);
    for (; pixel < product.pixels; ++pixel) multiply_tile<1, q.value>(product, pixel);
  });
}

void multiply_planes(const PlaneProduct& product) {
  with_constant<kPlaneVectors>(product.vectors, [&](auto v) {
    for (int64_t column = 0; column < product.columns;) {
      const int64_t left = least(product.columns - column, kPanel - column % kPanel);
      const int64_t strips = (left + kPlaneRows - 1) / kPlaneRows, rows = (left + strips - 1) / strips;
      with_constant<kPlaneRows>(rows, [&](auto r) { multiply_tile<r.value, v.value>(product, column); });
      column += rows;
    }
  });
}

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
SMOOTHK_INLINE void widen_as(const void* from, int64_t from_pitch, float* to, int64_t to_pitch, int64_t rows,
                             int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    const T* in = static_cast<const T*>(from) + i * from_pitch;
    float* __restrict out = to + i * to_pitch;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) out[j] = load(in + j);
  }
}

void widen(Dtype dtype, const void* from, int64_t from_pitch, float* to, int64_t to_pitch, int64_t rows,
           int64_t columns) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return widen_as<BFloat16>(from, from_pitch, to, to_pitch, rows, columns);
    case Dtype::kFloat16:
      return widen_as<Float16>(from, from_pitch, to, to_pitch, rows, columns);
    default:
      return widen_as<float>(from, from_pitch, to, to_pitch, rows, columns);
  }
}

template <class T>
SMOOTHK_INLINE void finish_as(const float* from, int64_t from_pitch, const void* residual, bool relu, void* to,
                              int64_t to_pitch, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* in = from + i * from_pitch;
    const T* more = residual ? static_cast<const T*>(residual) + i * to_pitch : nullptr;
    T* out = static_cast<T*>(to) + i * to_pitch;
#pragma omp simd
    for (int64_t j = 0; j < columns; ++j) {
      const float x = in[j] + (more ? load(more + j) : 0);
      store(out + j, relu && x < 0 ? 0.0f : x);
    }
  }
}

void finish(Dtype dtype, const float* from, int64_t from_pitch, const void* residual, bool relu, void* to,
            int64_t to_pitch, int64_t rows, int64_t columns) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return finish_as<BFloat16>(from, from_pitch, residual, relu, to, to_pitch, rows, columns);
    case Dtype::kFloat16:
      return finish_as<Float16>(from, from_pitch, residual, relu, to, to_pitch, rows, columns);
    default:
      return finish_as<float>(from, from_pitch, residual, relu, to, to_pitch, rows, columns);
  }
}

}  // namespace

const LowRankConvKernels kLowRankConv = {kPlaneVectors, multiply_pixels, multiply_dots, multiply_planes,
                                         transpose,     widen,           finish};

}  // namespace smoothk::cpu::SMOOTHK_ISA
