// Finite-difference penalty on the CPU: value and gradient in one pass over the weight.
//
// The gradient is gathered: entry i collects from the differences d[i], d[i-1] (and d[i-2]) that contain it, so
// tiles write disjoint rows and need no order among them. bf16 is computed in float; sums go on in double after
// every kChunk entries.
#include "../difference.h"

#include <algorithm>
#include <bit>
#include <cmath>

#define SMOOTHK_INLINE inline __attribute__((always_inline))

// One copy of the kernels per instruction set, chosen when the library is loaded. AVX-512 measured no faster:
// memory is the limit.
#if defined(__x86_64__) && defined(__linux__)
#define SMOOTHK_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define SMOOTHK_CLONES
#endif

namespace smoothk {
namespace {

constexpr int64_t kTile = 32768;    // entries: 128 KiB of float32, so a tile and its gradient stay in L2
constexpr int64_t kColumns = 1024;  // five float32 rows of a second-order stencil stay in L1
constexpr int64_t kChunk = 512;     // entries summed in float before the sum goes on in double

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct BFloat16 {
  uint16_t bits;
};

SMOOTHK_INLINE float load(const float* p) { return *p; }
SMOOTHK_INLINE double load(const double* p) { return *p; }
SMOOTHK_INLINE float load(const BFloat16* p) { return std::bit_cast<float>(uint32_t{p->bits} << 16); }

SMOOTHK_INLINE void store(float* p, float x) { *p = x; }
SMOOTHK_INLINE void store(double* p, double x) { *p = x; }
SMOOTHK_INLINE void store(BFloat16* p, float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
  p->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);           // rounding could turn a NaN into Inf
}

template <class T>
using Compute = decltype(load(static_cast<const T*>(nullptr)));

// phi(d) and its derivative. A NaN comes through every branch.
struct Square {
  template <class C>
  static SMOOTHK_INLINE C value(C d) {
    return d * d;
  }
  template <class C>
  static SMOOTHK_INLINE C slope(C d) {
    return 2 * d;
  }
};

struct Absolute {
  template <class C>
  static SMOOTHK_INLINE C value(C d) {
    return d < 0 ? -d : d;
  }
  template <class C>
  static SMOOTHK_INLINE C slope(C d) {
    d = d > 0 ? C(1) : d;
    return d < 0 ? C(-1) : d;
  }
};

struct Huber {  // delta = 1
  template <class C>
  static SMOOTHK_INLINE C value(C d) {
    const C a = Absolute::value(d);
    return a > 1 ? a - C(0.5) : C(0.5) * d * d;
  }
  template <class C>
  static SMOOTHK_INLINE C slope(C d) {
    d = d > 1 ? C(1) : d;
    return d < -1 ? C(-1) : d;
  }
};

// Which of the differences d[i], d[i-1], d[i-2] that contain entry i exist: bits 0, 1, 2. It is a template
// argument because compilers give up on vectorizing loops that test it.
constexpr unsigned kHas0 = 1, kHas1 = 2, kHas2 = 4;

// Factors of the slopes of d[i], d[i-1] and d[i-2].
template <class C>
struct Factors {
  C at[3];
};

// w[0..count) share a pattern; rows lie `stride` entries apart. Adds the gradient to grad[0..count) and
// returns the sum of phi(d[i]).
template <class T, class G, class Phi, int Order, bool Grad, unsigned Exists>
SMOOTHK_INLINE Compute<T> sweep(const T* w, G* __restrict grad, int64_t count, int64_t stride,
                                const Factors<Compute<T>>& factors) {
  using C = Compute<T>;
  constexpr bool has0 = Exists & kHas0, has1 = Exists & kHas1, has2 = Exists & kHas2;
  const C f0 = factors.at[0], f1 = factors.at[1], f2 = factors.at[2];
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    const T* here = w + j;
    const C x = load(here);
    // Second differences as differences of differences: neighbours are close, so the first ones are exact.
    C next = 0, previous = 0, d0 = 0, d1 = 0, d2 = 0;
    if constexpr (has0 || (Order == 2 && has1)) next = load(here + stride) - x;
    if constexpr (has1 || has2) previous = x - load(here - stride);
    if constexpr (Order == 1) {
      d0 = next;
      d1 = previous;
    } else {
      if constexpr (has0) d0 = (load(here + 2 * stride) - load(here + stride)) - next;
      if constexpr (has1) d1 = next - previous;
      if constexpr (has2) d2 = previous - (load(here - stride) - load(here - 2 * stride));
    }
    if constexpr (has0) sum += Phi::value(d0);
    if constexpr (Grad) {
      C g = 0;
      if constexpr (has0) g += (Order == 1 ? -f0 : f0) * Phi::slope(d0);
      if constexpr (has1) g += (Order == 1 ? f1 : -2 * f1) * Phi::slope(d1);
      if constexpr (has2) g += f2 * Phi::slope(d2);
      store(grad + j, load(grad + j) + g);
    }
  }
  return sum;
}

