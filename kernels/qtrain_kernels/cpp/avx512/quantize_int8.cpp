// x [R, C] -> int8 codes and scales along its rows and along its columns; quantize_rows_columns.py has the equations.
//
// Two passes over x: the largest magnitudes of rows and columns, then the codes. The second works on 64 x 64 tiles, so
// that both copies are written in whole cache lines: rows as they are, columns after a transposition in registers. Rows
// alone, with a scale each, need one pass: a row is still in L1 when its scale is known. Magnitudes are compared as the integers of their
// bits, where NaN > infinity > every number: none is lost.

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace qtrain {
namespace {

inline __m512i magnitude(__m512 v) { return _mm512_castps_si512(_mm512_abs_ps(v)); }

// v -> codes as the low bytes of 32-bit integers, other bits zero. NaN converts to 0x80000000, whose low byte is 0.
inline __m512i low_byte(__m512i codes) { return _mm512_and_si512(codes, _mm512_set1_epi32(255)); }
inline __m512i codes_of(__m512 v) { return low_byte(_mm512_cvtps_epi32(v)); }

inline __m512i codes_of(__m512 v, __m512 u, __m512i qmax) {
  __m512 floor = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __mmask16 up = _mm512_cmp_ps_mask(u, _mm512_sub_ps(v, floor), _CMP_LT_OQ);
  __m512i code = _mm512_cvtps_epi32(floor);
  return low_byte(_mm512_min_epi32(_mm512_mask_add_epi32(code, up, code, _mm512_set1_epi32(1)), qmax));
}

// Four vectors of bytes in 32-bit integers -> 64 bytes in order.
inline __m512i packed(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d)));
}

