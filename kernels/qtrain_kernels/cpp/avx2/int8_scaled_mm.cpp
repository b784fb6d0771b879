// y [M, N] = (a [M, K] . b [N, K]^T) * a_scale * b_scale^T + bias: int8 codes, sums in int32, one rounding at the end.
//
// With AVX2-VNNI the product is here: the panels of the AVX-512 kernel, 16 columns with four neighbours of K side by side
// and 128 added to each code, read by vpdpbusd as two vectors of eight columns; 6 x 2 of 16 registers hold sums. Without
// it the sums come from elsewhere, and only their epilogue is here.

#include <immintrin.h>

#include <algorithm>

#include "../int8_gemm.h"

namespace qtrain {
namespace {

inline void put(float* y, float v) { *y = v; }

// To nearest, ties to even, NaN to 0x7FC0.
inline void put(bf16* y, float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  uint32_t rounded = (bits + (bits >> 16 & 1) + 0x7FFF) >> 16;
  *y = (bf16)(v == v ? rounded : 0x7FC0);
}

// Wraps, as vpdpbusd does; what is left fits.
inline float less(int32_t sum, int32_t shift) { return (float)(int32_t)((uint32_t)sum - (uint32_t)shift); }

// n sums of one row, of which `shift` is taken off.
template <class Out>
void finish(const int32_t* sums, int32_t shift, long n, float a_scale, const float* b_scale, const float* bias, Out* y) {
  if (bias)
    for (long j = 0; j < n; j++) put(y + j, less(sums[j], shift) * a_scale * b_scale[j] + bias[j]);
  else
    for (long j = 0; j < n; j++) put(y + j, less(sums[j], shift) * a_scale * b_scale[j]);
}

template <class Out>
void dequantize(const int32_t* sums, const float* a_scale, const float* b_scale, const float* bias, Out* y, long M, long N, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long m = 0; m < M; m++) finish(sums + m * N, 0, N, a_scale[m], b_scale, bias, y + m * N);
}

#ifdef __AVXVNNI__

constexpr long BLOCK_M = 6, COLUMNS = 16;
constexpr long L2_BYTES = 256 << 10;  // of rows of a, beside the panel that passes by

using Operands = GemmOperands;

inline long padded(long K) { return round_up(std::max(K, 1L), 4); }

// Columns [16 p, 16 p + 16) of b, with 128 added. Beyond K a has zeros, and beyond N nobody looks.
void pack_panel(const Operands& o, long p, uint8_t* panel) {
  const long n = COLUMNS * p, columns = std::min(COLUMNS, o.N - n);
  std::memset(panel, 0x80, padded(o.K) * COLUMNS);
  if (o.b_k_major) {
    for (long j = 0; j < columns; j++) {
      const int8_t* row = o.b + (n + j) * o.b_stride;
      for (long k = 0; k < o.K; k += 4) {
        uint32_t four = 0;
        std::memcpy(&four, row + k, std::min(4L, o.K - k));
        four ^= 0x80808080;
        std::memcpy(panel + k * COLUMNS + 4 * j, &four, 4);
      }
    }
    return;
  }
  for (long k = 0; k < o.K; k++)
    for (long j = 0; j < columns; j++) panel[(k & ~3L) * COLUMNS + 4 * j + (k & 3)] = (uint8_t)(o.b[k * o.b_stride + n + j] ^ 0x80);
}

// Rows of a as the kernel reads them, zeros where there is nothing: whole blocks, and K a multiple of four.
struct Chunk {
  int8_t* rows;
  int32_t* row_sums;  // 128 * sum of each row
  long stride, first, count;
};

// A line between rows, since those whose distance is a multiple of 4096 bytes would fight for one set of L1.
inline long chunk_stride(long K) { return round_up(padded(K), 64) + 64; }
inline long chunk_bytes(long K, long rows) { return rows * (chunk_stride(K) + 4); }

Chunk copy_chunk(const Operands& o, long first, long count, uint8_t* memory) {
  const long stride = chunk_stride(o.K), whole = round_up(count, BLOCK_M);
  Chunk c{(int8_t*)memory, (int32_t*)(memory + whole * stride), stride, first, count};
  std::memset(memory, 0, whole * stride);
  for (long i = 0; i < count; i++) {
    const int8_t* row = o.a + (first + i) * o.a_stride;
    std::memcpy(c.rows + i * stride, row, o.K);
    int32_t sum = 0;
    for (long k = 0; k < o.K; k++) sum += row[k];
    c.row_sums[i] = (int32_t)(128u * (uint32_t)sum);
  }
  return c;
}

// Rows [i, i + 6) of the chunk by one panel.
template <class Out>
void block(const Operands& o, const Chunk& c, const uint8_t* panel, long i, long n, Out* y) {
  const int8_t* a = c.rows + i * c.stride;
  const long stride = c.stride, K = padded(o.K);
  __m256i sums[BLOCK_M][2];
  each<BLOCK_M>([&](auto r) { sums[r][0] = sums[r][1] = _mm256_setzero_si256(); });
  for (long k = 0; k < K; k += 4) {
    const __m256i low = _mm256_load_si256((const __m256i*)(panel + k * COLUMNS));
    const __m256i high = _mm256_load_si256((const __m256i*)(panel + k * COLUMNS + 32));
    each<BLOCK_M>([&](auto r) {
      int32_t four;
      std::memcpy(&four, a + r * stride + k, 4);
      const __m256i broadcast = _mm256_set1_epi32(four);
      // Not the intrinsic, for which GCC 12 copies sums from register to register
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[r][0]) : "x"(low), "x"(broadcast));
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[r][1]) : "x"(high), "x"(broadcast));
    });
  }
  alignas(32) int32_t kept[BLOCK_M][COLUMNS];
  each<BLOCK_M>([&](auto r) {
    _mm256_store_si256((__m256i*)kept[r], sums[r][0]);
    _mm256_store_si256((__m256i*)(kept[r] + 8), sums[r][1]);
  });
  for (long r = 0; r < BLOCK_M && i + r < c.count; r++) {
    const long row = c.first + i + r;
    finish(kept[r], c.row_sums[i + r], std::min(COLUMNS, o.N - n), o.a_scale[row], o.b_scale + n,
           o.bias ? o.bias + n : nullptr, y + row * o.N + n);
  }
}

