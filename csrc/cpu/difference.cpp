// Finite-difference penalty on the CPU.
//
// The gradient is gathered: an entry collects from all differences it lies in, so that tiles write disjoint entries and
// need no order among them. All axes and orders work on a chunk before the next is read: one pass over the memory.
#include "../difference.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>
#include <utility>

#include "difference_kernel.h"
#include "simd.h"

namespace smoothk::cpu {
namespace {

constexpr const DifferenceKernels* kCopies[] = SMOOTHK_COPIES(kDifference);

// Entries. They depend on nothing but shapes, and so does the order of all sums.
constexpr int64_t kTile = 65536;
constexpr int64_t kChunk = 512;  // of a row: a block of them, its neighbours and its gradient stay in L1

constexpr int64_t kCached = 8 << 20;  // bytes of weights that a second pass may still find in cache
constexpr int64_t kShortSpan = 64, kShortPeriod = 1024;
constexpr int64_t kWindow = 12 << 10;  // bytes of neighbouring rows that stay in L1

template <class T>
struct Axis : DifferenceAxis {
  // Runs of equal index too short for loops of their own: the entries are handled in one loop, under masks.
  bool periodic;
  // Then by order, for the entries from two spans before a period to a chunk after it: the factor of the difference
  // that starts there, -1 where there is none.
  std::vector<Compute<T>> masks[2];
  // kL21, by order: the sum of squares of every group, and once its value is known 1 / length.
  std::vector<double> groups[2];

  int64_t period() const { return span * length; }
};

template <class T>
struct Weight {
  const T* data;
  int64_t size, run, pitch;
  PerOrder factor;  // grad += sum over orders of factor * derivative + decay * W
  double decay = 0;
  Compute<T>* grad = nullptr;  // either this
  T* narrow_grad = nullptr;    // or this, where T is narrower; both null: value only
  std::vector<Axis<T>> axes{};
  int block = -1;  // the axis along which blocks of rows are handled at once
  PerOrder value{};
  double squares = 0;

  bool has_grad() const { return grad || narrow_grad; }
  const Axis<T>* block_axis() const { return block < 0 ? nullptr : &axes[block]; }
  int64_t offset(int64_t q) const { return q / run * pitch + q % run; }
};

using Groups = std::array<std::vector<double>, 2>;  // by order

// What a tile adds up.
struct Partial {
  PerOrder value{};
  double squares = 0;
  std::vector<Groups> groups;  // kL21, by axis: those that the tile touches, from its first entry's on
};

template <class C>
constexpr std::array<C, kChunk> constant(C x) {
  std::array<C, kChunk> result{};
  result.fill(x);
  return result;
}
template <class C>
constexpr std::array<C, kChunk> kExists = constant<C>(1);
template <class C>
constexpr std::array<C, kChunk> kMissing = constant<C>(-1);

// Entries [begin, end) of a weight.
template <class T>
class Tile {
 public:
  Tile(const DifferenceOptions& options, const Weight<T>& weight, bool gradient, int64_t begin, int64_t end,
       Partial& partial)
      : options_(options), weight_(weight), gradient_(gradient), begin_(begin), end_(end), partial_(partial) {}

  void run() {
    if (grouped()) reserve_groups();
    const Axis<T>* axis = gradient_ ? weight_.block_axis() : nullptr;
    for (int64_t q = begin_; q < end_;) {
      const int64_t row_end = axis ? std::min(end_, (q / axis->span + 1) * axis->span) : end_;
      const int64_t rows = axis && starts_block(*axis, q) ? kBlock : 1;
      const int64_t most = one_pass_over(rows) ? row_end - q : kChunk;
      for (int64_t c = q; c < row_end;) {
        const int64_t count = std::min({most, row_end - c, weight_.run - c % weight_.run});
        chunk(c, count, rows);
        c += count;
      }
      q = row_end + (rows > 1 ? (rows - 1) * axis->span : 0);
    }
    if (grouped()) finish_groups();
  }

 private:
  using C = Compute<T>;

  bool grouped() const { return options_.norm == Norm::kL21 && !gradient_; }

  bool one_term() const { return weight_.axes.size() == 1 && weight_.decay == 0; }

