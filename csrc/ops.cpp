// Operators of the namespace smoothk on the CPU: schemas, the checks that protect memory, allocation and
// registration. Full checks with messages for users are in smoothk/functional.py. Everything goes through
// torch's stable ABI, so one binary serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "difference.h"

namespace smoothk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Options {
  int64_t order;
  std::vector<int64_t> dim;
  Norm norm;
  bool normalized;
  double eps;
};

Options make_options(const std::vector<int64_t>& orders, const std::vector<int64_t>& dim, const std::string& norm,
                     bool normalized, double eps) {
  for (int64_t order : orders) STD_TORCH_CHECK(order == 1 || order == 2, "order must be 1 or 2, got ", order);
  const std::pair<const char*, Norm> names[] = {
      {"l2", Norm::kL2}, {"l1", Norm::kL1}, {"l21", Norm::kL21}, {"huber", Norm::kHuber}};
  for (const auto& [name, value] : names) {
    if (norm == name) return {0, dim, value, normalized, eps};
  }
  STD_TORCH_CHECK(false, "norm must be one of l2, l1, l21, huber, got ", norm);
}

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, float64 or bfloat16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

void check_weights(const std::vector<Tensor>& weights) {
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.is_cpu(), "weights must be on the CPU");
    STD_TORCH_CHECK(dtype_of(weight) == dtype_of(weights[0]), "weights must have one dtype, got ",
                    torch::headeronly::toString(weights[0].scalar_type()), " and ",
                    torch::headeronly::toString(weight.scalar_type()));
  }
}

void check_grads(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights) {
  STD_TORCH_CHECK(grads.size() == weights.size(), "grads must have one tensor per weight, got ", grads.size(), " for ",
                  weights.size());
  if (grads.empty()) return;
  check_weights(grads);
  const Dtype dtype = dtype_of(weights[0]), grad_dtype = dtype_of(grads[0]);
  STD_TORCH_CHECK(grad_dtype == dtype || (dtype == Dtype::kBFloat16 && grad_dtype == Dtype::kFloat32),
                  "grads must have the dtype of the weights, or float32 for bfloat16 weights");
  std::vector<const void*> starts;
  for (size_t t = 0; t < grads.size(); ++t) {
    const auto expected = weights[t].sizes(), sizes = grads[t].sizes(), strides = grads[t].strides();
    STD_TORCH_CHECK(expected.size() == sizes.size() && std::equal(expected.begin(), expected.end(), sizes.begin()),
                    "grads[", t, "] must have the shape of weights[", t, "]");
    for (size_t d = 0; d < sizes.size(); ++d) {
      STD_TORCH_CHECK(sizes[d] < 2 || strides[d] != 0, "grads[", t, "] must not be an expanded tensor");
    }
    if (grads[t].numel() > 0) starts.push_back(grads[t].const_data_ptr());
  }
  std::sort(starts.begin(), starts.end());
  STD_TORCH_CHECK(std::adjacent_find(starts.begin(), starts.end()) == starts.end(),
                  "grads must not share memory: pass a tied weight once");
}

bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && x[d] != y[d]) return false;
  }
  return true;
}

// Merges axes, given by decreasing stride, into one of the returned size with the stride of the last.
std::optional<int64_t> merge(const std::vector<std::pair<int64_t, int64_t>>& stride_and_size) {
  int64_t size = 1;
  for (size_t k = stride_and_size.size(); k-- > 0;) {
    if (stride_and_size[k].first != stride_and_size.back().first * size) return std::nullopt;
    size *= stride_and_size[k].second;
  }
  return size;
}

