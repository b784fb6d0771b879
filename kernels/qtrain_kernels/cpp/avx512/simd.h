// AVX-512 pieces that the kernels share: masked loads, exact rounding to bfloat16, a 16x16 transposition, the hash.
#pragma once

#include <immintrin.h>

#include "../shared.h"

namespace qtrain {

// The first n of 16 (64) lanes; n may lie outside 0 ... 16 (64).
inline __mmask16 lanes16(long n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }
inline __mmask64 lanes64(long n) { return n >= 64 ? ~0ull : n <= 0 ? 0 : (1ull << n) - 1; }

inline __m512 load(const float* p, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, p); }
inline __m512 load(const bf16* p, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p)), 16));
}

inline void store(float* p, __mmask16 lanes, __m512 v) { _mm512_mask_storeu_ps(p, lanes, v); }

// To nearest, ties to even, NaN to 0x7FC0. Not vcvtneps2bf16, which flushes subnormal numbers to zero.
inline void store(bf16* p, __mmask16 lanes, __m512 v) {
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
  _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(rounded));
}

// The same bits where vcvtneps2bf16 exists, as on every CPU with AMX: it is wrong for NaN and subnormal numbers alone.
inline void store_amx(float* p, __mmask16 lanes, __m512 v) { store(p, lanes, v); }
inline void store_amx(bf16* p, __mmask16 lanes, __m512 v) {
  constexpr int QUIET_NAN = 0x01, DENORMAL = 0x20, SIGNALLING_NAN = 0x80;
  if (_mm512_fpclass_ps_mask(v, QUIET_NAN | DENORMAL | SIGNALLING_NAN)) return store(p, lanes, v);
  _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(v));
}

// 32 columns at once.
inline void store_amx(float* p, __m512 v, __m512 w) {
  _mm512_storeu_ps(p, v);
  _mm512_storeu_ps(p + 16, w);
}
inline void store_amx(bf16* p, __m512 v, __m512 w) {
  constexpr int NAN_OR_DENORMAL = 0x01 | 0x20 | 0x80;
  if (_mm512_fpclass_ps_mask(v, NAN_OR_DENORMAL) | _mm512_fpclass_ps_mask(w, NAN_OR_DENORMAL)) {
    store(p, 0xFFFF, v);
    return store(p + 16, 0xFFFF, w);
  }
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(w, v));
}

// r[i] holds row i of a 16x16 matrix of 32-bit words; afterwards column i.
inline void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 4) {  // 2x2 words within 128-bit lanes, then 2x2 pairs
    __m512i a = _mm512_unpacklo_epi32(r[i], r[i + 1]), b = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    __m512i c = _mm512_unpacklo_epi32(r[i + 2], r[i + 3]), d = _mm512_unpackhi_epi32(r[i + 2], r[i + 3]);
    t[i] = _mm512_unpacklo_epi64(a, c);
    t[i + 1] = _mm512_unpackhi_epi64(a, c);
    t[i + 2] = _mm512_unpacklo_epi64(b, d);
    t[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; i++) {  // lanes: t[i + 4j] has columns i, i + 4, i + 8, i + 12 of rows 4j ... 4j + 3
    __m512i a = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88), b = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xDD);
    __m512i c = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88), d = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xDD);
    r[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
    r[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

// Uniform in [0, 1) for 16 columns from `column` on.
inline __m512 uniform16(RowKeys row, long column) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512i x = _mm512_mullo_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32((int)column)), _mm512_set1_epi32((int)GOLDEN));
  x = _mm512_xor_si512(x, _mm512_set1_epi32((int)row.r0));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  x = _mm512_add_epi32(_mm512_mullo_epi32(x, _mm512_set1_epi32((int)MULTIPLIER_1)), _mm512_set1_epi32((int)row.r1));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
  x = _mm512_mullo_epi32(x, _mm512_set1_epi32((int)MULTIPLIER_2));
  x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(x, 8)), _mm512_set1_ps(0x1p-24f));
}

}  // namespace qtrain