template <class T, class G, class Phi, int Order, bool Grad>
SMOOTHK_INLINE Compute<T> sweep(unsigned exists, const T* w, G* grad, int64_t count, int64_t stride,
                                const Factors<Compute<T>>& factors) {
  if constexpr (!Grad) {
    return exists & kHas0 ? sweep<T, G, Phi, Order, false, kHas0>(w, grad, count, stride, factors) : 0;
  } else if constexpr (Order == 1) {
    switch (exists) {
      case kHas0:
        return sweep<T, G, Phi, 1, true, kHas0>(w, grad, count, stride, factors);
      case kHas0 | kHas1:
        return sweep<T, G, Phi, 1, true, kHas0 | kHas1>(w, grad, count, stride, factors);
      case kHas1:
        return sweep<T, G, Phi, 1, true, kHas1>(w, grad, count, stride, factors);
    }
  } else {
    switch (exists) {
      case kHas0:
        return sweep<T, G, Phi, 2, true, kHas0>(w, grad, count, stride, factors);
      case kHas0 | kHas1:
        return sweep<T, G, Phi, 2, true, kHas0 | kHas1>(w, grad, count, stride, factors);
      case kHas0 | kHas1 | kHas2:
        return sweep<T, G, Phi, 2, true, kHas0 | kHas1 | kHas2>(w, grad, count, stride, factors);
      case kHas1 | kHas2:
        return sweep<T, G, Phi, 2, true, kHas1 | kHas2>(w, grad, count, stride, factors);
      case kHas2:
        return sweep<T, G, Phi, 2, true, kHas2>(w, grad, count, stride, factors);
      case kHas1:  // the middle one of three rows
        return sweep<T, G, Phi, 2, true, kHas1>(w, grad, count, stride, factors);
    }
  }
  __builtin_unreachable();
}

// y[0..count) += a * x[0..count)
template <class T, class G>
SMOOTHK_INLINE void add_scaled(G* __restrict y, const T* x, Compute<T> a, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) store(y + j, load(y + j) + a * load(x + j));
}

template <class T>
SMOOTHK_INLINE double squares(const T* w, int64_t length) {
  double total = 0;
  for (int64_t begin = 0; begin < length; begin += kChunk) {
    const int64_t end = std::min(length, begin + kChunk);
    Compute<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < end; ++j) {
      const Compute<T> x = load(w + j);
      sum += x * x;
    }
    total += sum;
  }
  return total;
}

struct Range {
  int64_t begin, end;
};

struct TileRanges {
  Range slabs, rows, columns;
};