  // Whether entries are read once, and need not stay in L1 for another term or for conversions.
  bool one_pass_over(int64_t rows) const {
    return one_term() && (rows == kBlock || (!weight_.narrow_grad && !weight_.axes[0].periodic));
  }

  bool starts_block(const Axis<T>& axis, int64_t q) const {
    const int64_t i = q / axis.span % axis.length;
    return q % axis.span == 0 && q + kBlock * axis.span <= end_ && options_.reach() <= i &&
           i + kBlock + options_.reach() <= axis.length;
  }

  // Entries [q, q + count), and those below them in a block.
  void chunk(int64_t q, int64_t count, int64_t rows) {
    const int64_t span = rows > 1 ? weight_.block_axis()->span : 0;
    const int64_t stride = rows > 1 ? weight_.block_axis()->stride : 0;
    const int64_t offset = weight_.offset(q);
    // A gradient in half precision is rounded once, after all axes.
    const bool widened = gradient_ && weight_.narrow_grad && !(one_term() && rows == kBlock);
    C wide[kBlock * kChunk];
    void* out[kBlock] = {};
    for (int64_t r = 0; r < rows && gradient_; ++r) {
      const int64_t at = offset + r * stride;
      if (!weight_.narrow_grad) {
        out[r] = weight_.grad + at;
      } else if (!widened) {
        out[r] = weight_.narrow_grad + at;
      } else {
        out[r] = wide + r * kChunk;
        loops_.widen(weight_.narrow_grad + at, wide + r * kChunk, count);
      }
    }
    for (size_t a = 0; a < weight_.axes.size(); ++a) {
      const Axis<T>& axis = weight_.axes[a];
      if (rows > 1 && &axis == weight_.block_axis()) {
        along_block(axis, q, offset, out[0], widened ? kChunk : stride, !widened && weight_.narrow_grad, count);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {
        const auto along = axis.periodic ? &Tile::along_periodic : &Tile::along_rows;
        (this->*along)(a, q + r * span, offset + r * stride, static_cast<C*>(out[r]), count);
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = offset + r * stride;
      if (!gradient_ && options_.normalized) partial_.squares += loops_.sum_of_squares(weight_.data + at, count);
      if (gradient_ && weight_.decay != 0) {
        loops_.add_scaled(static_cast<C*>(out[r]), weight_.decay, weight_.data + at, count);
      }
      if (widened) loops_.narrow(wide + r * kChunk, weight_.narrow_grad + at, count);
    }
  }

  C factor(int64_t order) const {
    return static_cast<C>(weight_.factor[order - 1] * (options_.norm == Norm::kL2 ? 2 : 1));
  }

  // Factors and masks of the differences that `rows` rows from the i-th on lie in.
  void set_differences(Stencil<T>& stencil, const Axis<T>& axis, int64_t i, int64_t rows) const {
    for (int64_t order = 1; order <= 2; ++order) {
      for (int64_t k = 0; k < rows + order && options_.has(order); ++k) {
        const int64_t m = i - order + k;
        const bool exists = 0 <= m && m < axis.length - order;
        const bool by_group = gradient_ && options_.norm == Norm::kL21 && exists;
        stencil.factor[order - 1][k] = factor(order) * (by_group ? static_cast<C>(axis.groups[order - 1][m]) : 1);
        if (rows == 1) stencil.mask[order - 1][k] = (exists ? kExists<C> : kMissing<C>).data();
      }
    }
  }

  void along_block(const Axis<T>& axis, int64_t q, int64_t offset, void* out, int64_t out_pitch, bool narrow,
                   int64_t count) {
    Stencil<T> stencil{};
    stencil.row[2] = weight_.data + offset;
    stencil.pitch = axis.stride;
    stencil.out = out;
    stencil.out_pitch = out_pitch;
    stencil.narrow = narrow;
    set_differences(stencil, axis, q / axis.span % axis.length, kBlock);
    loops_.sweep(options_.norm, options_.orders, Kind::kBlock, stencil, count, partial_.value.data());
  }

  // By runs of entries that lie in the same differences, or in all there can be.
  void along_rows(size_t a, int64_t q, int64_t offset, C* out, int64_t count) {
    const Axis<T>& axis = weight_.axes[a];
    const int64_t reach = options_.reach();
    while (count > 0) {
      const int64_t row = q / axis.span, i = row % axis.length;
      const int64_t before = std::min(i, reach), after = std::min(axis.length - 1 - i, reach);
      const bool inside = before == reach && after == reach;
      const int64_t rows = inside && options_.norm != Norm::kL21 ? axis.length - reach - i : 1;
      const int64_t most = inside ? count : kChunk;  // masks are no longer
      const int64_t length = std::min({count, most, (row + rows) * axis.span - q});
      Stencil<T> stencil{};
      for (int64_t k = -2; k <= 2; ++k) {
        const bool exists = -before <= k && k <= after;  // the place of a missing one is taken by any other
        stencil.row[2 + k] = weight_.data + offset + (exists ? k * axis.stride : 0);
      }
      stencil.out = out;
      set_differences(stencil, axis, i, 1);
      PerOrder sums{};
      loops_.sweep(options_.norm, options_.orders, inside ? Kind::kInside : Kind::kMasked, stencil, length,
                   sums.data());
      for (int order = 0; order < 2; ++order) {
        double& sum =
            grouped() ? partial_.groups[a][order][(row - begin_ / axis.span) % axis.length] : partial_.value[order];
        sum += sums[order];
      }
      q += length, offset += length, count -= length;
      if (out) out += length;
    }
  }

  void along_periodic(size_t a, int64_t q, int64_t offset, C* out, int64_t count) {
    const Axis<T>& axis = weight_.axes[a];
    const T* w = weight_.data + offset;
    const int64_t halo = 2 * axis.span, extent = weight_.offset(weight_.size - 1) + 1;
    T padded[kChunk + 4 * kShortSpan];
    if (offset < halo || offset + count + halo > extent) {  // neighbours outside are masked, but read
      std::fill_n(padded, count + 2 * halo, T{});
      const int64_t begin = std::max<int64_t>(offset - halo, 0), end = std::min(offset + count + halo, extent);
      std::copy(weight_.data + begin, weight_.data + end, padded + halo + begin - offset);
      w = padded + halo;
    }
    Stencil<T> stencil{};
    for (int64_t k = -2; k <= 2; ++k) stencil.row[2 + k] = w + k * axis.span;
    stencil.out = out;
    for (int64_t order = 1; order <= 2; ++order) {
      if (!options_.has(order)) continue;
      for (int64_t k = 0; k <= order; ++k) {
        stencil.factor[order - 1][k] = factor(order);
        stencil.mask[order - 1][k] = axis.masks[order - 1].data() + q % axis.period() + (2 - order + k) * axis.span;
      }
      if (grouped()) stencil.squares[order - 1] = squares_[a][order - 1].data() + (q - begin_) % axis.period();
    }
    loops_.sweep(options_.norm, options_.orders, grouped() ? Kind::kGrouped : Kind::kMasked, stencil, count,
                 partial_.value.data());
  }

  void reserve_groups() {
    for (const Axis<T>& axis : weight_.axes) {
      const int64_t size = end_ - begin_, period = axis.period();
      const int64_t touched = std::min(axis.length, (end_ - 1) / axis.span - begin_ / axis.span + 1);
      for (auto& groups : partial_.groups.emplace_back()) groups.resize(touched);
      for (auto& squares : squares_.emplace_back()) {
        if (axis.periodic) squares.resize(period < size ? period + kChunk : size);
      }
    }
  }

  // Periodic axes have their sums by position in a period that begins where the tile does.
  void finish_groups() {
    for (size_t a = 0; a < squares_.size(); ++a) {
      const Axis<T>& axis = weight_.axes[a];
      for (int order = 0; order < 2; ++order) {
        const std::vector<C>& squares = squares_[a][order];
        std::vector<double>& groups = partial_.groups[a][order];
        size_t group = 0, position = 0;
        for (size_t end = axis.span - begin_ % axis.span; position < squares.size(); end += axis.span) {
          double sum = 0;
          for (; position < std::min(end, squares.size()); ++position) sum += squares[position];
          groups[group] += sum;
          group = group + 1 < groups.size() ? group + 1 : 0;
        }
      }
    }
  }

  const DifferenceOptions& options_;
  const Weight<T>& weight_;
  const bool gradient_;
  const int64_t begin_, end_;
  Partial& partial_;
  const DifferenceLoops<T>& loops_ = *kCopies[simd_index()];
  std::vector<std::array<std::vector<C>, 2>> squares_;
};

template <class T>
class Evaluation {
 public:
  Evaluation(const DifferenceOptions& options, const ParallelFor& parallel_for)
      : options_(options), parallel_for_(parallel_for) {}

  // The penalty of some tensors; they have gradients, or none has.
  PerOrder operator()(const DifferenceTensor* tensors, int64_t count) {
    weights_.clear();
    for (int64_t t = 0; t < count; ++t) weights_.push_back(make_weight(tensors[t]));
    // Not by the first one alone: an empty tensor has no address.
    const bool gradient = std::any_of(tensors, tensors + count, [](const auto& tensor) { return tensor.grad; });
    pass(gradient && options_.one_pass());
    PerOrder total{};
    for (Weight<T>& weight : weights_) {
      if (options_.norm == Norm::kL21) finish_groups(weight);
      if (options_.normalized) normalize(weight);
      for (int order = 0; order < 2; ++order) total[order] += weight.value[order];
    }
    if (gradient && !options_.one_pass()) pass(true);
    return total;
  }

 private:
  using C = Compute<T>;

  Weight<T> make_weight(const DifferenceTensor& tensor) const {
    Weight<T> weight{static_cast<const T*>(tensor.weight), tensor.size, tensor.run, tensor.pitch,
                     options_.coefficients};
    if (options_.grad_dtype == options_.dtype && sizeof(T) < sizeof(C)) {
      weight.narrow_grad = static_cast<T*>(tensor.grad);
    } else {
      weight.grad = static_cast<C*>(tensor.grad);
    }
    const bool grouped = options_.norm == Norm::kL21;
    for (const DifferenceAxis& shape : tensor.axes) {
      Axis<T> axis{shape, false, {}, {}};
      const bool short_period = grouped || axis.period() <= kShortPeriod;
      axis.periodic = axis.span < kShortSpan && axis.span == axis.stride && short_period;
      for (int64_t order = 1; order <= 2; ++order) {
        if (!options_.has(order)) continue;
        if (axis.periodic) set_mask(axis, order, false);
        if (grouped) axis.groups[order - 1].resize(axis.length);
      }
      const bool wider = weight.block < 0 || axis.span > weight.axes[weight.block].span;
      // Short rows pass one after the other, which reads memory in one stream and finds their neighbours in L1. Not in
      // half precision: each entry would be converted once for every row that it is a neighbour of.
      const int64_t window = (2 * options_.reach() + 1) * axis.span * sizeof(T);
      const bool by_rows = axis.span < kShortSpan || (window <= kWindow && sizeof(T) == sizeof(C));
      if (!by_rows && axis.length >= kBlock + 2 * options_.reach() && wider) {
        weight.block = static_cast<int>(weight.axes.size());
      }
      weight.axes.push_back(std::move(axis));
    }
    return weight;
  }

  static void set_mask(Axis<T>& axis, int64_t order, bool by_group) {
    std::vector<C>& mask = axis.masks[order - 1];
    mask.resize(2 * axis.span + axis.period() + kChunk);
    int64_t i = axis.length - 2;
    for (auto at = mask.begin(); at != mask.end(); i = (i + 1) % axis.length) {
      const C factor = by_group && i + order < axis.length ? static_cast<C>(axis.groups[order - 1][i]) : C(1);
      const int64_t count = std::min<int64_t>(axis.span, mask.end() - at);
      at = std::fill_n(at, count, i + order < axis.length ? factor : C(-1));
    }
  }

  void pass(bool gradient) {
    struct Range {
      Weight<T>* weight;
      int64_t begin, end;
      Partial partial;
    };
    std::vector<Range> tiles;
    int64_t total = 0;
    for (Weight<T>& weight : weights_) {
      const int64_t span = weight.block < 0 ? 0 : weight.axes[weight.block].span,
                    block = std::max(kBlock * span, int64_t{1});
      const int64_t size = block > kBlock * kTile ? kTile : std::max(kTile / block, int64_t{1}) * block;
      int64_t end = size % block == 0 ? options_.reach() * span : 0;  // the first rows are in no block
      for (int64_t begin = 0; begin < weight.size; begin = end) {
        end = std::min(weight.size, end + size);
        tiles.push_back({&weight, begin, end, {}});
      }
      total += weight.size;
    }
    std::atomic<int64_t> next{0};
    const auto count = static_cast<int64_t>(tiles.size());
    parallel_for_(total, kTile, [&](int64_t begin, int64_t end) {
      // Half of the thread's share of what is left. It may be late, having to wake up after a backward pass, but its
      // tiles should be neighbours.
      const auto take = [&] {
        int64_t first = next, last;
        do {
          last = first + std::max((count - first) * (end - begin) / (2 * total), int64_t{1});
        } while (!next.compare_exchange_weak(first, last));
        return std::pair(first, std::min(last, count));
      };
      for (auto [tile, last] = take(); tile < count; std::tie(tile, last) = take()) {
        for (; tile < last; ++tile) {
          Range& range = tiles[tile];
          Tile<T>(options_, *range.weight, gradient, range.begin, range.end, range.partial).run();
        }
      }
    });
    if (gradient && !options_.one_pass()) return;
    for (const auto& [weight, begin, end, partial] : tiles) {
      for (int order = 0; order < 2; ++order) weight->value[order] += partial.value[order];
      weight->squares += partial.squares;
      for (size_t a = 0; a < partial.groups.size(); ++a) {
        Axis<T>& axis = weight->axes[a];
        for (int64_t order = 1; order <= 2; ++order) {
          if (!options_.has(order)) continue;
          int64_t i = begin / axis.span;
          for (double sum : partial.groups[a][order - 1]) axis.groups[order - 1][i++ % axis.length] += sum;
        }
      }
    }
  }

  void finish_groups(Weight<T>& weight) {
    for (Axis<T>& axis : weight.axes) {
      for (int64_t order = 1; order <= 2; ++order) {
        if (!options_.has(order)) continue;
        for (int64_t i = 0; i < axis.length - order; ++i) {
          double& group = axis.groups[order - 1][i];
          const double length = std::sqrt(group + options_.eps);
          weight.value[order - 1] += length;
          group = 1 / length;
        }
        if (axis.periodic && weight.has_grad()) set_mask(axis, order, true);
      }
    }
  }

  // Divides the value by the weight's norm and lets the gradient go through it: with S = sum W^2,
  // d(N / S) = N' / S - 2 N W / S^2 (l2) and d(N / sqrt S) = N' / sqrt S - N W / S^(3/2) (the others).
  void normalize(Weight<T>& weight) const {
    const double s = weight.squares;
    if (s == 0) {
      weight.value = weight.factor = {};
      return;
    }
    const bool squared = options_.norm == Norm::kL2;
    const double scale = squared ? s : std::sqrt(s);
    for (int order = 0; order < 2; ++order) {
      weight.value[order] /= scale;
      weight.factor[order] /= scale;
      weight.decay -= (squared ? 2 : 1) * weight.value[order] * weight.factor[order] * (scale / s);
    }
  }

  const DifferenceOptions& options_;
  const ParallelFor& parallel_for_;
  std::vector<Weight<T>> weights_;
};

template <class T>
PerOrder evaluate(const DifferenceOptions& options, const std::vector<DifferenceTensor>& tensors,
                  const ParallelFor& parallel_for) {
  Evaluation<T> evaluation(options, parallel_for);
  PerOrder total{};
  for (size_t begin = 0, end = 0; begin < tensors.size(); begin = end) {
    int64_t bytes = 0;
    do {
      bytes += tensors[end++].size * sizeof(T);
    } while (end < tensors.size() && (options.one_pass() || bytes < kCached));
    const PerOrder part = evaluation(&tensors[begin], end - begin);
    for (int order = 0; order < 2; ++order) total[order] += part[order];
  }
  return total;
}

}  // namespace

PerOrder difference(const DifferenceOptions& options, const std::vector<DifferenceTensor>& tensors,
                    const ParallelFor& parallel_for) {
  switch (options.dtype) {
    case Dtype::kFloat32:
      return evaluate<float>(options, tensors, parallel_for);
    case Dtype::kFloat64:
      return evaluate<double>(options, tensors, parallel_for);
    case Dtype::kBFloat16:
      return evaluate<BFloat16>(options, tensors, parallel_for);
    case Dtype::kFloat16:
      return evaluate<Float16>(options, tensors, parallel_for);
  }
  __builtin_unreachable();
}

}  // namespace smoothk::cpu
