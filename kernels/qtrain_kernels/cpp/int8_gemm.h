// What int8_scaled_mm has in common in every instruction set: its operands, and how threads share the work.
#pragma once

#include <algorithm>

#include "shared.h"

namespace qtrain {

struct GemmOperands {
  const int8_t *a, *b;
  long a_stride, b_stride;  // between rows of a; of b, between rows [N] where b_k_major, else between rows [K]
  bool b_k_major;
  const float *a_scale, *b_scale, *bias;  // scales [M], [N]; bias [N] or null
  long M, N, K;
};

// Rows of a that a thread takes at a time: whole blocks, as many as fit (one at least), and not more than leave some for every
// thread.
inline long rows_at_a_time(long M, long block, long fitting, int threads) {
  const long share = round_up((M + threads - 1) / threads, block);
  return std::min(share, std::max(1L, fitting / block) * block);
}

// One of the memories that a thread keeps, in this library. In a function, since only who passes the declaration frees it at its end.
struct Packed;
struct Own;
template <class Use>
static Scratch& scratch_for() {
  static thread_local Scratch memory;
  return memory;
}

// All threads pack(packed) together, ending with a barrier; then each takes pieces, multiply(piece, packed, own), with `bytes` of
// its own. 0, or 1 where there is no memory.
template <class Pack, class Multiply>
int multiply_pieces(long pieces, long packed_bytes, long bytes, int threads, Pack pack, Multiply multiply) {
  uint8_t* packed = (uint8_t*)scratch_for<Packed>().get(packed_bytes);
  if (packed == nullptr) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
    pack(packed);
    uint8_t* own = (uint8_t*)scratch_for<Own>().get(bytes);
    failed = own == nullptr;
#pragma omp for schedule(dynamic, 1) nowait
    for (long piece = 0; piece < pieces; piece++)
      if (!failed) multiply(piece, packed, own);
  }
  return failed;
}

}  // namespace qtrain
