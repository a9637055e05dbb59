// The vector loops of the difference penalty. Their source is compiled once per instruction set (simd.h).
#pragma once

#include <cstdint>

#include "../difference.h"
#include "dtypes.h"

namespace smoothk::cpu {

// Rows that a block has. Where the first cache has eight places in each set (Zen 4), 8 rows of weights and of
// gradients, which often fall into the same few sets, displace each other: they take a tenth longer there.
constexpr int kBlock = 6;

// Neighbouring rows along an axis. Row i lies in the first differences i-1 and i and in the second differences i-2, i-1
// and i, where difference m starts at row m.
template <class T>
struct Stencil {
  using C = Compute<T>;
  const T* row[5];          // two before the row whose gradient is wanted, it, two after; kBlock: [2], the first, only
  int64_t pitch;            // kBlock: from row to row
  C factor[2][kBlock + 2];  // by order, of the slopes of all differences in which they lie
  const C* mask[2][3];      // unless kInside or kBlock: by order, one more factor of each difference and entry,
                            // which does not exist where it is negative
  void* out;                // gradients; null: value only
  int64_t out_pitch;        // kBlock: from row to row; `pitch` unless T is narrower than C
  bool narrow;              // they are of T, otherwise of C
  C* squares[2];            // kGrouped: by order, where to add the squares of the difference that starts in the row
};

enum class Kind {
  kInside,   // one row, all differences exist
  kBlock,    // kBlock rows, all differences exist: each is read and computed once for all the rows it lies in
  kMasked,   // one row
  kGrouped,  // one row, value of kL21
};

template <class T>
struct DifferenceLoops {
  // Adds the gradient of `count` entries of every row to out, and the sum of phi(d) over the differences that start
  // there to sums[order - 1]. `orders` as in DifferenceOptions. The slope of kL2 and kL21 is d: the factors know the
  // rest.
  void (*sweep)(Norm norm, int64_t orders, Kind kind, const Stencil<T>& stencil, int64_t count, double* sums);
  double (*sum_of_squares)(const T* x, int64_t count);
  // y += a * x
  void (*add_scaled)(Compute<T>* y, double a, const T* x, int64_t count);
  void (*widen)(const T* from, Compute<T>* to, int64_t count);
  void (*narrow)(const Compute<T>* from, T* to, int64_t count);
};

struct DifferenceKernels : DifferenceLoops<float>,
                           DifferenceLoops<double>,
                           DifferenceLoops<BFloat16>,
                           DifferenceLoops<Float16> {};

namespace baseline {
extern const DifferenceKernels kDifference;
}
namespace x86_64_v3 {
extern const DifferenceKernels kDifference;
}
namespace x86_64_v4 {
extern const DifferenceKernels kDifference;
}

}  // namespace smoothk::cpu