template <class Out>
int multiply(const Operands& o, Out* y, int threads) {
  const long panels = (o.N + COLUMNS - 1) / COLUMNS;
  const long bytes = padded(o.K) * COLUMNS + 64;  // and a line, so that panels do not all begin in one set of a cache
  const long rows = rows_at_a_time(o.M, BLOCK_M, L2_BYTES / padded(o.K), threads);
  auto pack = [&](uint8_t* packed) {
#pragma omp for schedule(static)
    for (long p = 0; p < panels; p++) pack_panel(o, p, packed + p * bytes);
  };
  return multiply_pieces((o.M + rows - 1) / rows, panels * bytes, chunk_bytes(o.K, rows), threads, pack,
                         [&](long piece, const uint8_t* packed, uint8_t* own) {
    const Chunk chunk = copy_chunk(o, piece * rows, std::min(rows, o.M - piece * rows), own);
    for (long p = 0; p < panels; p++)
      for (long i = 0; i < chunk.count; i += BLOCK_M) block(o, chunk, packed + p * bytes, i, COLUMNS * p, y);
  });
}

#endif

}  // namespace
}  // namespace qtrain

// y of sums [M, N].
extern "C" void qtrain_dequantize_int32(const int32_t* sums, const float* a_scale, const float* b_scale, const float* bias, void* y,
                                        int y_is_bf16, long M, long N, int threads) {
  if (y_is_bf16) return qtrain::dequantize(sums, a_scale, b_scale, bias, (qtrain::bf16*)y, M, N, threads);
  return qtrain::dequantize(sums, a_scale, b_scale, bias, (float*)y, M, N, threads);
}

#ifdef __AVXVNNI__
// 0, or 1 where there is no memory. The signature is that of the AVX-512 kernel, which has two ways to multiply.
extern "C" int qtrain_int8_scaled_mm(const int8_t* a, long a_stride, const int8_t* b, long b_stride, int b_k_major,
                                     const float* a_scale, const float* b_scale, const float* bias, void* y, int y_is_bf16,
                                     long M, long N, long K, int, int threads) {
  qtrain::Operands o{a, b, a_stride, b_stride, b_k_major != 0, a_scale, b_scale, bias, M, N, K};
  if (y_is_bf16) return qtrain::multiply(o, (qtrain::bf16*)y, threads);
  return qtrain::multiply(o, (float*)y, threads);
}

// The products alone, of registers that nothing fills and nothing reads. Returns the operations (two a product) of all threads.
extern "C" double qtrain_int8_products(int, int threads, long steps) {
#pragma omp parallel num_threads(threads)
  {
    __m256i a = _mm256_set1_epi32(1), b = _mm256_set1_epi32(2);
    __m256i s0 = a, s1 = a, s2 = a, s3 = a, s4 = a, s5 = a, s6 = a, s7 = a, s8 = a, s9 = a, s10 = a, s11 = a;
    for (long i = 0; i < steps; i++)
      asm volatile(
          "%{vex%} vpdpbusd %13, %12, %0\n %{vex%} vpdpbusd %13, %12, %1\n %{vex%} vpdpbusd %13, %12, %2\n"
          "%{vex%} vpdpbusd %13, %12, %3\n %{vex%} vpdpbusd %13, %12, %4\n %{vex%} vpdpbusd %13, %12, %5\n"
          "%{vex%} vpdpbusd %13, %12, %6\n %{vex%} vpdpbusd %13, %12, %7\n %{vex%} vpdpbusd %13, %12, %8\n"
          "%{vex%} vpdpbusd %13, %12, %9\n %{vex%} vpdpbusd %13, %12, %10\n %{vex%} vpdpbusd %13, %12, %11\n"
          : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9), "+x"(s10), "+x"(s11)
          : "x"(a), "x"(b));
  }
  return 2.0 * (double)threads * (double)steps * 12 * 32;
}
#endif
