// y [M, N] = (a [M, K] . b [N, K]^T) * a_scale * b_scale^T + bias: int8 codes, sums in int32, one rounding at the end.
//
// b is packed once into panels of 16 columns, [K / 4][16][4] bytes each, where one 64-byte line is what `vpdpbusd`
// and a row of an AMX tile both want: four neighbours of K for each of 16 columns. a is read where it lies. A thread
// takes a chunk of rows that stays in its L2 and goes through all panels, a part of K at a time, so that the part of
// a panel stays in L1 for all rows; sums live in registers, and y is written once, scaled and rounded.
//
// vpdpbusd multiplies unsigned by signed bytes: panels then hold code + 128, and 128 * (sum of a's row) is taken off.
// It does not saturate; int32 sums wrap, and the difference is exact where the true sum fits (K < 2^17). AMX multiplies
// signed bytes.

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "simd.h"

namespace qtrain {
namespace {

constexpr long LINE = 64;            // bytes; of K, a step of AMX
constexpr long L2_BYTES = 256 << 10;  // of rows of a, beside the panel that passes by

struct Operands {
  const int8_t *a, *b;
  long a_stride, b_stride;  // between rows of a; of b, between rows [N] where b_k_major, else between rows [K]
  bool b_k_major;
  const float *a_scale, *b_scale, *bias;  // scales [M], [N]; bias [N] or null
  long M, N, K;
};

inline long padded(long K) { return round_up(std::max(K, 1L), LINE); }
// A panel and one line, so that panels do not all begin in the same set of a cache.
inline long panel_bytes(long K) { return padded(K) * 16 + LINE; }

// Columns [16 p, 16 p + 16) of b; `flip` is 0x80 where panels hold code + 128.
void pack_panel(const Operands& o, long p, uint8_t* panel, int flip) {
  const __m512i flips = _mm512_set1_epi8((char)flip);
  long columns = std::min(16L, o.N - 16 * p);
  for (long k = 0; k < padded(o.K); k += LINE) {
    __m512i words[16];
    if (o.b_k_major) {
      for (long j = 0; j < 16; j++)
        words[j] = j < columns ? _mm512_maskz_loadu_epi8(lanes64(o.K - k), o.b + (16 * p + j) * o.b_stride + k) : _mm512_setzero_si512();
      transpose16(words);
    } else {
      for (long i = 0; i < 16; i++) {
        __m128i row[4];
        for (long j = 0; j < 4; j++) {
          long at = k + 4 * i + j;
          row[j] = at < o.K ? _mm_maskz_loadu_epi8(lanes16(columns), o.b + at * o.b_stride + 16 * p) : _mm_setzero_si128();
        }
        __m128i low = _mm_unpacklo_epi8(row[0], row[1]), low2 = _mm_unpacklo_epi8(row[2], row[3]);
        __m128i high = _mm_unpackhi_epi8(row[0], row[1]), high2 = _mm_unpackhi_epi8(row[2], row[3]);
        __m256i first = _mm256_set_m128i(_mm_unpackhi_epi16(low, low2), _mm_unpacklo_epi16(low, low2));
        __m256i second = _mm256_set_m128i(_mm_unpackhi_epi16(high, high2), _mm_unpacklo_epi16(high, high2));
        words[i] = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
      }
    }
    for (long i = 0; i < 16; i++) _mm512_store_si512(panel + (k / 4 + i) * LINE, _mm512_xor_si512(words[i], flips));
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

// A chunk of a as a kernel reads it: whole blocks of rows and whole lines of K, zeros where there is nothing. A copy,
// since rows whose distance is a multiple of 4096 bytes would fight for one set of L1.
struct Chunk {
  int8_t* rows;
  int32_t* row_sums;  // 128 * sum of each row
  int32_t* sums;      // [rows][16 * panels of a group], between one part of K and the next
  long stride, first, count;
};

template <class Kernel>
long chunk_bytes(long K, long rows) {
  return rows * (padded(K) + LINE + 4 + 4 * 16 * Kernel::PANELS) + LINE;
}

template <class Kernel>
Chunk copy_chunk(const Operands& o, long first, long count, uint8_t* memory) {
  const long width = padded(o.K), stride = width + LINE, whole = round_up(count, Kernel::BLOCK_M);
  int32_t* sums = (int32_t*)(memory + whole * stride);
  Chunk c{(int8_t*)memory, sums + whole * 16 * Kernel::PANELS, sums, stride, first, count};
  for (long i = 0; i < whole; i++) {
    int8_t* row = c.rows + i * stride;
    long bytes = i < count ? o.K : 0;
    if (bytes) std::memcpy(row, o.a + (first + i) * o.a_stride, bytes);
    std::memset(row + bytes, 0, width - bytes);
    if (!Kernel::FLIP) continue;
    __m512i sum = _mm512_setzero_si512();
    for (long k = 0; k < width; k += LINE)
      sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_load_si512(row + k));
    c.row_sums[i] = (int32_t)(128u * (uint32_t)_mm512_reduce_add_epi32(sum));
  }
  return c;
}

struct Vnni {
  static constexpr long BLOCK_M = 8, PANELS = 3, PART_K = 256;  // 24 of 32 registers hold sums
  static constexpr int FLIP = 0x80;

  static void begin() {}
  static void end() {}

  // Rows [i, i + 8) of the chunk by NV panels, over K from `from` to `to`.
  template <int NV, class Out>
  static void block(const Operands& o, const Chunk& c, const uint8_t* panel, long i, long n, long from, long to, Out* y) {
    const long next = panel_bytes(o.K), width = 16 * PANELS;
    const int8_t* a = c.rows + i * c.stride;
    int32_t* kept = c.sums + i * width;
    __m512i sums[BLOCK_M][NV], b[NV];
    each<BLOCK_M>([&](auto r) {
      each<NV>([&](auto j) { sums[r][j] = from ? _mm512_load_si512(kept + r * width + 16 * j) : _mm512_setzero_si512(); });
    });
    for (long k = from; k < to; k += 4) {
      each<NV>([&](auto j) { b[j] = _mm512_load_si512(panel + j * next + k * 16); });
      each<BLOCK_M>([&](auto r) {
        int32_t four;
        std::memcpy(&four, a + r * c.stride + k, 4);
        __m512i broadcast = _mm512_set1_epi32(four);
        // Not the intrinsic, for which GCC 12 copies sums from register to register
        each<NV>([&](auto j) { asm("vpdpbusd %2, %1, %0" : "+v"(sums[r][j]) : "v"(b[j]), "v"(broadcast)); });
      });
    }
    if (to < padded(o.K)) {
      each<BLOCK_M>([&](auto r) { each<NV>([&](auto j) { _mm512_store_si512(kept + r * width + 16 * j, sums[r][j]); }); });
      return;
    }
    each<BLOCK_M>([&](auto r) {
      if (i + r >= c.count) return;
      __m512i flipped = _mm512_set1_epi32(c.row_sums[i + r]);
      each<NV>([&](auto j) {
        Columns columns(o, n + 16 * j);
        __m512 v = columns.finish(_mm512_sub_epi32(sums[r][j], flipped), o.a_scale[c.first + i + r]);
        store(y + (c.first + i + r) * o.N + n + 16 * j, columns.lanes, v);
      });
    });
  }

  template <class Out>
  static void group(const Operands& o, const Chunk& c, const uint8_t* panel, long panels, long n, long from, long to, Out* y) {
    auto run = panels == 3 ? block<3, Out> : panels == 2 ? block<2, Out> : block<1, Out>;
    for (long i = 0; i < c.count; i += BLOCK_M) run(o, c, panel, i, n, from, to, y);
  }
};

struct Amx {
  static constexpr long BLOCK_M = 32, PANELS = 2, PART_K = 512;  // four tiles of sums, two of a, two of b
  static constexpr int FLIP = 0;

  static void begin() {
    alignas(64) uint8_t config[64] = {1};  // palette 1: tiles of up to 16 rows of 64 bytes
    for (int tile = 0; tile < 8; tile++) {
      config[16 + 2 * tile] = LINE;
      config[48 + tile] = 16;
    }
    _tile_loadconfig(config);
  }
  static void end() { _tile_release(); }

  // Two panels always: where there is one only, its sums are computed twice and written once.
  template <class Out>
  static void group(const Operands& o, const Chunk& c, const uint8_t* panel, long panels, long n, long from, long to, Out* y) {
    const uint8_t* second = panel + (panels > 1 ? panel_bytes(o.K) : 0);
    for (long i = 0; i < c.count; i += BLOCK_M) {
      const int8_t *upper = c.rows + i * c.stride, *lower = upper + 16 * c.stride;
      int32_t* sums = c.sums + i * 32;
      if (from) {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + 16 * 32, 128);
        _tile_loadd(3, sums + 16 * 32 + 16, 128);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      for (long k = from; k < to; k += LINE) {
        _tile_loadd(6, panel + k * 16, LINE);
        _tile_loadd(4, upper + k, c.stride);
        _tile_dpbssd(0, 4, 6);
        _tile_loadd(7, second + k * 16, LINE);
        _tile_dpbssd(1, 4, 7);
        _tile_loadd(5, lower + k, c.stride);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
      }
      _tile_stored(0, sums, 128);
      _tile_stored(1, sums + 16, 128);
      _tile_stored(2, sums + 16 * 32, 128);
      _tile_stored(3, sums + 16 * 32 + 16, 128);
      if (to < padded(o.K)) continue;
      const long rows = std::min(BLOCK_M, c.count - i);
      if (o.N - n >= 32) {  // both panels whole
        const Columns left(o, n), right(o, n + 16);
        for (long row = 0; row < rows; row++) {
          const float a_scale = o.a_scale[c.first + i + row];
          store_amx(y + (c.first + i + row) * o.N + n, left.finish(_mm512_load_si512(sums + 32 * row), a_scale),
                    right.finish(_mm512_load_si512(sums + 32 * row + 16), a_scale));
        }
        continue;
      }
      for (long j = 0; j < panels; j++) {
        const Columns columns(o, n + 16 * j);
        for (long row = 0; row < rows; row++) {
          __m512 v = columns.finish(_mm512_load_si512(sums + 32 * row + 16 * j), o.a_scale[c.first + i + row]);
          store_amx(y + (c.first + i + row) * o.N + n + 16 * j, columns.lanes, v);
        }
      }
    }
  }
};

template <class Kernel, class Out>
int multiply(const Operands& o, Out* y, int threads) {
  static thread_local Scratch panels_memory, chunk_memory;
  const long panels = (o.N + 15) / 16, bytes = panel_bytes(o.K), width = padded(o.K);
  uint8_t* packed = (uint8_t*)panels_memory.get(panels * bytes);
  const long share = round_up((o.M + threads - 1) / threads, Kernel::BLOCK_M);  // small M: everybody has some
  const long fitting = std::max(1L, L2_BYTES / width / Kernel::BLOCK_M) * Kernel::BLOCK_M;
  const long rows = std::min(share, fitting);
  if (packed == nullptr) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
  {
#pragma omp for schedule(static)
    for (long p = 0; p < panels; p++) pack_panel(o, p, packed + p * bytes, Kernel::FLIP);
    uint8_t* memory = (uint8_t*)chunk_memory.get(chunk_bytes<Kernel>(o.K, rows));
    failed = memory == nullptr;
    Kernel::begin();
#pragma omp for schedule(dynamic, 1) nowait
    for (long m = 0; m < o.M; m += rows) {
      if (failed) continue;
      Chunk chunk = copy_chunk<Kernel>(o, m, std::min(rows, o.M - m), memory);
      for (long p = 0; p < panels; p += Kernel::PANELS)
        for (long k = 0; k < width; k += Kernel::PART_K)
          Kernel::group(o, chunk, packed + p * bytes, std::min(Kernel::PANELS, panels - p), 16 * p, k,
                        std::min(k + Kernel::PART_K, width), y);
    }
    Kernel::end();
  }
  return failed;
}

template <class Out>
int multiply(const Operands& o, Out* y, int amx, int threads) {
  return amx ? multiply<Amx>(o, y, threads) : multiply<Vnni>(o, y, threads);
}

}  // namespace
}  // namespace qtrain

// Linux grants a process the tiles of AMX when it asks. 0 where it does.
extern "C" int qtrain_request_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

// 0, or 1 where there is no memory.
extern "C" int qtrain_int8_scaled_mm(const int8_t* a, long a_stride, const int8_t* b, long b_stride, int b_k_major,
                                     const float* a_scale, const float* b_scale, const float* bias, void* y, int y_is_bf16,
                                     long M, long N, long K, int amx, int threads) {
  qtrain::Operands o{a, b, a_stride, b_stride, b_k_major != 0, a_scale, b_scale, bias, M, N, K};
  if (y_is_bf16) return qtrain::multiply(o, (qtrain::bf16*)y, amx, threads);
  return qtrain::multiply(o, (float*)y, amx, threads);
}
