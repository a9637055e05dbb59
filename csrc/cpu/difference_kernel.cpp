#include "difference_kernel.h"

#include <algorithm>
#include <type_traits>
#include <utility>

// One copy per instruction set, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__)
#define SMOOTHK_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SMOOTHK_CLONES
#endif

namespace smoothk::cpu {
namespace {

constexpr int64_t kSummed = 512;  // entries summed in float before the sum goes on in double

// phi(d) and its derivative. A NaN comes through every branch.
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

// f(0), ..., f(N - 1), each with a constant, without a loop: a vectorizer wants straight code inside of its own.
template <int N, class F>
SMOOTHK_INLINE void unrolled(F f) {
  [&f]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}
#define SMOOTHK_EACH(i) [&](auto i) __attribute__((always_inline))

// Entries [begin, end) of R rows. G: type of the gradient, void for none.
template <class Phi, int64_t Orders, Kind K, class G, class T>
SMOOTHK_INLINE void run(const Stencil<T>& stencil, int64_t begin, int64_t end, double* sums) {
  using C = Compute<T>;
  constexpr bool masked = K == Kind::kMasked || K == Kind::kGrouped, gradient = !std::is_void_v<G>;
  constexpr bool first = Orders & 1, second = Orders & 2;
  constexpr int R = K == Kind::kBlock ? kBlock : 1;
  // Rows, and differences, are counted from the first row that a stencil has. Only those from `low` on are needed.
  constexpr int low = !gradient ? 2 : second ? 0 : 1, rows = R + (second ? 4 : 3);
  const Stencil<T> s = stencil;  // local: stores to the gradient cannot change it
  C sum1 = 0, sum2 = 0;
#pragma omp simd reduction(+ : sum1, sum2)
  for (int64_t j = begin; j < end; ++j) {
    C x[R + 4], d1[R + 3], d2[R + 2], g[R] = {};
    unrolled<rows - low>(SMOOTHK_EACH(i) { x[low + i] = load(s.row[low + i] + j); });
    unrolled<rows - low - 1>(SMOOTHK_EACH(i) { d1[low + i] = x[low + i + 1] - x[low + i]; });
    if constexpr (second) {
      // Neighbours are close, so the first differences are exact.
      unrolled<rows - low - 2>(SMOOTHK_EACH(i) { d2[low + i] = d1[low + i + 1] - d1[low + i]; });
      C value = 0;
      unrolled<gradient ? R + 2 : R>(SMOOTHK_EACH(i) {
        constexpr int m = low + i;
        if constexpr (masked) d2[m] = s.mask[1][m][j] < 0 ? C(0) : d2[m];
        if constexpr (m >= 2) value += Phi::value(d2[m]);
        if constexpr (gradient) {
          C slope = s.factor[1][m] * Phi::slope(d2[m]);
          if constexpr (masked) slope *= s.mask[1][m][j];
          if constexpr (m >= 2) g[m - 2] += slope;
          if constexpr (m >= 1 && m <= R) g[m - 1] -= 2 * slope;
          if constexpr (m < R) g[m] += slope;
        }
      });
      if constexpr (K == Kind::kGrouped) {
        s.squares[1][j] += value;
      } else {
        sum2 += value;
      }
    }
    if constexpr (first) {
      C value = 0;
      unrolled<gradient ? R + 1 : R>(SMOOTHK_EACH(i) {
        constexpr int m = (gradient ? 1 : 2) + i;
        if constexpr (masked) d1[m] = s.mask[0][m - 1][j] < 0 ? C(0) : d1[m];
        if constexpr (m >= 2) value += Phi::value(d1[m]);
        if constexpr (gradient) {
          C slope = s.factor[0][m - 1] * Phi::slope(d1[m]);
          if constexpr (masked) slope *= s.mask[0][m - 1][j];
          if constexpr (m >= 2) g[m - 2] -= slope;
          if constexpr (m <= R) g[m - 1] += slope;
        }
      });
      if constexpr (K == Kind::kGrouped) {
        s.squares[0][j] += value;
      } else {
        sum1 += value;
      }
    }
    if constexpr (gradient) {
      unrolled<R>(SMOOTHK_EACH(i) {
        G* out = static_cast<G*>(s.out[i]) + j;
        store(out, load(out) + g[i]);
      });
    }
  }
  sums[0] += sum1;
  sums[1] += sum2;
}

template <class Phi, int64_t Orders, Kind K, class G, class T>
SMOOTHK_INLINE void in_parts(const Stencil<T>& stencil, int64_t count, double* sums) {
  for (int64_t begin = 0; begin < count; begin += kSummed) {
    run<Phi, Orders, K, G>(stencil, begin, std::min(count, begin + kSummed), sums);
  }
}

template <class Phi, int64_t Orders, class T>
SMOOTHK_INLINE void with_kind(Kind kind, const Stencil<T>& stencil, int64_t count, double* sums) {
  using C = Compute<T>;
  const bool gradient = stencil.out[0] != nullptr;
  switch (kind) {
    case Kind::kInside:
      return gradient ? in_parts<Phi, Orders, Kind::kInside, C>(stencil, count, sums)
                      : in_parts<Phi, Orders, Kind::kInside, void>(stencil, count, sums);
    case Kind::kBlock:
      return stencil.narrow ? in_parts<Phi, Orders, Kind::kBlock, T>(stencil, count, sums)
                            : in_parts<Phi, Orders, Kind::kBlock, C>(stencil, count, sums);
    case Kind::kMasked:
      return gradient ? in_parts<Phi, Orders, Kind::kMasked, C>(stencil, count, sums)
                      : in_parts<Phi, Orders, Kind::kMasked, void>(stencil, count, sums);
    case Kind::kGrouped:
      return in_parts<Square, Orders, Kind::kGrouped, void>(stencil, count, sums);
  }
}

template <class Phi, class T>
SMOOTHK_INLINE void with_orders(int64_t orders, Kind kind, const Stencil<T>& stencil, int64_t count, double* sums) {
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
SMOOTHK_INLINE void with_norm(Norm norm, int64_t orders, Kind kind, const Stencil<T>& stencil, int64_t count,
                              double* sums) {
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
SMOOTHK_INLINE double squares(const T* x, int64_t count) {
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kSummed) {
    Compute<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = begin; j < std::min(count, begin + kSummed); ++j) sum += load(x + j) * load(x + j);
    total += sum;
  }
  return total;
}

template <class T, class F>
SMOOTHK_INLINE void apply(T* __restrict to, int64_t count, F f) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) store(to + j, f(j));
}

}  // namespace