// The tensor seen along `dim` in storage order, whatever the order of its axes; nothing for strides that
// do not make three axes of it or that overlap.
std::optional<DifferenceAxis> along(const Tensor& tensor, int64_t dim) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (tensor.numel() == 0) return DifferenceAxis{0, sizes[dim], 0, 0, 0};
  std::vector<std::pair<int64_t, int64_t>> outer, inner;
  for (int64_t d = 0; d < static_cast<int64_t>(sizes.size()); ++d) {
    if (d != dim && sizes[d] > 1) (strides[d] < strides[dim] ? inner : outer).emplace_back(strides[d], sizes[d]);
  }
  std::sort(outer.rbegin(), outer.rend());
  std::sort(inner.rbegin(), inner.rend());
  if (!inner.empty() && inner.back().first != 1) return std::nullopt;
  const auto outer_size = merge(outer), inner_size = merge(inner);
  if (!outer_size || !inner_size) return std::nullopt;
  const int64_t outer_stride = outer.empty() ? 0 : outer.back().first;
  const int64_t slab = (sizes[dim] - 1) * strides[dim] + *inner_size;
  if (strides[dim] < *inner_size || (!outer.empty() && outer_stride < slab)) return std::nullopt;
  return DifferenceAxis{*outer_size, sizes[dim], *inner_size, outer_stride, strides[dim]};
}

struct Axis {
  DifferenceAxis view;
  DifferenceTiles tiles;
  std::vector<double> row_factors;  // l21: what the gradient of each group is multiplied with
};

struct Entry {
  Tensor weight;
  std::optional<Tensor> grad;
  std::vector<Axis> axes;  // those long enough for a difference
  double value = 0;
  double squares = 0;
  double factor = 1;
  double decay = 0;
};

// Fills `entry.axes`; false where the strides of the tensors do not allow it.
bool find_axes(Entry& entry, const Options& options) {
  entry.axes.clear();
  if (entry.grad && !same_strides(entry.weight, *entry.grad)) return false;
  const int64_t rank = entry.weight.dim();
  for (int64_t dim : options.dim) {
    if (dim < -rank || dim >= rank) continue;
    if (dim < 0) dim += rank;
    if (entry.weight.size(dim) <= options.order) continue;
    const auto view = along(entry.weight, dim);
    if (!view) return false;
    entry.axes.push_back({*view, tile_difference(*view), {}});
  }
  return true;
}

enum class Pass { kValue, kGradient, kBoth };

// Goes over the k-th axis of every entry. One axis at a time: two axes of a tensor write the same gradient.
void run(std::vector<Entry>& entries, size_t k, Pass pass, const Options& options) {
  struct Job {
    Entry* entry;
    Axis* axis;
    DifferenceParams params;
    int64_t first_tile, first_partial;
  };
  std::vector<Job> jobs;
  int64_t tiles = 0, partial_count = 0;
  for (Entry& entry : entries) {
    if (entry.axes.size() <= k) continue;
    Axis& axis = entry.axes[k];
    DifferenceParams params{.axis = axis.view,
                            .tiles = axis.tiles,
                            .weight = entry.weight.const_data_ptr(),
                            .grad = nullptr,
                            .dtype = dtype_of(entry.weight),
                            .grad_dtype = dtype_of(entry.grad ? *entry.grad : entry.weight),
                            .norm = options.norm,
                            .order = options.order,
                            .factor = entry.factor,
                            .decay = k == 0 ? entry.decay : 0,
                            .row_factors = nullptr};
    if (pass != Pass::kValue) {
      params.grad = entry.grad->mutable_data_ptr();
      if (options.norm == Norm::kL21) params.row_factors = axis.row_factors.data();
    }
    jobs.push_back({&entry, &axis, params, tiles, partial_count});
    tiles += axis.tiles.count();
    partial_count += axis.tiles.count() * cpu::difference_partials(params);
  }

  const bool with_squares = pass == Pass::kValue && options.normalized && k == 0;
  std::vector<double> partials(partial_count), squares(with_squares ? tiles : 0);
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin,
                                [](int64_t tile, const Job& j) { return tile < j.first_tile; }) -
               1;
    for (int64_t tile = begin; tile < end; ++tile) {
      while (tile - job->first_tile >= job->axis->tiles.count()) ++job;
      const int64_t own = tile - job->first_tile;
      cpu::difference_tile(job->params, own,
                           &partials[job->first_partial + own * cpu::difference_partials(job->params)]);
      if (with_squares) squares[tile] = cpu::sum_of_squares_tile(job->params, own);
    }
  });
  if (pass == Pass::kGradient) return;

  for (const Job& job : jobs) {
    const DifferenceTiles& t = job.axis->tiles;
    const double* partial = &partials[job.first_partial];
    if (options.norm == Norm::kL21) {
      std::vector<double>& rows = job.axis->row_factors;
      rows.assign(job.axis->view.rows, 0);
      for (int64_t tile = 0; tile < t.count(); ++tile, partial += t.rows) {
        const int64_t first = tile % t.row_blocks * t.rows;
        const int64_t last = std::min<int64_t>(first + t.rows, rows.size());
        for (int64_t i = first; i < last; ++i) rows[i] += partial[i - first];
      }
      rows.resize(job.axis->view.rows - options.order);
      for (double& row : rows) {
        const double length = std::sqrt(row + options.eps);
        job.entry->value += length;
        row = 0.5 / length;  // the kernel's slope is that of d^2
      }
    } else {
      for (int64_t tile = 0; tile < t.count(); ++tile) job.entry->value += partial[tile];
    }
    if (with_squares) {
      for (int64_t tile = 0; tile < t.count(); ++tile) job.entry->squares += squares[job.first_tile + tile];
    }
  }
}

