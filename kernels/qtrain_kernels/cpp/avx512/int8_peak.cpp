// The roof of int8_scaled_mm: its products alone, of registers that nothing fills and nothing reads.

#include "int8_scaled_mm_amx.h"

namespace qtrain {
namespace {

void amx_products(long steps) {
  configure_tiles();  // which makes all of them zero
  for (long i = 0; i < steps; i++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}

void vnni_products(long steps) {
  __m512i a = _mm512_set1_epi32(1), b = _mm512_set1_epi32(2);
  __m512i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
  for (long i = 0; i < steps; i++)
    asm volatile(
        "vpdpbusd %13, %12, %0\n vpdpbusd %13, %12, %1\n vpdpbusd %13, %12, %2\n vpdpbusd %13, %12, %3\n"
        "vpdpbusd %13, %12, %4\n vpdpbusd %13, %12, %5\n vpdpbusd %13, %12, %6\n vpdpbusd %13, %12, %7\n"
        "vpdpbusd %13, %12, %8\n vpdpbusd %13, %12, %9\n vpdpbusd %13, %12, %10\n vpdpbusd %13, %12, %11\n"
        : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7), "+v"(s8), "+v"(s9), "+v"(s10), "+v"(s11)
        : "v"(a), "v"(b));
}

}  // namespace
}  // namespace qtrain

// Returns the operations (two a product) of all threads.
extern "C" double qtrain_int8_products(int amx, int threads, long steps) {
#pragma omp parallel num_threads(threads)
  amx ? qtrain::amx_products(steps) : qtrain::vnni_products(steps);
  return 2.0 * (double)threads * (double)steps * (amx ? 4 * 16 * 16 * 64 : 12 * 64);
}
