// Instructions of a whole warp. The layouts of the fragments are those of the PTX ISA, "Matrix multiply-accumulate
// operation using mma instruction" and "ldmatrix".
#include "emulated_ptx.h"

namespace smoothk::cuda {
namespace {

// C += A B with A of 16 rows and B of 8 columns. A register holds `kEntries` neighbours in the depth, `read(word,
// entry)` of them one, and the depth is eight registers: a lane has numbers q and q+4 of rows g and g+8 of A, and of
// column g of B.
template <int kEntries, class Read>
void multiply_fragments(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const Read& read) {
  struct Lane {
    float (&c)[4];
    const uint32_t (&a)[4];
    uint32_t b[2];
  } mine{c, a, {b0, b1}};
  emulation::with_warp(&mine, [&](void* const(&lanes)[emulation::kWarpSize]) {
    float left[16][8 * kEntries], right[8][8 * kEntries];
    for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
      const Lane& from = *static_cast<Lane*>(lanes[lane]);
      for (int word = 0; word < 4; ++word) {
        for (int entry = 0; entry < kEntries; ++entry) {
          const int depth = (lane % 4 + word / 2 * 4) * kEntries + entry;
          left[lane / 4 + word % 2 * 8][depth] = read(from.a[word], entry);
          if (word < 2) right[lane / 4][(lane % 4 + word * 4) * kEntries + entry] = read(from.b[word], entry);
        }
      }
    }
    for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = 0;
        for (int k = 0; k < 8 * kEntries; ++k) sum += left[row][k] * right[column][k];
        static_cast<Lane*>(lanes[lane])->c[i] += sum;
      }
    }
  });
}

}  // namespace

void ldmatrix(uint32_t (&to)[4], uint32_t from) {
  struct Lane {
    uint32_t (&to)[4];
    uint32_t from;
  } mine{to, from};
  emulation::with_warp(&mine, [](void* const(&lanes)[emulation::kWarpSize]) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int lane = 0; lane < emulation::kWarpSize; ++lane) {
        const uint32_t row = static_cast<Lane*>(lanes[matrix * 8 + lane / 4])->from;
        emulation::shared(row, 16);  // as a whole
        static_cast<Lane*>(lanes[lane])->to[matrix] = read_shared<uint32_t>(row + lane % 4 * 4);
      }
    }
  });
}

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<2>(c, a, b0, b1,
                        [](uint32_t word, int i) { return unpack_bf16(static_cast<uint16_t>(word >> 16 * i)); });
}
void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<2>(c, a, b0, b1,
                        [](uint32_t word, int i) { return unpack_fp16(static_cast<uint16_t>(word >> 16 * i)); });
}
void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply_fragments<1>(c, a, b0, b1, [](uint32_t word, int) { return read_tf32(word); });
}

}  // namespace smoothk::cuda