// Everything above is inlined into these, so that it is compiled for their instruction set.
#define SMOOTHK_DEFINE(T)                                                                                   \
  template <>                                                                                               \
  SMOOTHK_CLONES void sweep(Norm norm, int64_t orders, Kind kind, const Stencil<T>& stencil, int64_t count, \
                            double* sums) {                                                                 \
    with_norm(norm, orders, kind, stencil, count, sums);                                                    \
  }                                                                                                         \
  template <>                                                                                               \
  SMOOTHK_CLONES double sum_of_squares(const T* x, int64_t count) {                                         \
    return squares(x, count);                                                                               \
  }                                                                                                         \
  template <>                                                                                               \
  SMOOTHK_CLONES void add_scaled(Compute<T>* y, double a, const T* x, int64_t count) {                      \
    const auto factor = static_cast<Compute<T>>(a);                                                         \
    apply(y, count, [=](int64_t j) __attribute__((always_inline)) { return y[j] + factor * load(x + j); }); \
  }                                                                                                         \
  template <>                                                                                               \
  SMOOTHK_CLONES void widen(const T* from, Compute<T>* to, int64_t count) {                                 \
    apply(to, count, [=](int64_t j) __attribute__((always_inline)) { return load(from + j); });             \
  }                                                                                                         \
  template <>                                                                                               \
  SMOOTHK_CLONES void narrow(const Compute<T>* from, T* to, int64_t count) {                                \
    apply(to, count, [=](int64_t j) __attribute__((always_inline)) { return from[j]; });                    \
  }
SMOOTHK_DEFINE(float)
SMOOTHK_DEFINE(double)
SMOOTHK_DEFINE(BFloat16)
SMOOTHK_DEFINE(Float16)

const char* simd() {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  return __builtin_cpu_supports("x86-64-v3") ? "x86-64-v3" : "x86-64";
#elif defined(__aarch64__)
  return "neon";
#else
  return "baseline";
#endif
}

}  // namespace smoothk::cpu
