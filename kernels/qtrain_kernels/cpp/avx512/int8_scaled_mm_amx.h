// The GEMM of int8_scaled_mm.cpp on AMX tiles, which multiply signed bytes: 16 x 64 of a by a panel's 64 x 16.
//
// Four tiles hold sums of 32 rows and two panels. Both operands then pass from L2 to L1 at half of what the tiles could
// take, so one of them has to lie in L1: where K is short, the 32 rows, while panels stay in L2 and pass by; where it is
// long, a part of two panels, while as many rows as L2 holds pass by. Sums are scaled, rounded and written some rows at
// a time between the products of the next block: the tiles work on their own meanwhile.
#pragma once

#include "panels.h"

namespace qtrain {
namespace {

constexpr long BLOCK = 32;              // rows and columns
constexpr long TILE_SUMS = 16 * 16;     // of a tile, contiguous; a block has four: upper left, upper right, lower left, lower right
constexpr long SHORT_K = 1024;          // 32 rows of it fill L1 by two thirds
constexpr long PART_K = 512;            // of two panels: 16 kB of L1
constexpr long RESIDENT = 3 << 18;      // bytes of what stays in L2, of which every CPU with AMX has 2 MB, for two threads

inline void configure_tiles() {
  alignas(64) static const uint8_t config[64] = {
      1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  // palette 1
      64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 64, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,  // bytes a row
      16, 16, 16, 16, 16, 16, 16, 16};                                                                         // rows
  _tile_loadconfig(config);
}

// A block whose sums are known and whose values are yet to be written.
template <class Out>
class Unwritten {
 public:
  Unwritten(const Operands& o, Out* y) : o_(o), y_(y), left_(o, 0), right_(o, 0) {}

  // Rows [m, m + rows) and columns [n, n + 32) of y, whose sums stay where they are until all rows are written.
  void set(const int32_t* sums, long m, long n, long rows) {
    sums_ = sums, m_ = m, n_ = n, row_ = 0, rows_ = rows;
    left_ = Columns(o_, n), right_ = Columns(o_, n + 16);
  }

  [[gnu::always_inline]] void write(long rows) {
    for (const long stop = std::min(rows_, row_ + rows); row_ < stop; row_++) {
      const int32_t* sums = sums_ + row_ / 16 * 2 * TILE_SUMS + row_ % 16 * 16;
      const float a_scale = o_.a_scale[m_ + row_];
      const __m512 left = left_.finish(_mm512_load_si512(sums), a_scale);
      const __m512 right = right_.finish(_mm512_load_si512(sums + TILE_SUMS), a_scale);
      Out* y = y_ + (m_ + row_) * o_.N + n_;
      if (right_.lanes == 0xFFFF) {
        store_amx(y, left, right);
      } else {
        store_amx(y, left_.lanes, left);
        store_amx(y + 16, right_.lanes, right);
      }
    }
  }
  void write_rest() { write(BLOCK); }

 private:
  const Operands& o_;
  Out* y_;
  const int32_t* sums_ = nullptr;
  long m_ = 0, n_ = 0, row_ = 0, rows_ = 0;
  Columns left_, right_;
};

// Rows [first, first + rows) of a, in blocks of [K / 64][32][64] bytes, with zeros where there is nothing.
inline void copy_rows(const Operands& o, long first, long rows, int8_t* blocks) {
  const long width = o.width();
  for (long m = 0; m < rows; m += BLOCK)
    for (long from = 0; from < width; from += PART_K)
      for (long i = 0; i < BLOCK; i++)
        for (long k = from; k < std::min(width, from + PART_K); k += LINE) {
          const __mmask64 lanes = m + i < rows ? lanes64(o.K - k) : 0;
          const __m512i codes = _mm512_maskz_loadu_epi8(lanes, o.a + (first + m + i) * o.a_stride + k);
          _mm512_store_si512(blocks + m * width + k * BLOCK + i * LINE, codes);
        }
  asm volatile("" ::: "memory");  // GCC's _tile_loadd does not say that it reads memory
}

// sums (+)= a block of rows times two panels, over K from `from` to `to`.
template <class Out>
[[gnu::always_inline]] inline void multiply_block(const int8_t* rows, const uint8_t* panel, const uint8_t* second, long from, long to,
                                                  int32_t* sums, Unwritten<Out>& unwritten) {
  const long pace = (BLOCK * LINE + to - from - 1) / (to - from);  // all of them by the end
  if (from) {
    _tile_loadd(0, sums, LINE);
    _tile_loadd(1, sums + TILE_SUMS, LINE);
    _tile_loadd(2, sums + 2 * TILE_SUMS, LINE);
    _tile_loadd(3, sums + 3 * TILE_SUMS, LINE);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long k = from; k < to; k += LINE) {
    _tile_loadd(6, panel + k * 16, LINE);
    _tile_loadd(4, rows + k * BLOCK, LINE);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, second + k * 16, LINE);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, rows + k * BLOCK + 16 * LINE, LINE);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    unwritten.write(pace);
  }
  _tile_stored(0, sums, LINE);
  _tile_stored(1, sums + TILE_SUMS, LINE);
  _tile_stored(2, sums + 2 * TILE_SUMS, LINE);
  _tile_stored(3, sums + 3 * TILE_SUMS, LINE);
}

