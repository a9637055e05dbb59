// The Python module smoothk._C: importing it registers the operators. No tensor passes through pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/simd.h"
#include "low_rank_conv.h"

#if defined(__clang__)
#define SMOOTHK_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define SMOOTHK_COMPILER "gcc " __VERSION__
#else
#define SMOOTHK_COMPILER "unknown"
#endif

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["mode"] = SMOOTHK_BUILD_MODE;
  info["compiler"] = SMOOTHK_COMPILER;
  info["flags"] = SMOOTHK_BUILD_FLAGS;
  info["cxx_standard"] = __cplusplus / 100 % 100;
  info["simd"] = smoothk::cpu::simd_sets()[smoothk::cpu::simd_index()];
  info["torch"] = SMOOTHK_TORCH_VERSION;
  return info;
}

void use_simd(const std::string& name) {
  const auto& sets = smoothk::cpu::simd_sets();
  const auto found = std::find(sets.begin(), sets.end(), name);
  if (found == sets.end()) throw std::invalid_argument("name must be one of simd_sets(), got '" + name + "'");
  smoothk::cpu::use_simd(static_cast<int>(found - sets.begin()));
}

// A hash of `size` bytes at `address`: of all of them, or of 64 words spread over them where they are many.
uint64_t sample_bits(uintptr_t address, size_t size) {
  constexpr size_t kAll = 4096, kWords = 64, kWord = sizeof(uint64_t);
  const size_t step = size <= kAll ? kWord : (size - kWord) / (kWords - 1);
  const auto* bytes = reinterpret_cast<const char*>(address);
  uint64_t hash = size;
  for (size_t at = 0; at < size; at += step) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, std::min(kWord, size - at));
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

int64_t packed_size(const std::vector<int64_t>& v_shape, const std::vector<int64_t>& u_shape, int64_t groups) {
  return smoothk::cpu::low_rank_conv_packed_size(smoothk::factors_shape(v_shape, u_shape, groups));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of smoothk";
  m.def("build_info", &build_info, "How this extension was built, and the instruction set its kernels use here.");
  m.def("simd_sets", &smoothk::cpu::simd_sets, "Instruction sets that the kernels have here, the best one last.");
  m.def("use_simd", &use_simd, "Use another one from now on; for tests, and only while no kernel runs.");
  m.def("sample_bits", &sample_bits, "Hash of the bytes at an address, or of 64 words of them where they are many.");
  m.def("low_rank_conv_packed_size", &packed_size, "Numbers that the packed form of factors of these shapes has.");
}
