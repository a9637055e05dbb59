#include "block.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "emulated_ptx.h"

namespace smoothk::cuda {
alignas(128) unsigned char dynamic_shared[emulation::kSharedBytes];
}

namespace emulation {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point format

struct Copy {
  uint32_t to;
  const void* from;
  bool present;
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  std::vector<std::vector<Copy>> groups = {{}};  // the last one is not committed yet
};

// Where threads meet: whoever comes last opens the gate for all.
struct Gate {
  unsigned waiting = 0;
  uint64_t opened = 0;
  void* brought[kWarpSize];
};

std::vector<Fiber> fibers;
std::vector<Gate> warps;
Gate block_gate;
std::unique_ptr<unsigned char[]> stacks;
const std::function<void()>* body;
size_t shared_size, current, alive, idle;  // idle: switches since a gate opened or a fiber ended
jmp_buf scheduler;
std::string error;
std::vector<std::pair<uintptr_t, uintptr_t>> memory;

void enter(size_t fiber) {
  current = fiber;
  thread_index.x = static_cast<unsigned>(fiber);
  // makecontext once, and from then on jumps, which make no system call.
  if (!std::exchange(fibers[fiber].started, true)) setcontext(&fibers[fiber].start);
  _longjmp(fibers[fiber].state, 1);
}

// To the next fiber of `first` and the `count - 1` after it that is not done.
void switch_fiber(size_t first, size_t count) {
  size_t next = current;
  do {
    next = first + (next - first + (reversed ? count - 1 : 1)) % count;
  } while (fibers[next].done);
  if (next != current) enter(next);
}

// Waiting for its warp a fiber leaves the core to that warp, which so runs as far ahead of the others as it can.
void yield(bool to_warp) {
  if (++idle > 2 * fibers.size()) fail("deadlock: some threads wait where others do not come");
  if (_setjmp(fibers[current].state) != 0) return;
  if (to_warp) {
    switch_fiber(current / kWarpSize * kWarpSize, kWarpSize);
  } else {
    switch_fiber(0, fibers.size());
  }
}

void run_thread() {
  (*body)();
  fibers[current].done = true;
  idle = 0;
  if (--alive == 0) _longjmp(scheduler, 1);
  switch_fiber(0, fibers.size());
}

void pass(Gate& gate, unsigned threads, const std::function<void()>& open) {
  const uint64_t before = gate.opened;
  if (++gate.waiting == threads) {
    open();
    gate.waiting = 0, ++gate.opened, idle = 0;
  }
  while (gate.opened == before) yield(&gate != &block_gate);
}

void run_block(unsigned threads) {
  fibers = std::vector<Fiber>(threads);
  warps = std::vector<Gate>((threads + kWarpSize - 1) / kWarpSize);
  block_gate = {};
  alive = threads, idle = 0;
  std::memset(smoothk::cuda::dynamic_shared, kPoison, sizeof smoothk::cuda::dynamic_shared);
  for (size_t i = 0; i < threads; ++i) {
    ucontext_t& context = fibers[i].start;
    getcontext(&context);
    context.uc_stack = {.ss_sp = stacks.get() + i * kStackBytes, .ss_flags = 0, .ss_size = kStackBytes};
    makecontext(&context, run_thread, 0);
  }
  if (_setjmp(scheduler) == 0) enter(reversed ? threads - 1 : 0);
}

}  // namespace

Index thread_index, block_index;
bool reversed = false;

void declare_memory(const void* start, size_t bytes) {
  memory.emplace_back(reinterpret_cast<uintptr_t>(start), reinterpret_cast<uintptr_t>(start) + bytes);
}

void forget_memory() { memory.clear(); }

std::string run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread) {
  if (shared_bytes > kSharedBytes) return "a block has no " + std::to_string(shared_bytes) + " bytes of shared memory";
  shared_size = shared_bytes, body = &thread;
  stacks = std::make_unique_for_overwrite<unsigned char[]>(threads * kStackBytes);
  error.clear();
  for (unsigned block = 0; block < blocks && error.empty(); ++block) {
    block_index.x = block;
    run_block(threads);
  }
  return error;
}

void fail(const std::string& message) {
  error = message + ", block " + std::to_string(block_index.x) + ", thread " + std::to_string(thread_index.x);
  _longjmp(scheduler, 1);
}

void check_global(const void* start, size_t bytes) {
  const auto first = reinterpret_cast<uintptr_t>(start);
  if (first % bytes != 0) fail("misaligned access to global memory");
  const bool known = std::any_of(memory.begin(), memory.end(), [&](const auto& range) {
    return first >= range.first && first + bytes <= range.second;
  });
  if (!known && !memory.empty()) fail("access outside of global memory");
}

unsigned char* shared(uint32_t address, size_t bytes) {
  if (address % bytes != 0) fail("misaligned access to shared memory");
  const uint32_t offset = address - kSharedStart;
  if (address < kSharedStart || offset + bytes > shared_size) fail("access outside of shared memory");
  return smoothk::cuda::dynamic_shared + offset;
}

void barrier() {
  pass(block_gate, static_cast<unsigned>(fibers.size()), [] {});
}

void with_warp(void* brought, const std::function<void(void* const (&lanes)[kWarpSize])>& work) {
  Gate& gate = warps[current / kWarpSize];
  gate.brought[current % kWarpSize] = brought;
  pass(gate, kWarpSize, [&] { work(gate.brought); });
}

void copy_later(uint32_t to, const void* from, bool present) {
  std::memset(shared(to, 16), kPoison, 16);
  if (present) check_global(from, 16);
  fibers[current].groups.back().push_back({to, from, present});
}

void commit_copies() { fibers[current].groups.emplace_back(); }

void wait_for_copies(size_t pending_groups) {
  auto& groups = fibers[current].groups;
  while (groups.size() > pending_groups + 1) {
    for (const Copy& copy : groups.front()) {
      if (copy.present) {
        std::memcpy(shared(copy.to, 16), copy.from, 16);
      } else {
        std::memset(shared(copy.to, 16), 0, 16);
      }
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulation
