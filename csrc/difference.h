// Finite-difference penalty of many weights: plain data, no torch include.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "types.h"

namespace smoothk {

enum class Norm { kL2, kL1, kL21, kHuber };

// An axis of a tensor whose entries are numbered in storage order: the index of entry q along it is
// q / span % length, and the next entry along it lies `stride` further in storage.
struct DifferenceAxis {
  int64_t length, span, stride;
};

// `size` entries in storage order, of which entry q lies at q / run * pitch + q % run: equal runs without gaps, one
// run where the tensor is dense.
struct DifferenceTensor {
  const void* weight = nullptr;
  void* grad = nullptr;  // laid out as the weight; null: value only
  int64_t size = 0, run = 1, pitch = 1;
  std::vector<DifferenceAxis> axes = {};
};

using PerOrder = std::array<double, 2>;  // first order, second order

struct DifferenceOptions {
  int64_t orders;  // 1, 2, or 3 for both
  Norm norm;
  bool normalized;
  double eps;
  Dtype dtype;       // of every weight
  Dtype grad_dtype;  // dtype, or kFloat32 for half precision weights
  PerOrder coefficients;

  bool has(int64_t order) const { return orders & order; }
  bool one_pass() const { return norm != Norm::kL21 && !normalized; }  // gradients need no value first
  int64_t reach() const { return orders & 2 ? 2 : 1; }  // neighbours on either side that an entry's gradient depends on
};

namespace cpu {

// The penalty of every order, summed over tensors and axes; where tensors have gradients, the coefficients times the
// derivatives are added to them. The same bits however the work is divided.
PerOrder difference(const DifferenceOptions& options, const std::vector<DifferenceTensor>& tensors,
                    const ParallelFor& parallel_for);

}  // namespace cpu
}  // namespace smoothk