// Asks for the lines of y that a block will write, whose rows lie far from each other.
template <class Out>
inline void claim(const Operands& o, const Out* y, long m, long n, long rows) {
  for (long row = m; row < m + rows; row++)
    for (long column = n; column < n + BLOCK; column += LINE / (long)sizeof(Out)) __builtin_prefetch(y + row * o.N + column, 1);
}

// Two panels always: where there is one only, its sums are computed twice and written once.
struct Panels {
  const uint8_t *first, *second;
  Panels(const Operands& o, const uint8_t* packed, long p)
      : first(packed + p * o.panel_bytes()), second(first + (p + 1 < o.panels() ? o.panel_bytes() : 0)) {}
};

// y of rows [m0, m1) and panels [p0, p1), which stay in L2.
template <class Out>
void multiply_short(const Operands& o, Out* y, const uint8_t* packed, long m0, long m1, long p0, long p1, int8_t* rows, int32_t* sums) {
  Unwritten<Out> unwritten(o, y);
  long turn = 0;
  for (long m = m0; m < m1; m += BLOCK) {
    copy_rows(o, m, std::min(BLOCK, m1 - m), rows);
    for (long p = p0; p < p1; p += 2, turn ^= 1) {
      const Panels panels(o, packed, p);
      int32_t* mine = sums + turn * 4 * TILE_SUMS;  // the other's are being written
      multiply_block(rows, panels.first, panels.second, 0, o.width(), mine, unwritten);
      unwritten.write_rest();
      unwritten.set(mine, m, 16 * p, std::min(BLOCK, m1 - m));
    }
  }
  unwritten.write_rest();
}

// y of rows [m0, m1), which stay in L2, and all panels.
template <class Out>
void multiply_long(const Operands& o, Out* y, const uint8_t* packed, long m0, long m1, int8_t* rows, int32_t* sums) {
  Unwritten<Out> unwritten(o, y);
  copy_rows(o, m0, m1 - m0, rows);
  for (long p = 0; p < o.panels(); p += 2) {
    const Panels panels(o, packed, p);
    for (long from = 0; from < o.width(); from += PART_K) {
      const long to = std::min(o.width(), from + PART_K);
      for (long m = m0; m < m1; m += BLOCK) {
        int32_t* mine = sums + (m - m0) / BLOCK * 4 * TILE_SUMS;
        const bool last = to == o.width();
        if (last) claim(o, y, m, 16 * p, std::min(BLOCK, m1 - m));
        multiply_block(rows + (m - m0) * o.width(), panels.first, panels.second, from, to, mine, unwritten);
        unwritten.write_rest();
        if (last) unwritten.set(mine, m, 16 * p, std::min(BLOCK, m1 - m));
      }
    }
    unwritten.write_rest();  // before its sums are those of other panels
  }
}

// 0, or 1 where there is no memory.
template <class Out>
int multiply_amx(const Operands& o, Out* y, int threads) {
  const long width = o.width(), panels = o.panels();
  const bool is_short = width <= SHORT_K;
  const long kept_panels = is_short ? std::max(2L, RESIDENT / (16 * width) / 2 * 2) : panels;
  // Each thread has the same number of pieces, or nearly, where M is large enough
  const long share = (o.M + threads - 1) / threads, most = is_short ? 8 * BLOCK : std::max(BLOCK, RESIDENT / width);
  const long pieces = (share + most - 1) / most, rows = round_up((share + pieces - 1) / pieces, BLOCK);
  const long kept_rows = is_short ? BLOCK : rows, kept_sums = (is_short ? 2 : rows / BLOCK) * 4 * TILE_SUMS;
  const long row_pieces = (o.M + rows - 1) / rows, panel_pieces = (panels + kept_panels - 1) / kept_panels;
  return multiply_pieces(
      row_pieces * panel_pieces, panels * o.panel_bytes(), kept_rows * width + kept_sums * sizeof(int32_t), threads,
      [&](uint8_t* packed) { pack(o, packed, 0); },
      [&](long piece, const uint8_t* packed, uint8_t* own) {
        const long m0 = piece % row_pieces * rows, m1 = std::min(o.M, m0 + rows);
        const long p0 = piece / row_pieces * kept_panels, p1 = std::min(panels, p0 + kept_panels);
        int32_t* sums = (int32_t*)(own + kept_rows * width);
        configure_tiles();
        if (is_short)
          multiply_short(o, y, packed, m0, m1, p0, p1, (int8_t*)own, sums);
        else
          multiply_long(o, y, packed, m0, m1, (int8_t*)own, sums);
        _tile_release();
      });
}

}  // namespace
}  // namespace qtrain
