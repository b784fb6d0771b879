// The GEMM of int8_scaled_mm.cpp by vpdpbusd, which multiplies unsigned by signed bytes: panels hold code + 128, and
// 128 * (sum of a's row) is taken off. It does not saturate; int32 sums wrap, and the difference is exact where the true
// sum fits (K < 2^17).
//
// A thread takes a chunk of rows that stays in its L2 and goes through all panels, a part of K at a time, so that the
// part of a panel stays in L1 for all rows.
#pragma once

#include "panels.h"

namespace qtrain {
namespace {
namespace vnni {

constexpr int FLIP = 0x80;
constexpr long ROWS = 8, PANELS = 3;   // 24 of 32 registers hold sums
constexpr long PART = 256;             // of K, of three panels: 12 kB of L1
constexpr long CHUNK_BYTES = 256 << 10;  // of rows of a, beside the panels that pass by

// A copy of rows of a: whole blocks of rows and whole lines of K, zeros where there is nothing; rows whose distance is a
// multiple of 4096 bytes would fight for one set of L1.
struct Chunk {
  int8_t* rows;
  int32_t* row_sums;  // 128 * sum of each row
  int32_t* sums;      // [rows][16 * PANELS], between one part of K and the next
  long stride, first, count;

  static long bytes(const Operands& o, long rows) { return rows * (o.width() + LINE + 4 + 4 * 16 * PANELS) + LINE; }

  Chunk(const Operands& o, long first, long count, uint8_t* memory) : stride(o.width() + LINE), first(first), count(count) {
    const long whole = round_up(count, ROWS);
    rows = (int8_t*)memory;
    sums = (int32_t*)(memory + whole * stride);
    row_sums = sums + whole * 16 * PANELS;
    for (long i = 0; i < whole; i++) {
      int8_t* row = rows + i * stride;
      const long codes = i < count ? o.K : 0;
      if (codes) std::memcpy(row, o.a + (first + i) * o.a_stride, codes);
      std::memset(row + codes, 0, o.width() - codes);
      __m512i sum = _mm512_setzero_si512();
      for (long k = 0; k < o.width(); k += LINE) sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_load_si512(row + k));
      row_sums[i] = (int32_t)(128u * (uint32_t)_mm512_reduce_add_epi32(sum));
    }
  }
};

template <class Out>
[[gnu::always_inline]] inline void write(const Operands& o, const Chunk& c, long row, const Columns& columns, long n, __m512i sums, Out* y) {
  if (row >= c.count) return;
  const __m512i exact = _mm512_sub_epi32(sums, _mm512_set1_epi32(c.row_sums[row]));
  store(y + (c.first + row) * o.N + n, columns.lanes, columns.finish(exact, o.a_scale[c.first + row]));
}

// Not the intrinsic, for which GCC 12 copies sums from register to register
[[gnu::always_inline]] inline __m512i add_products(__m512i sums, __m512i b, __m512i a) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(b), "v"(a));
  return sums;
}

[[gnu::always_inline]] inline __m512i broadcast_four(const int8_t* codes) {
  int32_t word;
  std::memcpy(&word, codes, 4);
  return _mm512_set1_epi32(word);
}

// Each sum of a block has a name, s<row><panel>: an array of them, or one reference to it, and GCC 12 writes all of them to
// memory in every step, which takes longer than the products.
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define LOAD(r)                                                                            \
  __m512i s##r##0 = from ? _mm512_load_si512(kept + r * width) : zero;                     \
  __m512i s##r##1 = from && NV > 1 ? _mm512_load_si512(kept + r * width + 16) : zero;      \
  __m512i s##r##2 = from && NV > 2 ? _mm512_load_si512(kept + r * width + 32) : zero;
#define ADD(r)                                                    \
  {                                                               \
    const __m512i four = broadcast_four(a + r * stride + k);      \
    s##r##0 = add_products(s##r##0, b0, four);                    \
    if constexpr (NV > 1) s##r##1 = add_products(s##r##1, b1, four); \
    if constexpr (NV > 2) s##r##2 = add_products(s##r##2, b2, four); \
  }
#define KEEP(r)                                                            \
  _mm512_store_si512(kept + r * width, s##r##0);                           \
  if constexpr (NV > 1) _mm512_store_si512(kept + r * width + 16, s##r##1); \
  if constexpr (NV > 2) _mm512_store_si512(kept + r * width + 32, s##r##2);
#define WRITE(r)                                                                      \
  write(o, c, i + r, columns[0], n, s##r##0, y);                                      \
  if constexpr (NV > 1) write(o, c, i + r, columns[1], n + 16, s##r##1, y);           \
  if constexpr (NV > 2) write(o, c, i + r, columns[2], n + 32, s##r##2, y);

// Rows [i, i + 8) of the chunk by NV panels from column n on, over K from `from` to `to`.
template <int NV, class Out>
void block(const Operands& o, const Chunk& c, const uint8_t* panel, const Columns* columns, long i, long n, long from, long to, Out* y) {
  const long next = o.panel_bytes(), width = 16 * PANELS, stride = c.stride;
  const int8_t* a = c.rows + i * stride;
  int32_t* kept = c.sums + i * width;
  const __m512i zero = _mm512_setzero_si512();
  EACH_ROW(LOAD)
  for (long k = from; k < to; k += 4) {
    const __m512i b0 = _mm512_load_si512(panel + k * 16);
    const __m512i b1 = NV > 1 ? _mm512_load_si512(panel + next + k * 16) : zero;
    const __m512i b2 = NV > 2 ? _mm512_load_si512(panel + 2 * next + k * 16) : zero;
    EACH_ROW(ADD)
  }
  if (to < o.width()) {
    EACH_ROW(KEEP)
  } else {
    EACH_ROW(WRITE)
  }
}
#undef EACH_ROW
#undef LOAD
#undef ADD
#undef KEEP
#undef WRITE

template <class Out>
void group(const Operands& o, const Chunk& c, const uint8_t* panel, long panels, long n, long from, long to, Out* y) {
  auto run = panels >= 3 ? block<3, Out> : panels == 2 ? block<2, Out> : block<1, Out>;
  const Columns columns[3] = {Columns(o, n), Columns(o, n + 16), Columns(o, n + 32)};
  for (long i = 0; i < c.count; i += ROWS) run(o, c, panel, columns, i, n, from, to, y);
}

}  // namespace vnni

// 0, or 1 where there is no memory.
template <class Out>
int multiply_vnni(const Operands& o, Out* y, int threads) {
  using namespace vnni;
  const long panels = o.panels(), bytes = o.panel_bytes(), width = o.width();
  const long rows = rows_at_a_time(o.M, ROWS, CHUNK_BYTES / width, threads);
  return multiply_pieces((o.M + rows - 1) / rows, panels * bytes, Chunk::bytes(o, rows), threads, [&](uint8_t* packed) { pack(o, packed, FLIP); },
                         [&](long piece, const uint8_t* packed, uint8_t* own) {
    const Chunk chunk(o, piece * rows, std::min(rows, o.M - piece * rows), own);
    for (long p = 0; p < panels; p += PANELS)
      for (long k = 0; k < width; k += PART)
        group(o, chunk, packed + p * bytes, panels - p, 16 * p, k, std::min(k + PART, width), y);
  });
}

}  // namespace
}  // namespace qtrain
