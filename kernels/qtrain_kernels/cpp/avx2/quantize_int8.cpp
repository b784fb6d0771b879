// x [R, C] -> int8 codes and scales along its rows and along its columns; quantize_rows_columns.py has the equations.
//
// As the AVX-512 kernel does it, in two passes and 64 x 64 tiles, but in loops that the compiler turns into vectors of
// whatever width it is told: 8 floats here. Without masks the edges of a tile are loops of another length.

#include <immintrin.h>

#include <algorithm>

#include "../shared.h"

namespace qtrain {
namespace {

inline float value(float x) { return x; }
inline float value(bf16 x) {
  uint32_t bits = (uint32_t)x << 16;
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline int32_t bits_of(float v) {
  int32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline int32_t magnitude(float v) { return bits_of(v) & 0x7FFFFFFF; }

// Added to a number below 2^22, it leaves the nearest integer, ties to even, in the low bits of the sum.
constexpr float ROUNDS = 0x1.8p23f;

inline float zero_for_nan(float v) { return v == v ? v : 0.0f; }
inline int8_t nearest(float v) { return (int8_t)bits_of(zero_for_nan(v) + ROUNDS); }

inline int8_t stochastic(float v, float u, int32_t qmax) {
  v = zero_for_nan(v);
  float floor = (v + ROUNDS) - ROUNDS;
  floor = floor > v ? floor - 1.0f : floor;
  return (int8_t)std::min((int32_t)floor + (u < v - floor ? 1 : 0), qmax);
}

inline float uniform(RowKeys row, uint32_t column) {
  uint32_t x = column * GOLDEN ^ row.r0;
  x ^= x >> 16;
  x = x * MULTIPLIER_1 + row.r1;
  x ^= x >> 15;
  x *= MULTIPLIER_2;
  x ^= x >> 16;
  return (float)(int32_t)(x >> 8) * 0x1p-24f;
}

// 16 rows of 16 bytes, `stride` apart, become columns: the perfect shuffle, four times.
inline void transpose16(const int8_t* from, __m128i to[16]) {
  __m128i other[16];
  for (int i = 0; i < 16; i++) to[i] = _mm_load_si128((const __m128i*)(from + i * TILE));
  __m128i *a = to, *b = other;
  for (int round = 0; round < 4; round++, std::swap(a, b))
    for (int i = 0; i < 8; i++) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
}

template <class T>
struct Quantizer {
  const T* x;
  long R, C, stride;
  Side rows, columns;
  Key row_key, column_key;
  int64_t row_offset;
  const float* row_fold;                // [C], ones where there is none: they change nothing
  float *row_inverse, *column_inverse;  // 1 / scale
  int32_t* column_bits;                 // [threads][C]: largest magnitudes, as bits

  // Largest magnitudes of rows [from, to): of rows into rows.scale (bits), of columns into `seen`.
  template <bool ROWS, bool COLUMNS>
  void measure(long from, long to, int32_t* seen) const {
    const long C = this->C;
    const float* const row_fold = this->row_fold;
    if (COLUMNS) std::fill(seen, seen + C, 0);
    for (long r = from; r < to; r++) {
      const T* const row = x + r * stride;
      const float fold = columns.fold ? columns.fold[r] : 1.0f;
      int32_t largest = 0;
      for (long c = 0; c < C; c++) {
        const float v = value(row[c]);
        if (ROWS) largest = std::max(largest, magnitude(v * row_fold[c]));
        if (COLUMNS) seen[c] = std::max(seen[c], magnitude(v * fold));
      }
      if (ROWS) std::memcpy(&rows.scale[r], &largest, 4);
    }
  }

  // Codes of n values, v * fold[i] * scale[i] each.
  template <bool NOISE, class Fold, class Scale>
  static void codes(const T* x, long n, Fold fold, Scale scale, int32_t qmax, RowKeys keys, long column,
                    int8_t* __restrict to) {
    for (long i = 0; i < n; i++) {
      const float v = value(x[i]) * fold(i) * scale(i);
      to[i] = NOISE ? stochastic(v, uniform(keys, (uint32_t)(column + i)), qmax) : nearest(v);
    }
  }

  template <bool ROW_NOISE, bool COLUMN_NOISE>
  void tile(long r, long c) const {
    alignas(64) int8_t turned[TILE * TILE] = {};
    const long last = std::min(TILE, R - r), n = std::min(TILE, C - c);
    const float *row_fold = this->row_fold + c, *column_scale = column_inverse + c;
    for (long i = 0; i < last; i++) {
      const T* const from = x + (r + i) * stride + c;
      const int64_t place = row_offset + r + i;
      if (rows.codes) {
        const float scale = row_inverse[r + i];
        codes<ROW_NOISE>(from, n, [=](long j) { return row_fold[j]; }, [=](long) { return scale; }, rows.qmax, row_key.row(place), c,
                         rows.codes + (r + i) * C + c);
      }
      if (columns.codes) {
        const float fold = columns.fold ? columns.fold[r + i] : 1.0f;
        codes<COLUMN_NOISE>(from, n, [=](long) { return fold; }, [=](long j) { return column_scale[j]; }, columns.qmax,
                            column_key.row(place), c, turned + i * TILE);
      }
    }
    if (!columns.codes) return;
    for (long i = 0; i < last; i += 16)
      for (long j = 0; j < n; j += 16) {
        __m128i lines[16];
        transpose16(turned + i * TILE + j, lines);
        for (long k = 0; k < 16 && j + k < n; k++)
          std::memcpy(columns.codes + (c + j + k) * R + r + i, &lines[k], std::min(16L, last - i));
      }
  }

  auto tiles() const {
    if (rows.codes && rows.stochastic)
      return columns.stochastic ? &Quantizer::tile<true, true> : &Quantizer::tile<true, false>;
    return columns.stochastic ? &Quantizer::tile<false, true> : &Quantizer::tile<false, false>;
  }

  auto measures() const {
    if (!columns.codes) return rows.codes ? &Quantizer::measure<true, false> : &Quantizer::measure<false, false>;
    return rows.codes ? &Quantizer::measure<true, true> : &Quantizer::measure<false, true>;
  }

  void run(int threads) const {
    quantize_in_two_passes(
        R, C, rows, columns, row_inverse, column_inverse, column_bits, threads,
        [this, measure = measures()](long from, long to, int32_t* bits) { (this->*measure)(from, to, bits); },
        [this, tile = tiles()](long r, long c) { (this->*tile)(r, c); });
  }
};

template <class T>
int quantize(const void* x, long R, long C, long stride, const Side& rows, const Side& columns, int64_t seed, int64_t step,
             int64_t row_offset, int threads) {
  static thread_local Scratch scratch;
  float* inverse = (float*)scratch.get((R + 2 * C) * sizeof(float) + threads * C * sizeof(int32_t));
  if (inverse == nullptr) return 1;
  float* ones = inverse + R + C;
  std::fill(ones, ones + C, 1.0f);
  Quantizer<T>{(const T*)x, R, C, stride, rows, columns, Key(seed, step, rows.stream), Key(seed, step, columns.stream),
               row_offset, rows.fold ? rows.fold : ones, inverse, inverse + R, (int32_t*)(ones + C)}
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
