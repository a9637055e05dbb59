// The Python module smoothk._C: importing it registers the operators. No tensor passes through pybind11.
#include <pybind11/pybind11.h>

#include "difference.h"

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
  info["simd"] = smoothk::cpu::simd();
  info["torch"] = SMOOTHK_TORCH_VERSION;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of smoothk";
  m.def("build_info", &build_info, "How this extension was built, and the instruction set its kernels use here.");
}
