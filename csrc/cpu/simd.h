// Some sources are compiled once per instruction set, each time into a namespace of its own, and the best copy that
// this machine runs is taken. No inline function may be shared between the copies, or the linker could pick the wrong
// one.
#pragma once

#include <vector>

namespace smoothk::cpu {

// Names of the sets that this machine runs, the best one last.
const std::vector<const char*>& simd_sets();

// Index of the set in use: the last one, unless `use_simd` says otherwise.
int simd_index();

// Takes the copies for another of the sets from now on. Not while a kernel runs.
void use_simd(int index);

// The copies of a constant, in the order of the sets.
#if defined(__x86_64__) && defined(__linux__)
#define SMOOTHK_COPIES(name) \
  {&::smoothk::cpu::baseline::name, &::smoothk::cpu::x86_64_v3::name, &::smoothk::cpu::x86_64_v4::name}
#else
#define SMOOTHK_COPIES(name) {&::smoothk::cpu::baseline::name}
#endif

}  // namespace smoothk::cpu
