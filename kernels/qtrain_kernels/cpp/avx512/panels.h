// What the int8 GEMMs in AVX-512 share: operands, panels of b, and what becomes of sums.
//
// b is packed once into panels of 16 columns, [K / 4][16][4] bytes each, where one 64-byte line is what `vpdpbusd`
// and a row of an AMX tile both want: four neighbours of K for each of 16 columns.
#pragma once

#include <algorithm>
#include <cstring>

#include "../int8_gemm.h"
#include "simd.h"

namespace qtrain {

constexpr long LINE = 64;  // bytes; of K, a step of AMX

struct Operands : GemmOperands {
  long width() const { return round_up(std::max(K, 1L), LINE); }
  long panels() const { return (N + 15) / 16; }
  // A panel and one line, so that panels do not all begin in the same set of a cache.
  long panel_bytes() const { return width() * 16 + LINE; }
};

// Panel p of b where b lies [N][K]. `flip` is 0x80 where panels hold code + 128.
inline void pack_k_major(const Operands& o, long p, uint8_t* panel, int flip) {
  const __m512i flips = _mm512_set1_epi8((char)flip);
  const long columns = std::min(16L, o.N - 16 * p);
  for (long k = 0; k < o.width(); k += LINE) {
    __m512i words[16];
    for (long j = 0; j < 16; j++)
      words[j] = j < columns ? _mm512_maskz_loadu_epi8(lanes64(o.K - k), o.b + (16 * p + j) * o.b_stride + k) : _mm512_setzero_si512();
    transpose16(words);
    for (long i = 0; i < 16; i++) _mm512_store_si512(panel + (k / 4 + i) * LINE, _mm512_xor_si512(words[i], flips));
  }
}

// Panels p ... p + 3 of b where b lies [K][N]: of four rows' 64 columns each time, whole lines.
inline void pack_four_panels(const Operands& o, long p, uint8_t* panel, int flip) {
  const __m512i flips = _mm512_set1_epi8((char)flip);
  const __mmask64 lanes = lanes64(o.N - 16 * p);
  const long there = std::min(4L, o.panels() - p);
  for (long k = 0; k < o.width(); k += 4) {
    __m512i r[4];
    for (long j = 0; j < 4; j++)
      r[j] = k + j < o.K ? _mm512_maskz_loadu_epi8(lanes, o.b + (k + j) * o.b_stride + 16 * p) : _mm512_setzero_si512();
    const __m512i low = _mm512_unpacklo_epi8(r[0], r[1]), low2 = _mm512_unpacklo_epi8(r[2], r[3]);
    const __m512i high = _mm512_unpackhi_epi8(r[0], r[1]), high2 = _mm512_unpackhi_epi8(r[2], r[3]);
    // Lane i (of 128 bits) of w[j] holds columns 16 i + 4 j ... + 3 with their four bytes; panel i wants lanes i of all
    const __m512i w[4] = {_mm512_unpacklo_epi16(low, low2), _mm512_unpackhi_epi16(low, low2), _mm512_unpacklo_epi16(high, high2),
                          _mm512_unpackhi_epi16(high, high2)};
    const __m512i a = _mm512_shuffle_i32x4(w[0], w[1], 0x44), b = _mm512_shuffle_i32x4(w[2], w[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(w[0], w[1], 0xEE), d = _mm512_shuffle_i32x4(w[2], w[3], 0xEE);
    const __m512i lines[4] = {_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xDD), _mm512_shuffle_i32x4(c, d, 0x88),
                              _mm512_shuffle_i32x4(c, d, 0xDD)};
    for (long i = 0; i < there; i++)
      _mm512_store_si512(panel + i * o.panel_bytes() + k * 16, _mm512_xor_si512(lines[i], flips));
  }
}

// All panels of b, by the threads of the parallel region that calls this; ends with a barrier.
inline void pack(const Operands& o, uint8_t* packed, int flip) {
  const long panels = o.panels(), bytes = o.panel_bytes();
  if (o.b_k_major) {
#pragma omp for schedule(static)
    for (long p = 0; p < panels; p++) pack_k_major(o, p, packed + p * bytes, flip);
  } else {
#pragma omp for schedule(static)
    for (long p = 0; p < panels; p += 4) pack_four_panels(o, p, packed + p * bytes, flip);
  }
}

// The epilogue of 16 columns of y: the same for all rows, so that it is loaded once for many.
struct Columns {
  __mmask16 lanes;
  bool biased;
  __m512 scale, bias;
  Columns(const Operands& o, long n) : lanes(lanes16(o.N - n)), biased(o.bias != nullptr), scale(load(o.b_scale + n, lanes)) {
    bias = biased ? load(o.bias + n, lanes) : _mm512_setzero_ps();
  }
  __m512 finish(__m512i sums, float a_scale) const {
    __m512 v = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(a_scale)), scale);
    return biased ? _mm512_add_ps(v, bias) : v;
  }
};

}  // namespace qtrain
