#include "simd.h"

namespace smoothk::cpu {
namespace {

std::vector<const char*> find_sets() {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  std::vector<const char*> found{"x86-64"};
  if (__builtin_cpu_supports("x86-64-v3")) found.push_back("x86-64-v3");
  if (__builtin_cpu_supports("x86-64-v4")) found.push_back("x86-64-v4");
  return found;
#elif defined(__aarch64__)
  return {"neon"};
#else
  return {"baseline"};
#endif
}

int index = static_cast<int>(simd_sets().size()) - 1;

}  // namespace

const std::vector<const char*>& simd_sets() {
  static const std::vector<const char*> sets = find_sets();
  return sets;
}

int simd_index() { return index; }

void use_simd(int chosen) { index = chosen; }

}  // namespace smoothk::cpu
