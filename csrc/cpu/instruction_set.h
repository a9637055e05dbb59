// Some sources are compiled once per instruction set, each time into a namespace of its own, and the best copy that
// this machine runs is chosen when the library is loaded. No inline function may be shared between the copies, or the
// linker could pick the wrong one.
#pragma once

namespace smoothk::cpu {

#if defined(__x86_64__) && defined(__linux__)
inline int x86_64_level() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") ? 4 : __builtin_cpu_supports("x86-64-v3") ? 3 : 1;
}
#define SMOOTHK_BEST(name)                                 \
  (::smoothk::cpu::x86_64_level() == 4   ? x86_64_v4::name \
   : ::smoothk::cpu::x86_64_level() == 3 ? x86_64_v3::name \
                                         : baseline::name)
#else
#define SMOOTHK_BEST(name) baseline::name
#endif

}  // namespace smoothk::cpu