SMOOTHK_INLINE TileRanges ranges_of(const DifferenceParams& p, int64_t tile) {
  const DifferenceTiles& t = p.tiles;
  const int64_t row = tile % t.row_blocks * t.rows;
  const int64_t column = tile / t.row_blocks % t.column_blocks * t.columns;
  const int64_t slab = tile / t.row_blocks / t.column_blocks * t.slabs;
  return {{slab, std::min(slab + t.slabs, p.axis.outer)},
          {row, std::min(row + t.rows, p.axis.rows)},
          {column, std::min(column + t.columns, p.axis.inner)}};
}

template <class T, class G, class Phi, int Order, bool Grad>
SMOOTHK_INLINE void run_tile(const DifferenceParams& p, const TileRanges& tile, double* partials) {
  using C = Compute<T>;
  const DifferenceAxis& axis = p.axis;
  const int64_t differences = axis.rows - Order;
  const int64_t width = tile.columns.end - tile.columns.begin;
  // Rows with the same pattern and no gap between them are one run of entries.
  const bool rows_join = p.norm != Norm::kL21 && width == axis.row_stride;
  const C decay = static_cast<C>(p.decay);
  for (int64_t o = tile.slabs.begin; o < tile.slabs.end; ++o) {
    for (int64_t i = tile.rows.begin; i < tile.rows.end;) {
      int64_t rows = 1;
      if (rows_join && i >= Order && i < differences) rows = std::min(tile.rows.end, differences) - i;
      unsigned exists = 0;
      Factors<C> factors{};
      for (int64_t k = 0; k <= Order; ++k) {
        const int64_t m = i - k;
        if (m < 0 || m >= differences) continue;
        exists |= 1u << k;
        factors.at[k] = static_cast<C>(p.row_factors ? p.factor * p.row_factors[m] : p.factor);
      }
      const int64_t offset = o * axis.outer_stride + i * axis.row_stride + tile.columns.begin;
      const T* w = static_cast<const T*>(p.weight) + offset;
      G* grad = Grad ? static_cast<G*>(p.grad) + offset : nullptr;
      double sum = 0;
      for (int64_t begin = 0; begin < rows * width; begin += kChunk) {
        const int64_t count = std::min(kChunk, rows * width - begin);
        G* out = Grad ? grad + begin : nullptr;
        sum += sweep<T, G, Phi, Order, Grad>(exists, w + begin, out, count, axis.row_stride, factors);
        if (Grad && decay != 0) add_scaled(out, w + begin, decay, count);
      }
      partials[p.norm == Norm::kL21 ? i - tile.rows.begin : 0] += sum;
      i += rows;
    }
  }
}

template <class T, class G, class Phi, int Order>
SMOOTHK_INLINE void with_grad(const DifferenceParams& p, const TileRanges& tile, double* partials) {
  if (p.grad != nullptr) {
    run_tile<T, G, Phi, Order, true>(p, tile, partials);
  } else {
    run_tile<T, G, Phi, Order, false>(p, tile, partials);
  }
}

template <class T, class G, class Phi>
SMOOTHK_INLINE void with_order(const DifferenceParams& p, const TileRanges& tile, double* partials) {
  if (p.order == 1) {
    with_grad<T, G, Phi, 1>(p, tile, partials);
  } else {
    with_grad<T, G, Phi, 2>(p, tile, partials);
  }
}

template <class T, class G>
SMOOTHK_INLINE void with_norm(const DifferenceParams& p, const TileRanges& tile, double* partials) {
  switch (p.norm) {
    case Norm::kL1:
      return with_order<T, G, Absolute>(p, tile, partials);
    case Norm::kHuber:
      return with_order<T, G, Huber>(p, tile, partials);
    case Norm::kL2:
    case Norm::kL21:
      return with_order<T, G, Square>(p, tile, partials);
  }
}

