// x [R, C] -> int8 codes and scales along its rows and along its columns; quantize_rows_columns.py has the equations.
//
// Two passes over x: the largest magnitudes of rows and columns, then the codes. The second works on 64 x 64 tiles, so
// that both copies are written in whole cache lines: rows as they are, columns after a transposition in registers.
// Magnitudes are compared as the integers of their bits, where NaN > infinity > every number: none is lost.

#include <cstring>

#include "simd.h"

namespace qtrain {
namespace {

inline __m512i magnitude(__m512 v) { return _mm512_castps_si512(_mm512_abs_ps(v)); }

// v -> codes as 32-bit integers, of which the low byte counts: NaN converts to 0x80000000, whose low byte is 0.
inline __m512i codes_of(__m512 v) { return _mm512_cvtps_epi32(v); }

inline __m512i codes_of(__m512 v, __m512 u, __m512i qmax) {
  __m512 floor = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __mmask16 up = _mm512_cmp_ps_mask(u, _mm512_sub_ps(v, floor), _CMP_LT_OQ);
  __m512i code = _mm512_cvtps_epi32(floor);
  return _mm512_min_epi32(_mm512_mask_add_epi32(code, up, code, _mm512_set1_epi32(1)), qmax);
}

template <class T>
struct Quantizer {
  const T* x;
  long R, C, stride;
  Side rows, columns;
  Key row_key, column_key;
  int64_t row_offset;
  float *row_inverse, *column_inverse;  // 1 / scale
  int32_t* column_bits;                 // [threads][C]: largest magnitudes, as bits

  // Largest magnitudes of rows [from, to): of rows into rows.scale (bits), of columns into `bits`.
  void measure(long from, long to, int32_t* bits) const {
    if (columns.codes) std::memset(bits, 0, C * sizeof(int32_t));
    for (long r = from; r < to; r++) {
      __m512i largest = _mm512_setzero_si512();
      __m512 fold = _mm512_set1_ps(columns.fold ? columns.fold[r] : 1.0f);
      for (long c = 0; c < C; c += 16) {
        __mmask16 lanes = lanes16(C - c);
        __m512 v = load(x + r * stride + c, lanes);
        if (rows.codes) {
          __m512 folded = rows.fold ? _mm512_mul_ps(v, load(rows.fold + c, lanes)) : v;
          largest = _mm512_max_epi32(largest, magnitude(folded));
        }
        if (columns.codes) {
          __m512i seen = _mm512_maskz_loadu_epi32(lanes, bits + c);
          __m512 folded = columns.fold ? _mm512_mul_ps(v, fold) : v;
          _mm512_mask_storeu_epi32(bits + c, lanes, _mm512_max_epi32(seen, magnitude(folded)));
        }
      }
      if (rows.codes) {
        int32_t most = _mm512_reduce_max_epi32(largest);
        std::memcpy(&rows.scale[r], &most, 4);
      }
    }
  }

  // From magnitudes to scales, once all threads have measured.
  void finish_scales(int threads) const {
    finish_row_scales(rows, row_inverse, R);
    finish_column_scales(columns, column_inverse, C, column_bits, threads);
  }

