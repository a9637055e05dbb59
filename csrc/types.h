// What all kernels share; no torch include.
#pragma once

#include <cstdint>
#include <functional>

namespace smoothk {

enum class Dtype { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Calls body(begin, end) on disjoint parts of [0, size), of at least `grain` where there is more than one, in parallel.
using ParallelFor = std::function<void(int64_t size, int64_t grain, const std::function<void(int64_t, int64_t)>& body)>;

}  // namespace smoothk