// Divides the value by the weight's norm and lets the gradient go through it: with S = sum W^2,
// d(N / S) = N' / S - 2 N W / S^2 (l2) and d(N / sqrt S) = N' / sqrt S - N W / S^(3/2) (the others).
void normalize(Entry& entry, const Options& options) {
  const double s = entry.squares;
  if (s == 0) {
    entry.value = entry.factor = 0;
    return;
  }
  const bool squared = options.norm == Norm::kL2;
  const double scale = squared ? s : std::sqrt(s);
  entry.value /= scale;
  entry.factor /= scale;
  entry.decay = -(squared ? 2 : 1) * entry.value * entry.factor * (scale / s);
}

// A bf16 gradient to which several terms are added: it is rounded once, when it is copied back.
Tensor in_float(const Tensor& grad) {
  return dtype_of(grad) == Dtype::kBFloat16 ? torch::stable::to(grad, ScalarType::Float) : grad;
}

// The penalty of all weights; grads, unless null, get `coefficient` times its gradient added.
double evaluate_order(const std::vector<Tensor>& weights, const std::vector<Tensor>* grads, double coefficient,
                      const Options& options) {
  std::vector<Entry> entries;
  std::vector<std::pair<Tensor, Tensor>> copies;  // a gradient and what is computed in its place
  const bool several_terms = options.normalized || options.dim.size() > 1;
  size_t axes = 0;
  for (size_t t = 0; t < weights.size(); ++t) {
    Entry entry{.weight = weights[t], .grad = {}, .axes = {}};
    entry.factor = coefficient;
    if (grads) entry.grad = several_terms ? in_float((*grads)[t]) : (*grads)[t];
    if (!find_axes(entry, options)) {
      entry.weight = torch::stable::contiguous(entry.weight);
      if (grads) entry.grad = torch::stable::contiguous(*entry.grad);
      find_axes(entry, options);
    }
    if (grads && entry.grad->data_ptr() != (*grads)[t].data_ptr()) copies.emplace_back((*grads)[t], *entry.grad);
    axes = std::max(axes, entry.axes.size());
    entries.push_back(std::move(entry));
  }

  const bool one_pass = options.norm != Norm::kL21 && !options.normalized;
  const Pass first = grads && one_pass ? Pass::kBoth : Pass::kValue;
  for (size_t k = 0; k < axes; ++k) run(entries, k, first, options);
  double total = 0;
  for (Entry& entry : entries) {
    if (options.normalized) normalize(entry, options);
    total += entry.value;
  }
  if (grads && !one_pass) {
    for (size_t k = 0; k < axes; ++k) run(entries, k, Pass::kGradient, options);
  }
  for (auto& [grad, copy] : copies) torch::stable::copy_(grad, copy);
  return total;
}

