// Operators of the namespace smoothk on the CPU: schemas, the checks that protect memory, allocation and
// registration. Full checks with messages for users are in smoothk/functional.py. Everything goes through
// torch's stable ABI, so one binary serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "difference.h"

namespace smoothk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "dtype must be float32, float64, bfloat16 or float16, got ",
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
  const bool half = dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
  STD_TORCH_CHECK(grad_dtype == dtype || (half && grad_dtype == Dtype::kFloat32),
                  "grads must have the dtype of the weights, or float32 for bfloat16 and float16 weights");
  std::vector<const void*> starts;
  for (size_t t = 0; t < grads.size(); ++t) {
    const auto expected = weights[t].sizes(), sizes = grads[t].sizes(), strides = grads[t].strides();
    STD_TORCH_CHECK(expected.size() == sizes.size() && std::equal(expected.begin(), expected.end(), sizes.begin()),
                    "grads[", t, "] must have the shape of weights[", t, "]");
    if (grads[t].numel() == 0) continue;
    for (size_t d = 0; d < sizes.size(); ++d) {
      STD_TORCH_CHECK(sizes[d] < 2 || strides[d] != 0, "grads[", t, "] must not be an expanded tensor");
    }
    starts.push_back(grads[t].const_data_ptr());
  }
  std::sort(starts.begin(), starts.end());
  STD_TORCH_CHECK(std::adjacent_find(starts.begin(), starts.end()) == starts.end(),
                  "grads must not share memory: pass a tied weight once");
}

// Describes the entries of a tensor in storage order, and the axes of `dims` along which it has a difference; false for
// strides that overlap, and for gaps other than between long runs.
bool describe(const Tensor& tensor, const std::vector<int64_t>& dims, int64_t order, DifferenceTensor& result) {
  constexpr int64_t kLong = 32;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  const auto rank = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> axes, spans(rank, 1);
  const bool empty = tensor.numel() == 0;  // its strides mean nothing, and no copy would change them
  for (int64_t d = 0; d < rank; ++d) {
    if (sizes[d] > 1 && !empty) axes.push_back(d);
  }
  std::sort(axes.begin(), axes.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  result = {.size = 1, .run = 1, .pitch = 1};
  for (int64_t d : axes) {
    // Up to the first gap the run grows, from there on the number of runs.
    if (result.run == result.size) result.pitch = strides[d];
    if (strides[d] < result.run || strides[d] != result.size / result.run * result.pitch) return false;
    if (strides[d] == result.size) {
      result.run *= sizes[d];
    } else if (result.run < kLong) {
      return false;
    }
    spans[d] = result.size;
    result.size *= sizes[d];
  }
  if (empty) result.size = 0;
  for (int64_t dim : dims) {
    if (dim < 0) dim += rank;
    if (dim < 0 || dim >= rank || sizes[dim] <= order) continue;
    result.axes.push_back({sizes[dim], spans[dim], strides[dim]});
  }
  return true;
}

bool same_strides(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), x = a.strides(), y = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && x[d] != y[d]) return false;
  }
  return true;
}

DifferenceOptions make_options(const std::vector<Tensor>& weights, const std::vector<int64_t>& orders,
                               const std::string& norm, bool normalized, double eps) {
  check_weights(weights);
  int64_t order_bits = 0;
  for (int64_t order : orders) {
    STD_TORCH_CHECK(order == 1 || order == 2, "orders must be 1 or 2, got ", order);
    STD_TORCH_CHECK(order > order_bits, "orders must be [1], [2] or [1, 2]");
    order_bits |= order;
  }
  STD_TORCH_CHECK(order_bits != 0, "orders must be [1], [2] or [1, 2]");
  const std::pair<const char*, Norm> names[] = {
      {"l2", Norm::kL2}, {"l1", Norm::kL1}, {"l21", Norm::kL21}, {"huber", Norm::kHuber}};
  const auto named = std::find_if(std::begin(names), std::end(names), [&](const auto& n) { return norm == n.first; });
  STD_TORCH_CHECK(named != std::end(names), "norm must be one of l2, l1, l21, huber, got ", norm);
  const Dtype dtype = weights.empty() ? Dtype::kFloat32 : dtype_of(weights[0]);
  return {order_bits, named->second, normalized, eps, dtype, dtype, {}};
}