template <class T>
SMOOTHK_INLINE double squares_of_tile(const DifferenceParams& p, const TileRanges& tile) {
  const T* w = static_cast<const T*>(p.weight);
  const int64_t width = tile.columns.end - tile.columns.begin;
  const int64_t rows = width == p.axis.row_stride ? tile.rows.end - tile.rows.begin : 1;
  double total = 0;
  for (int64_t o = tile.slabs.begin; o < tile.slabs.end; ++o) {
    for (int64_t i = tile.rows.begin; i < tile.rows.end; i += rows) {
      total += squares(w + o * p.axis.outer_stride + i * p.axis.row_stride + tile.columns.begin, rows * width);
    }
  }
  return total;
}

// The clones: everything above is inlined into them, so that it is compiled for their instruction set.
SMOOTHK_CLONES void tile_float(const DifferenceParams& p, const TileRanges& t, double* out) {
  with_norm<float, float>(p, t, out);
}
SMOOTHK_CLONES void tile_double(const DifferenceParams& p, const TileRanges& t, double* out) {
  with_norm<double, double>(p, t, out);
}
SMOOTHK_CLONES void tile_bfloat16(const DifferenceParams& p, const TileRanges& t, double* out) {
  with_norm<BFloat16, BFloat16>(p, t, out);
}
SMOOTHK_CLONES void tile_bfloat16_float(const DifferenceParams& p, const TileRanges& t, double* out) {
  with_norm<BFloat16, float>(p, t, out);
}
SMOOTHK_CLONES double squares_float(const DifferenceParams& p, const TileRanges& t) {
  return squares_of_tile<float>(p, t);
}
SMOOTHK_CLONES double squares_double(const DifferenceParams& p, const TileRanges& t) {
  return squares_of_tile<double>(p, t);
}
SMOOTHK_CLONES double squares_bfloat16(const DifferenceParams& p, const TileRanges& t) {
  return squares_of_tile<BFloat16>(p, t);
}

}  // namespace

DifferenceTiles tile_difference(const DifferenceAxis& axis) {
  DifferenceTiles t;
  t.columns = std::clamp<int64_t>(axis.inner, 1, kColumns);
  t.column_blocks = ceil_div(axis.inner, t.columns);
  t.rows = std::clamp<int64_t>(kTile / t.columns, 1, std::max<int64_t>(axis.rows, 1));
  t.row_blocks = ceil_div(axis.rows, t.rows);
  const bool whole_slab = t.column_blocks == 1 && t.row_blocks == 1;
  t.slabs = whole_slab ? std::max<int64_t>(kTile / (t.rows * t.columns), 1) : 1;
  t.slab_blocks = ceil_div(axis.outer, t.slabs);
  return t;
}

namespace cpu {

int64_t difference_partials(const DifferenceParams& params) {
  return params.norm == Norm::kL21 ? params.tiles.rows : 1;
}

void difference_tile(const DifferenceParams& params, int64_t tile, double* partials) {
  const TileRanges ranges = ranges_of(params, tile);
  std::fill_n(partials, difference_partials(params), 0.0);
  switch (params.dtype) {
    case Dtype::kFloat32:
      return tile_float(params, ranges, partials);
    case Dtype::kFloat64:
      return tile_double(params, ranges, partials);
    case Dtype::kBFloat16:
      return params.grad_dtype == Dtype::kFloat32 ? tile_bfloat16_float(params, ranges, partials)
                                                  : tile_bfloat16(params, ranges, partials);
  }
}

double sum_of_squares_tile(const DifferenceParams& params, int64_t tile) {
  const TileRanges ranges = ranges_of(params, tile);
  switch (params.dtype) {
    case Dtype::kFloat32:
      return squares_float(params, ranges);
    case Dtype::kFloat64:
      return squares_double(params, ranges);
    case Dtype::kBFloat16:
      return squares_bfloat16(params, ranges);
  }
  __builtin_unreachable();
}

const char* simd() {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") ? "avx2" : "x86-64";
#elif defined(__aarch64__)
  return "neon";
#else
  return "baseline";
#endif
}

}  // namespace cpu
}  // namespace smoothk
