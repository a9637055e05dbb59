// The vector loops of the difference penalty, compiled for several instruction sets.
#pragma once

#include <cstdint>

#include "../difference.h"
#include "dtypes.h"

namespace smoothk::cpu {

constexpr int kBlock = 4;  // rows that a block has

// Neighbouring rows along an axis. Row i lies in the first differences i-1 and i and in the second differences i-2, i-1
// and i, where difference m starts at row m.
template <class T>
struct Stencil {
  using C = Compute<T>;
  const T* row[kBlock + 4];  // two before the rows whose gradient is wanted, these, two after
  C factor[2][kBlock + 2];   // by order, of the slopes of all differences in which they lie
  const C* mask[2][3];       // unless kInside or kBlock: by order, one more factor of each difference and entry, which
                             // does not exist where it is negative
  void* out[kBlock];         // gradients; null: value only
  bool narrow;               // these are of T, otherwise of C
  C* squares[2];             // kGrouped: by order, where to add the squares of the difference that starts in the row
};

enum class Kind {
  kInside,   // one row, all differences exist
  kBlock,    // kBlock rows, all differences exist: each is read and computed once for all the rows it lies in
  kMasked,   // one row
  kGrouped,  // one row, value of kL21
};

// Adds the gradient of `count` entries of every row to out, and the sum of phi(d) over the differences that start there
// to sums[order - 1]. `orders` as in DifferenceOptions. The slope of kL2 and kL21 is d: the factors know the rest.
template <class T>
void sweep(Norm norm, int64_t orders, Kind kind, const Stencil<T>& stencil, int64_t count, double* sums);

template <class T>
double sum_of_squares(const T* x, int64_t count);

// y += a * x
template <class T>
void add_scaled(Compute<T>* y, double a, const T* x, int64_t count);

template <class T>
void widen(const T* from, Compute<T>* to, int64_t count);

template <class T>
void narrow(const Compute<T>* from, T* to, int64_t count);

}  // namespace smoothk::cpu