// `tensor`, which has one number per order.
PerOrder per_order(const Tensor& tensor, const char* name, const DifferenceOptions& options) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 1 && tensor.size(0) == (options.orders == 3 ? 2 : 1) &&
                      (dtype == ScalarType::Double || dtype == ScalarType::Float),
                  name, " must have one float64 or float32 entry per order, on the CPU");
  PerOrder result{};
  int64_t at = 0;
  for (int64_t order = 1; order <= 2; ++order) {
    if (!options.has(order)) continue;
    result[order - 1] =
        dtype == ScalarType::Double ? tensor.const_data_ptr<double>()[at] : tensor.const_data_ptr<float>()[at];
    at += tensor.stride(0);
  }
  return result;
}

Tensor empty_terms(const DifferenceOptions& options) {
  const bool wide = options.dtype == Dtype::kFloat64;
  return torch::stable::empty({options.orders == 3 ? 2 : 1}, wide ? ScalarType::Double : ScalarType::Float);
}

void write_terms(Tensor& result, const PerOrder& terms, const DifferenceOptions& options) {
  for (int64_t order = 1, at = 0; order <= 2; ++order) {
    if (!options.has(order)) continue;
    if (options.dtype == Dtype::kFloat64) {
      result.mutable_data_ptr<double>()[at++] = terms[order - 1];
    } else {
      result.mutable_data_ptr<float>()[at++] = static_cast<float>(terms[order - 1]);
    }
  }
}

// The terms of all weights. Grads, unless null, get the coefficients times their gradients added, and the terms come
// times the coefficients.
Tensor evaluate(const std::vector<Tensor>& weights, const std::vector<Tensor>* grads, const std::vector<int64_t>& dims,
                const DifferenceOptions& options) {
  const int64_t lowest = options.orders & 1 ? 1 : 2;
  std::vector<DifferenceTensor> tensors;
  std::vector<Tensor> copies;                       // weights in another layout
  std::vector<std::pair<Tensor, Tensor>> replaced;  // a gradient and what is computed in its place
  for (size_t t = 0; t < weights.size(); ++t) {
    const Tensor *weight = &weights[t], *grad = grads ? &(*grads)[t] : nullptr;
    DifferenceTensor tensor;
    if (!describe(*weight, dims, lowest, tensor) || (grad && !same_strides(*weight, *grad))) {
      weight = &copies.emplace_back(torch::stable::contiguous(*weight));
      if (grad && !same_strides(*weight, *grad)) {
        grad = &replaced.emplace_back(*grad, torch::stable::contiguous(*grad)).second;
      }
      describe(*weight, dims, lowest, tensor);
    }
    if (tensor.axes.empty()) continue;
    tensor.weight = weight->const_data_ptr();
    if (grad) tensor.grad = grad->mutable_data_ptr();
    tensors.push_back(std::move(tensor));
  }
  Tensor result = empty_terms(options);  // before anything is written, and while caches hold the code of it
  PerOrder terms = cpu::difference(options, tensors, [](int64_t size, int64_t grain, const auto& body) {
    torch::stable::parallel_for(0, size, grain, body);
  });
  for (auto& [grad, copy] : replaced) torch::stable::copy_(grad, copy);
  for (size_t k = 0; k < terms.size() && grads; ++k) terms[k] *= options.coefficients[k];
  write_terms(result, terms, options);
  return result;
}

Tensor difference_penalty(const std::vector<Tensor>& weights, const std::vector<int64_t>& orders,
                          const std::vector<int64_t>& dim, const std::string& norm, bool normalized, double eps) {
  return evaluate(weights, nullptr, dim, make_options(weights, orders, norm, normalized, eps));
}

std::vector<Tensor> difference_penalty_backward(const Tensor& grad, const std::vector<Tensor>& weights,
                                                const std::vector<int64_t>& orders, const std::vector<int64_t>& dim,
                                                const std::string& norm, bool normalized, double eps) {
  DifferenceOptions options = make_options(weights, orders, norm, normalized, eps);
  options.coefficients = per_order(grad, "grad", options);
  std::vector<Tensor> grads;
  for (const Tensor& weight : weights) {
    grads.push_back(torch::stable::empty_like(weight));
    torch::stable::zero_(grads.back());
  }
  evaluate(weights, &grads, dim, options);
  return grads;
}

Tensor difference_penalty_accumulate_(const std::vector<Tensor>& grads, const std::vector<Tensor>& weights,
                                      const Tensor& coefficients, const std::vector<int64_t>& orders,
                                      const std::vector<int64_t>& dim, const std::string& norm, bool normalized,
                                      double eps) {
  DifferenceOptions options = make_options(weights, orders, norm, normalized, eps);
  options.coefficients = per_order(coefficients, "coefficients", options);
  check_grads(grads, weights);
  if (!grads.empty()) options.grad_dtype = dtype_of(grads[0]);
  return evaluate(weights, &grads, dim, options);
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