// 64 columns from `c` on: which there are, and what a side multiplies them by.
struct Group {
  __mmask16 lanes[4];
  __mmask64 all;
  __m512 fold[4];
  Group(long c, long C, const float* folds) : all(lanes64(C - c)) {
    for (int g = 0; g < 4; g++) {
      lanes[g] = lanes16(C - c - 16 * g);
      fold[g] = folds ? load(folds + c + 16 * g, lanes[g]) : _mm512_set1_ps(1.0f);  // a factor of one changes nothing
    }
  }
};

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
      const __m512 fold = _mm512_set1_ps(columns.fold ? columns.fold[r] : 1.0f);
      const T* row = x + r * stride;
      auto some = [&](long c, __mmask16 lanes) {
        const __m512 v = load(row + c, lanes);
        if (rows.codes) largest = _mm512_max_epi32(largest, magnitude(rows.fold ? _mm512_mul_ps(v, load(rows.fold + c, lanes)) : v));
        if (columns.codes) {
          const __m512i seen = _mm512_maskz_loadu_epi32(lanes, bits + c);
          _mm512_mask_storeu_epi32(bits + c, lanes, _mm512_max_epi32(seen, magnitude(_mm512_mul_ps(v, fold))));
        }
      };
      long c = 0;
      for (; c + 16 <= C; c += 16) some(c, 0xFFFF);
      if (c < C) some(c, lanes16(C - c));
      if (rows.codes) {
        int32_t most = _mm512_reduce_max_epi32(largest);
        std::memcpy(&rows.scale[r], &most, 4);
      }
    }
  }

  // The codes of 64 columns of row r, which are v, along the row.
  template <bool STOCHASTIC>
  [[gnu::always_inline]] static __m512i along_row(const __m512 v[4], const Group& group, __m512 inverse, RowKeys keys, long c, __m512i top) {
    __m512i codes[4];
    each<4>([&](auto g) {
      const __m512 y = _mm512_mul_ps(_mm512_mul_ps(v[g], group.fold[g]), inverse);
      codes[g] = STOCHASTIC ? codes_of(y, uniform16(keys, c + 16 * g), top) : codes_of(y);
    });
    return packed(codes[0], codes[1], codes[2], codes[3]);
  }

  // The codes of rows [r, r + 64) and columns [c, c + 64). WHOLE: there are as many.
  template <bool ROWS, bool COLUMNS, bool ROW_NOISE, bool COLUMN_NOISE, bool WHOLE>
  void tile(long r, long c) const {
    alignas(64) __m512i words[4][16];  // [16 columns each][4 rows each]: words of four rows' codes a column
    const Group row_group(c, C, ROWS ? rows.fold : nullptr);
    const Group column_group(c, C, COLUMNS ? column_inverse : nullptr);
    const __m512i row_top = _mm512_set1_epi32(rows.qmax), column_top = _mm512_set1_epi32(columns.qmax);
    // Copied out of *this: codes are stored as bytes, after which a compiler has to read members again
    const Key row_key = this->row_key, column_key = this->column_key;
    const long C = this->C, stride = this->stride, offset = row_offset, last = WHOLE ? TILE : std::min(TILE, R - r);
    const T* const from = x + r * stride + c;
    const float *const inverse = row_inverse + r, *const fold = COLUMNS && columns.fold ? columns.fold + r : nullptr;
    int8_t* const row_codes = rows.codes + r * C + c;
    for (int quad = 0; quad < 16; quad++) {
      __m512i word[4];
      each<4>([&](auto g) { word[g] = _mm512_setzero_si512(); });
      each<4>([&](auto j) {
        const long i = 4 * quad + j;
        if (!WHOLE && i >= last) return;
        __m512 v[4];
        each<4>([&](auto g) { v[g] = load(from + i * stride + 16 * g, WHOLE ? (__mmask16)0xFFFF : row_group.lanes[g]); });
        if (ROWS) {
          const RowKeys keys = ROW_NOISE ? row_key.row(offset + r + i) : RowKeys{};
          const __m512i codes = along_row<ROW_NOISE>(v, row_group, _mm512_set1_ps(inverse[i]), keys, c, row_top);
          _mm512_mask_storeu_epi8(row_codes + i * C, WHOLE ? ~(__mmask64)0 : row_group.all, codes);
        }
        if (COLUMNS) {
          const RowKeys keys = COLUMN_NOISE ? column_key.row(offset + r + i) : RowKeys{};
          const __m512 factor = _mm512_set1_ps(fold ? fold[i] : 1.0f);
          each<4>([&](auto g) {
            const __m512 y = _mm512_mul_ps(_mm512_mul_ps(v[g], factor), column_group.fold[g]);
            const __m512i codes = COLUMN_NOISE ? codes_of(y, uniform16(keys, c + 16 * g), column_top) : codes_of(y);
            word[g] = _mm512_or_si512(word[g], _mm512_slli_epi32(codes, 8 * j));
          });
        }
      });
      if (COLUMNS) each<4>([&](auto g) { words[g][quad] = word[g]; });
    }
    if (!COLUMNS) return;
    for (long g = 0; g < 4; g++) {
      transpose16(words[g]);
      int8_t* column = columns.codes + (c + 16 * g) * R + r;
      for (long i = 0; i < 16 && (WHOLE || c + 16 * g + i < C); i++)
        _mm512_mask_storeu_epi8(column + i * R, WHOLE ? ~(__mmask64)0 : lanes64(last), words[g][i]);
    }
  }

  template <bool ROWS, bool COLUMNS, bool ROW_NOISE, bool COLUMN_NOISE>
  void tile_or_edge(long r, long c) const {
    if (R - r >= TILE && C - c >= TILE)
      tile<ROWS, COLUMNS, ROW_NOISE, COLUMN_NOISE, true>(r, c);
    else
      tile<ROWS, COLUMNS, ROW_NOISE, COLUMN_NOISE, false>(r, c);
  }

  auto tiles() const {
    const bool row_noise = rows.stochastic, column_noise = columns.stochastic;
    if (!columns.codes) return row_noise ? &Quantizer::tile_or_edge<true, false, true, false> : &Quantizer::tile_or_edge<true, false, false, false>;
    if (!rows.codes) return column_noise ? &Quantizer::tile_or_edge<false, true, false, true> : &Quantizer::tile_or_edge<false, true, false, false>;
    if (row_noise) return column_noise ? &Quantizer::tile_or_edge<true, true, true, true> : &Quantizer::tile_or_edge<true, true, true, false>;
    return column_noise ? &Quantizer::tile_or_edge<true, true, false, true> : &Quantizer::tile_or_edge<true, true, false, false>;
  }

  // Rows [from, to), each measured and then coded.
  template <bool STOCHASTIC>
  void rows_alone(long from, long to) const {
    const __m512i top = _mm512_set1_epi32(rows.qmax);
    for (long r = from; r < to; r++) {
      measure(r, r + 1, nullptr);
      int32_t bits;
      std::memcpy(&bits, &rows.scale[r], 4);
      rows.scale[r] = scale_of(bits, rows.qmax);
      const __m512 inverse = _mm512_set1_ps(1.0f / rows.scale[r]);
      const RowKeys keys = STOCHASTIC ? row_key.row(row_offset + r) : RowKeys{};
      for (long c = 0; c < C; c += TILE) {
        const Group group(c, C, rows.fold);
        __m512 v[4];
        each<4>([&](auto g) { v[g] = load(x + r * stride + c + 16 * g, group.lanes[g]); });
        _mm512_mask_storeu_epi8(rows.codes + r * C + c, group.all, along_row<STOCHASTIC>(v, group, inverse, keys, c, top));
      }
    }
  }

  void run(int threads) const {
    if (rows.codes && !columns.codes && !rows.per_tensor) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
      for (int t = 0; t < threads; t++) {
        const auto code = rows.stochastic ? &Quantizer::rows_alone<true> : &Quantizer::rows_alone<false>;
        (this->*code)(R * t / threads, R * (t + 1) / threads);
      }
      return;
    }
    quantize_in_two_passes(
        R, C, rows, columns, row_inverse, column_inverse, column_bits, threads,
        [this](long from, long to, int32_t* bits) { measure(from, to, bits); },
        [this, tile = tiles()](long r, long c) { (this->*tile)(r, c); });
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
