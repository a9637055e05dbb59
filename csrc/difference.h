// Finite-difference penalty: plain-data parameters and launchers. No torch include.
#pragma once

#include <cstdint>

namespace smoothk {

enum class Dtype { kFloat32, kFloat64, kBFloat16 };
enum class Norm { kL2, kL1, kL21, kHuber };

// One weight tensor seen along one of its axes. Element (o, i, j) lies at
// o * outer_stride + i * row_stride + j; the differences run over i.
struct DifferenceAxis {
  int64_t outer, rows, inner;
  int64_t outer_stride, row_stride;
};

// A fixed partition of an axis into blocks of slabs (o), rows (i) and columns (j). It depends on the
// shape alone, so the partial sums and their order do not depend on the number of threads.
struct DifferenceTiles {
  int64_t slabs, rows, columns;                    // extent of one tile
  int64_t slab_blocks, row_blocks, column_blocks;  // row blocks run fastest: a tile finds its halo in cache
  int64_t count() const { return slab_blocks * row_blocks * column_blocks; }
};

DifferenceTiles tile_difference(const DifferenceAxis& axis);

// grad += factor * d/dW (sum of norm over the differences) + decay * W
struct DifferenceParams {
  DifferenceAxis axis;
  DifferenceTiles tiles;
  const void* weight;
  void* grad;  // laid out as the weight; null: value only
  Dtype dtype;
  Dtype grad_dtype;  // dtype, or kFloat32 for a kBFloat16 weight
  Norm norm;
  int64_t order;  // 1 or 2
  double factor;
  double decay;
  const double* row_factors;  // kL21 gradient: [rows - order], one more factor per group; else null
};

namespace cpu {

// Number of doubles that difference_tile writes.
int64_t difference_partials(const DifferenceParams& params);

// One tile: the gradient, if asked for, and the partial sums of the value: one number, or for kL21 the
// sum of squares in every row of the tile.
void difference_tile(const DifferenceParams& params, int64_t tile, double* partials);

// Sum of the squares of the weight's entries in one tile.
double sum_of_squares_tile(const DifferenceParams& params, int64_t tile);

// Instruction set that the kernels use on this machine.
const char* simd();

}  // namespace cpu
}  // namespace smoothk
