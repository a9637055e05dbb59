// Small kernels that show what the emulation does, for tests/test_cuda_emulation.py.
#include "../../csrc/cuda/ptx.cuh"

namespace {

using namespace smoothk::cuda;

constexpr int kWarp = emulation::kWarpSize;

std::string failure;

const char* run(unsigned threads, size_t shared_bytes, const std::function<void()>& thread) {
  failure = emulation::run(1, threads, shared_bytes, thread);
  return failure.empty() ? nullptr : failure.c_str();
}

}  // namespace

extern "C" {

// One mma of a warp: registers a [32, 4], b [32, 2] and c [32, 4], which is added to. Kind: 0 bf16, 1 fp16, 2 tf32.
const char* warp_mma(int kind, const uint32_t* a, const uint32_t* b, float* c) {
  const auto multiply = kind == 0 ? mma_bf16 : kind == 1 ? mma_fp16 : mma_tf32;
  return run(kWarp, 0, [&] {
    const unsigned lane = threadIdx.x;
    uint32_t mine[4];
    float sums[4];
    std::copy_n(a + lane * 4, 4, mine);
    std::copy_n(c + lane * 4, 4, sums);
    multiply(sums, mine, b[lane * 2], b[lane * 2 + 1]);
    std::copy_n(sums, 4, c + lane * 4);
  });
}

// Copies `bytes` bytes to shared memory; lane i loads the row at byte rows[i] of it into registers result [32, 4].
const char* warp_ldmatrix(const unsigned char* memory, size_t bytes, const uint32_t* rows, uint32_t* result) {
  return run(kWarp, bytes, [&] {
    const unsigned lane = threadIdx.x;
    if (lane == 0) std::copy_n(memory, bytes, emulation::shared(shared_address(), 1));
    __syncthreads();
    uint32_t mine[4];
    ldmatrix(mine, shared_address() + rows[lane]);
    std::copy_n(mine, 4, result + lane * 4);
  });
}

// bits: of a float. Kind as above.
uint32_t rounded(int kind, uint32_t bits) {
  const float value = bits_to_float(bits);
  return kind == 0 ? pack_bf16(value, 0) : kind == 1 ? pack_fp16(value, 0) : round_tf32(bits);
}

// Each of two warps' threads copies 16 bytes of `memory` to shared memory and stores what its neighbour copied, [64,
// 4].
const char* copy_to_neighbour(const uint32_t* memory, bool commit, bool wait, bool barrier, uint32_t* result) {
  return run(2 * kWarp, 2 * kWarp * 16, [&] {
    const unsigned me = threadIdx.x, neighbour = (me + 1) % (2 * kWarp);
    cp_async(shared_address() + me * 16, memory + me * 4, true);
    if (commit) cp_async_commit();
    if (wait) cp_async_wait<0>();
    if (barrier) __syncthreads();
    const uint4 found = load_shared(shared_address() + neighbour * 16);
    const uint32_t words[] = {found.x, found.y, found.z, found.w};
    std::copy_n(words, 4, result + me * 4);
  });
}

const char* read_shared_at(int32_t address) {
  return run(kWarp, 64, [&] { load_shared(shared_address() + address); });
}

const char* half_a_block_waits() {
  return run(2 * kWarp, 0, [] {
    if (threadIdx.x < kWarp) __syncthreads();
    uint32_t registers[4] = {};
    float sums[4];
    if (threadIdx.x % 2 == 0) mma_bf16(sums, registers, 0, 0);
  });
}
}
