#include "difference_kernel.h"

#include <type_traits>
#include <utility>

#ifndef SMOOTHK_ISA
#define SMOOTHK_ISA baseline
#endif

namespace smoothk::cpu::SMOOTHK_ISA {
namespace {

// Sums grow in steps, so that rounding does not: kSummed entries of a row, or columns of a block, in the dtype of the
// arithmetic; kSums of these again in it (blocks of float and double only); and from there on in double.
constexpr int64_t kSummed = 512, kSums = 16;

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
template <class C>
struct Lanes {
  typedef C Vector __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t kCount = kVectorBytes / sizeof(C);
};
template <class C>
using Vector = typename Lanes<C>::Vector;

// One entry, or a vector of them.
template <class V, class T>
SMOOTHK_INLINE V read(const T* p) {
  if constexpr (std::is_same_v<V, Compute<T>>) {
    return load(p);
  } else {
    V x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
}
template <class V, class T>
SMOOTHK_INLINE void write(T* p, V x) {
  if constexpr (std::is_same_v<V, Compute<T>>) {
    store(p, x);
  } else {
    __builtin_memcpy(p, &x, sizeof x);
  }
}

SMOOTHK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// phi(d) and its derivative, of numbers or vectors. A NaN comes through every branch.
template <class C>
SMOOTHK_INLINE C constant(float x) {
  return C{} + x;
}

struct Square {
  template <class C>
  static SMOOTHK_INLINE C value(C d) {
    return d * d;
  }
  template <class C>
  static SMOOTHK_INLINE C slope(C d) {
    return d;  // half of it
  }
};

struct Absolute {
  template <class C>
  static SMOOTHK_INLINE C value(C d) {
    return d < 0 ? -d : d;
  }
  template <class C>
  static SMOOTHK_INLINE C slope(C d) {
    d = d > 0 ? constant<C>(1) : d;
    return d < 0 ? constant<C>(-1) : d;
  }
};

struct Huber {  // delta = 1
  template <class C>
  static SMOOTHK_INLINE C value(C d) {
    const C a = Absolute::value(d), half = constant<C>(0.5f);
    return a > 1 ? a - half : half * d * d;
  }
  template <class C>
  static SMOOTHK_INLINE C slope(C d) {
    d = d > 1 ? constant<C>(1) : d;
    return d < -1 ? constant<C>(-1) : d;
  }
};

// f(0), ..., f(N - 1), each with a constant, without a loop: a vectorizer wants straight code inside of its own.
template <int N, class F>
SMOOTHK_INLINE void unrolled(F f) {
  [&f]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}
#define SMOOTHK_EACH(i) [&](auto i) __attribute__((always_inline))

// Entries [begin, end) of one row. G: type of the gradient, void for none.
template <class Phi, int64_t Orders, Kind K, class G, class T>
void along_row(const Stencil<T>& stencil, int64_t begin, int64_t end, double* sums) {
  using C = Compute<T>;
  constexpr bool masked = K != Kind::kInside, gradient = !std::is_void_v<G>;
  constexpr bool first = Orders & 1, second = Orders & 2;
  // Rows, and differences, are counted from the first row that a stencil has. Only those from `low` on are needed.
  constexpr int low = !gradient ? 2 : second ? 0 : 1, rows = second ? 5 : 4;
  const Stencil<T> s = stencil;  // local: stores to the gradient cannot change it
  C sum1 = 0, sum2 = 0;
#pragma omp simd reduction(+ : sum1, sum2)
  for (int64_t j = begin; j < end; ++j) {
    C x[5], d1[4], d2[3], g = 0;
    unrolled<rows - low>(SMOOTHK_EACH(i) { x[low + i] = load(s.row[low + i] + j); });
    unrolled<rows - low - 1>(SMOOTHK_EACH(i) { d1[low + i] = x[low + i + 1] - x[low + i]; });
    if constexpr (second) {
      // Neighbours are close, so the first differences are exact.
      unrolled<rows - low - 2>(SMOOTHK_EACH(i) { d2[low + i] = d1[low + i + 1] - d1[low + i]; });
      unrolled<3 - low>(SMOOTHK_EACH(i) {
        constexpr int m = low + i;
        if constexpr (masked) d2[m] = s.mask[1][m][j] < 0 ? C(0) : d2[m];
        if constexpr (gradient) {
          C slope = s.factor[1][m] * Phi::slope(d2[m]);
          if constexpr (masked) slope *= s.mask[1][m][j];
          g += m == 1 ? -2 * slope : slope;
        }
      });
      if constexpr (K == Kind::kGrouped) {
        s.squares[1][j] += Phi::value(d2[2]);
      } else {
        sum2 += Phi::value(d2[2]);
      }
    }
    if constexpr (first) {
      unrolled<gradient ? 2 : 1>(SMOOTHK_EACH(i) {
        constexpr int m = (gradient ? 1 : 2) + i;
        if constexpr (masked) d1[m] = s.mask[0][m - 1][j] < 0 ? C(0) : d1[m];
        if constexpr (gradient) {
          C slope = s.factor[0][m - 1] * Phi::slope(d1[m]);
          if constexpr (masked) slope *= s.mask[0][m - 1][j];
          g += m == 1 ? slope : -slope;
        }
      });
      if constexpr (K == Kind::kGrouped) {
        s.squares[0][j] += Phi::value(d1[2]);
      } else {
        sum1 += Phi::value(d1[2]);
      }
    }
    if constexpr (gradient) {
      G* out = static_cast<G*>(s.out) + j;
      store(out, load(out) + g);
    }
  }
  sums[0] += sum1;
  sums[1] += sum2;
}

template <class Phi, int64_t Orders, Kind K, class G, class T>
void row(const Stencil<T>& stencil, int64_t count, double* sums) {
  for (int64_t begin = 0; begin < count; begin += kSummed) {
    along_row<Phi, Orders, K, G>(stencil, begin, least(count, begin + kSummed), sums);
  }
}

// An entry, or a vector of them, of every row of a block, from the first row to the last: what a row shares with the
// next is handed on, so that each is read and each difference computed once. The distances of the rows stay in
// registers: an address for each row would not.
template <class V, class Phi, int64_t Orders, class G, class T>
SMOOTHK_INLINE void down_block(const Stencil<T>& s, const T* w, int64_t pitch, G* out, int64_t out_pitch, V& sum1,
                               V& sum2) {
  constexpr bool first = Orders & 1, second = Orders & 2;
  constexpr int ahead = second ? 2 : 1;
  V x = read<V>(w + (ahead - 1) * pitch), d1 = x - read<V>(w + (ahead - 2) * pitch), value1{}, value2{};
  V slope1{}, slope2{}, slope2_before{};  // times their factors
  if constexpr (second) {
    const V x1 = read<V>(w - pitch), d1_before = read<V>(w) - x1;
    slope2_before = s.factor[1][0] * Phi::slope(d1_before - (x1 - read<V>(w - 2 * pitch)));
    slope2 = s.factor[1][1] * Phi::slope(d1 - d1_before);
    if constexpr (first) slope1 = s.factor[0][0] * Phi::slope(d1_before);
  } else {
    slope1 = s.factor[0][0] * Phi::slope(d1);
  }
  unrolled<kBlock>(SMOOTHK_EACH(i) {
    constexpr int r = i;
    const V next = read<V>(w + (r + ahead) * pitch), d1_next = next - x;
    V g = read<V>(out + r * out_pitch);
    if constexpr (first) {
      const V d = second ? d1 : d1_next, slope = s.factor[0][r + 1] * Phi::slope(d);
      value1 += Phi::value(d);
      g += slope1 - slope;
      slope1 = slope;
    }
    if constexpr (second) {
      const V d = d1_next - d1, slope = s.factor[1][r + 2] * Phi::slope(d);
      value2 += Phi::value(d);
      g += slope2_before + slope - 2 * slope2;
      slope2_before = slope2;
      slope2 = slope;
    }
    write(out + r * out_pitch, g);
    x = next;
    d1 = d1_next;
  });
  sum1 += value1;
  sum2 += value2;
}

template <class Phi, int64_t Orders, class G, class T>
void block(const Stencil<T>& stencil, int64_t count, double* sums) {
  using C = Compute<T>;
  const Stencil<T> s = stencil;
  const int64_t pitch = s.pitch, out_pitch = std::is_same_v<T, C> ? pitch : s.out_pitch;  // one register less
  const T* w = s.row[2];
  G* out = static_cast<G*>(s.out);
  if constexpr (std::is_same_v<T, C>) {  // compilers do worse here: they read the rows several times
    using V = Vector<C>;
    constexpr int64_t lanes = Lanes<C>::kCount;
    while (count >= lanes) {
      V total1{}, total2{};
      for (int64_t k = 0; k < kSums && count >= lanes; ++k) {
        V sum1{}, sum2{};
        int64_t part = least(count, kSummed) / lanes;
        count -= part * lanes;
        for (; part > 0; --part, w += lanes, out += lanes) {
          down_block<V, Phi, Orders>(s, w, pitch, out, out_pitch, sum1, sum2);
        }
        total1 += sum1;
        total2 += sum2;
      }
      for (int64_t lane = 0; lane < lanes; ++lane) {
        sums[0] += total1[lane];
        sums[1] += total2[lane];
      }
    }
  }
  while (count > 0) {
    C sum1 = 0, sum2 = 0;
    const int64_t part = least(count, kSummed);
#pragma omp simd reduction(+ : sum1, sum2)
    for (int64_t k = 0; k < part; ++k) down_block<C, Phi, Orders>(s, w + k, pitch, out + k, out_pitch, sum1, sum2);
    sums[0] += sum1;
    sums[1] += sum2;
    count -= part, w += part, out += part;
  }
}

template <class Phi, int64_t Orders, class T>
void with_kind(Kind kind, const Stencil<T>& stencil, int64_t count, double* sums) {
  using C = Compute<T>;
  const bool gradient = stencil.out != nullptr;
  switch (kind) {
    case Kind::kInside:
      return gradient ? row<Phi, Orders, Kind::kInside, C>(stencil, count, sums)
                      : row<Phi, Orders, Kind::kInside, void>(stencil, count, sums);
    case Kind::kBlock:
      return stencil.narrow ? block<Phi, Orders, T>(stencil, count, sums) : block<Phi, Orders, C>(stencil, count, sums);
    case Kind::kMasked:
      return gradient ? row<Phi, Orders, Kind::kMasked, C>(stencil, count, sums)
                      : row<Phi, Orders, Kind::kMasked, void>(stencil, count, sums);
    case Kind::kGrouped:
      return row<Square, Orders, Kind::kGrouped, void>(stencil, count, sums);
  }
}

template <class Phi, class T>
void with_orders(int64_t orders, Kind kind, const Stencil<T>& stencil, int64_t count, double* sums) {
  switch (orders) {
    case 1:
      return with_kind<Phi, 1>(kind, stencil, count, sums);
    case 2:
      return with_kind<Phi, 2>(kind, stencil, count, sums);
    case 3:
      return with_kind<Phi, 3>(kind, stencil, count, sums);
  }
}

template <class T>
void sweep(Norm norm, int64_t orders, Kind kind, const Stencil<T>& stencil, int64_t count, double* sums) {
  switch (norm) {
    case Norm::kL1:
      return with_orders<Absolute>(orders, kind, stencil, count, sums);
    case Norm::kHuber:
      return with_orders<Huber>(orders, kind, stencil, count, sums);
    case Norm::kL2:
    case Norm::kL21:
      return with_orders<Square>(orders, kind, stencil, count, sums);
  }
}

template <class T>
double sum_of_squares(const T* x, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kSummed) {
    Compute<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < least(count, begin + kSummed); ++j) sum += load(x + j) * load(x + j);
    total += sum;
  }
  return total;
}

template <class T>
void add_scaled(Compute<T>* y, double a, const T* x, int64_t count) {
  const auto factor = static_cast<Compute<T>>(a);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) y[j] += factor * load(x + j);
}

template <class T>
void widen(const T* from, Compute<T>* to, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) to[j] = load(from + j);
}

template <class T>
void narrow(const Compute<T>* from, T* to, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) store(to + j, from[j]);
}

template <class T>
constexpr DifferenceLoops<T> kLoops = {sweep<T>, sum_of_squares<T>, add_scaled<T>, widen<T>, narrow<T>};

}  // namespace

const DifferenceKernels kDifference = {kLoops<float>, kLoops<double>, kLoops<BFloat16>, kLoops<Float16>};

}  // namespace smoothk::cpu::SMOOTHK_ISA