std::vector<double> evaluate(const std::vector<Tensor>& weights, const std::vector<Tensor>* grads,
                             const std::vector<double>& coefficients, const std::vector<int64_t>& orders,
                             Options options) {
  std::vector<double> values;
  for (size_t k = 0; k < orders.size(); ++k) {
    options.order = orders[k];
    values.push_back(evaluate_order(weights, grads, coefficients[k], options));
  }
  return values;
}

Tensor tensor_of(const std::vector<double>& values, const std::vector<Tensor>& weights) {
  const bool wide = !weights.empty() && weights[0].scalar_type() == ScalarType::Double;
  Tensor result =
      torch::stable::empty({static_cast<int64_t>(values.size())}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  } else {
    std::copy(values.begin(), values.end(), result.mutable_data_ptr<float>());
  }
  return result;
}

// `tensor`, one number per order, in double.
std::vector<double> numbers_of(const Tensor& tensor, const char* name, size_t count) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == static_cast<int64_t>(count), name,
                  " must have one entry per order, on the CPU");
  const Tensor wide = torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Double));
  const double* data = wide.const_data_ptr<double>();
  return {data, data + count};
}

Tensor difference_penalty(const std::vector<Tensor>& weights, const std::vector<int64_t>& orders,
                          const std::vector<int64_t>& dim, const std::string& norm, bool normalized, double eps) {
  const Options options = make_options(orders, dim, norm, normalized, eps);
  check_weights(weights);
  return tensor_of(evaluate(weights, nullptr, std::vector<double>(orders.size(), 1), orders, options), weights);
}

std::vector<Tensor> difference_penalty_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                                const std::vector<int64_t>& orders, const std::vector<int64_t>& dim,
                                                const std::string& norm, bool normalized, double eps) {
  const Options options = make_options(orders, dim, norm, normalized, eps);
  check_weights(weights);
  const std::vector<double> coefficients = numbers_of(grad, "grad", orders.size());
  std::vector<Tensor> grads;
  for (const Tensor& weight : weights) {
    grads.push_back(torch::stable::empty_like(weight));
    torch::stable::zero_(grads.back());
  }
  evaluate(weights, &grads, coefficients, orders, options);
  return grads;
}

Tensor difference_penalty_accumulate_(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                      const Tensor& coefficients, const std::vector<int64_t>& orders,
                                      const std::vector<int64_t>& dim, const std::string& norm, bool normalized,
                                      double eps) {
  const Options options = make_options(orders, dim, norm, normalized, eps);
  check_weights(weights);
  check_grads(grads, weights);
  const std::vector<double> factors = numbers_of(coefficients, "coefficients", orders.size());
  return tensor_of(evaluate(weights, &grads, factors, orders, options), weights);
}

}  // namespace
}  // namespace smoothk

STABLE_TORCH_LIBRARY(smoothk, m) {
  m.def(
      "difference_penalty(Tensor[] weights, int[] orders, int[] dim, str norm, bool normalized, float eps) -> Tensor");
  m.def(
      "difference_penalty_backward(Tensor grad, Tensor[] weights, int[] orders, int[] dim, str norm, bool normalized, "
      "float eps) -> Tensor[]");
  m.def(
      "difference_penalty_accumulate_(Tensor(a!)[] grads, Tensor[] weights, Tensor coefficients, int[] orders, int[] "
      "dim, "
      "str norm, bool normalized, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(smoothk, CPU, m) {
  m.impl("difference_penalty", TORCH_BOX(&smoothk::difference_penalty));
  m.impl("difference_penalty_backward", TORCH_BOX(&smoothk::difference_penalty_backward));
  m.impl("difference_penalty_accumulate_", TORCH_BOX(&smoothk::difference_penalty_accumulate_));
}