  // The codes of rows [r, r + 64) and columns [c, c + 64). Everything is copied out of *this first: codes are stored as
  // bytes, after which a compiler has to read members again. Without a fold the factor is one, which changes nothing.
  template <bool ROWS, bool COLUMNS, bool STOCHASTIC>
  void tile(long r, long c) const {
    alignas(64) __m512i words[4][16];  // [16 columns each][4 rows each]: words of four rows' codes a column
    const __m512i byte = _mm512_set1_epi32(255), row_top = _mm512_set1_epi32(rows.qmax), column_top = _mm512_set1_epi32(columns.qmax);
    const __m512 one = _mm512_set1_ps(1.0f);
    const bool row_noise = STOCHASTIC && rows.stochastic, column_noise = STOCHASTIC && columns.stochastic;
    const Key row_key = this->row_key, column_key = this->column_key;
    const long R = this->R, C = this->C, stride = this->stride, last = R - r < TILE ? R - r : TILE;
    const T* const x = this->x + r * stride + c;
    int8_t* const row_codes = rows.codes + r * C + c;
    __mmask16 lanes[4];
    __m512 row_fold[4], column_scale[4];
    for (int g = 0; g < 4; g++) {
      lanes[g] = lanes16(C - c - 16 * g);
      row_fold[g] = ROWS && rows.fold ? load(rows.fold + c + 16 * g, lanes[g]) : one;
      column_scale[g] = COLUMNS ? load(column_inverse + c + 16 * g, lanes[g]) : one;
    }
    for (int quad = 0; quad < 16; quad++) {
      for (int g = 0; g < 4; g++) words[g][quad] = _mm512_setzero_si512();
      for (long i = 4 * quad; i < 4 * quad + 4 && i < last; i++) {
        const __m512 row_scale = _mm512_set1_ps(ROWS ? row_inverse[r + i] : 0);
        const __m512 column_fold = _mm512_set1_ps(COLUMNS && columns.fold ? columns.fold[r + i] : 1.0f);
        for (int g = 0; g < 4 && lanes[g]; g++) {
          const __m512 v = load(x + i * stride + 16 * g, lanes[g]);
          if (ROWS) {
            __m512 y = _mm512_mul_ps(_mm512_mul_ps(v, row_fold[g]), row_scale);
            __m512i codes = row_noise ? codes_of(y, uniform16(row_key.row(row_offset + r + i), c + 16 * g), row_top) : codes_of(y);
            _mm_mask_storeu_epi8(row_codes + i * C + 16 * g, lanes[g], _mm512_cvtepi32_epi8(codes));
          }
          if (COLUMNS) {
            __m512 y = _mm512_mul_ps(_mm512_mul_ps(v, column_fold), column_scale[g]);
            __m512i codes = column_noise ? codes_of(y, uniform16(column_key.row(row_offset + r + i), c + 16 * g), column_top) : codes_of(y);
            codes = _mm512_sll_epi32(_mm512_and_si512(codes, byte), _mm_cvtsi32_si128(8 * (i & 3)));
            words[g][quad] = _mm512_or_si512(words[g][quad], codes);
          }
        }
      }
    }
    if (!COLUMNS) return;
    for (long g = 0; g < 4; g++) {
      transpose16(words[g]);
      for (long i = 0; i < 16 && c + 16 * g + i < C; i++)
        _mm512_mask_storeu_epi8(columns.codes + (c + 16 * g + i) * R + r, lanes64(last), words[g][i]);
    }
  }

  template <bool STOCHASTIC>
  auto tiles() const {
    if (!columns.codes) return &Quantizer::tile<true, false, STOCHASTIC>;
    return rows.codes ? &Quantizer::tile<true, true, STOCHASTIC> : &Quantizer::tile<false, true, STOCHASTIC>;
  }

  void run(int threads) const {
    const auto tile = rows.stochastic || columns.stochastic ? tiles<true>() : tiles<false>();
#pragma omp parallel num_threads(threads)
    {
      // As many parts as threads, whether or not that many came
#pragma omp for schedule(static, 1)
      for (int t = 0; t < threads; t++) measure(R * t / threads, R * (t + 1) / threads, column_bits + t * C);
#pragma omp single
      finish_scales(threads);
#pragma omp for schedule(static) nowait
      for (long r = 0; r < R; r += TILE)
        for (long c = 0; c < C; c += TILE) (this->*tile)(r, c);
    }
  }
};

template <class T>
int quantize(const void* x, long R, long C, long stride, const Side& rows, const Side& columns, int64_t seed, int64_t step,
             int64_t row_offset, int threads) {
  static thread_local Scratch scratch;
  float* inverse = (float*)scratch.get((R + C) * sizeof(float) + threads * C * sizeof(int32_t));
  if (inverse == nullptr) return 1;
  Quantizer<T>{(const T*)x, R, C, stride, rows, columns, Key(seed, step, rows.stream), Key(seed, step, columns.stream),
               row_offset, inverse, inverse + R, (int32_t*)(inverse + R + C)}
      .run(threads);
  return 0;
}

}  // namespace
}  // namespace qtrain

// x: R rows of C elements, contiguous each, `stride` elements apart. 0, or 1 where there is no memory.
extern "C" int qtrain_quantize_int8(const void* x, int is_bf16, long R, long C, long stride, const qtrain::Side* rows,
                                    const qtrain::Side* columns, int64_t seed, int64_t step, int64_t row_offset, int threads) {
  auto run = is_bf16 ? qtrain::quantize<qtrain::bf16> : qtrain::quantize<float>;
  return run(x, R, C, stride, *rows, *columns, seed, step, row_offset, threads);
}
