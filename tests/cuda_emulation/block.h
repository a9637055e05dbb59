// A block of CUDA threads on one core of the host: each thread is a fiber that runs until it has to wait for others.
//
// What is wrong on a GPU only some of the time is wrong here every time: shared memory starts as NaN; an asynchronous
// copy makes its destination NaN when it is issued and arrives when its thread waits for it, so that neither a missing
// wait or barrier nor a buffer overwritten too early goes unnoticed; the order of the fibers can be turned round; and
// global memory is what has been declared as such.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulation {

constexpr int kWarpSize = 32;
constexpr uint32_t kSharedStart = 1024;  // its first address: the driver has memory of its own below
constexpr size_t kSharedBytes = 232448;  // the most that a block of sm_90 can have

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

extern Index thread_index, block_index;  // of the fiber that runs
extern bool reversed;                    // last thread first

// Global memory of later launches: once some is declared, any access elsewhere is an error.
void declare_memory(const void* start, size_t bytes);
void forget_memory();

// Runs `thread` for all threads of all blocks; what went wrong, or empty.
std::string run(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& thread);

// For the running fiber.
[[noreturn]] void fail(const std::string& message);
void check_global(const void* start, size_t bytes);
unsigned char* shared(uint32_t address, size_t bytes);  // checked
void barrier();

// Waits for the whole warp, then `work` is called once with what each lane brought; it may change that.
void with_warp(void* brought, const std::function<void(void* const (&lanes)[kWarpSize])>& work);

void copy_later(uint32_t to, const void* from, bool present);  // 16 bytes, or as many zeros
void commit_copies();
void wait_for_copies(size_t pending_groups);

}  // namespace emulation
