// What the kernels of every instruction set share: scales, the copies of a quantization, scratch memory, the hash's keys.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace qtrain {

using bf16 = uint16_t;  // the upper half of a float32

inline long round_up(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

// f(0), f(1), ... f(N - 1) with constants: an array that is indexed in f alone becomes registers. GCC 12 leaves it in
// memory when a loop, unrolled or not, goes over it.
template <class F, int... I>
[[gnu::always_inline]] inline void each(F f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void each(F f) {
  each(f, std::make_integer_sequence<int, N>{});
}

constexpr long TILE = 64;  // rows and columns that are quantized at a time: the side of a cache line of codes
constexpr float MIN_SCALE = 0x1p-100f;

// One copy of codes. fold: multiplied into x before, along the other axis; or null. codes: null for no such copy.
struct Side {
  int8_t* codes;
  float* scale;
  const float* fold;
  int32_t qmax;
  int32_t stochastic;
  int32_t per_tensor;
  int32_t stream;
};

// The scale of a largest magnitude, given as bits.
inline float scale_of(int32_t bits, int qmax) {
  float amax;
  std::memcpy(&amax, &bits, 4);
  float scale = amax / (float)qmax;
  return scale < MIN_SCALE ? MIN_SCALE : scale;  // NaN stays
}

// From largest magnitudes (bits) to scales and their reciprocals.
template <class Bits>
void finish_scales(const Side& side, float* inverse, long n, Bits bits) {
  int32_t most = 0;
  if (side.per_tensor)
    for (long i = 0; i < n; i++) most = bits(i) > most ? bits(i) : most;
  for (long i = 0; i < n; i++) {
    side.scale[i] = scale_of(side.per_tensor ? most : bits(i), side.qmax);
    inverse[i] = 1.0f / side.scale[i];
  }
}

// Magnitudes lie where the scales are going to be.
inline void finish_row_scales(const Side& rows, float* inverse, long n) {
  if (!rows.codes) return;
  finish_scales(rows, inverse, n, [&](long r) {
    int32_t bits;
    std::memcpy(&bits, &rows.scale[r], 4);
    return bits;
  });
}

// Magnitudes lie in column_bits [threads][n].
inline void finish_column_scales(const Side& columns, float* inverse, long n, const int32_t* column_bits, int threads) {
  if (!columns.codes) return;
  finish_scales(columns, inverse, n, [&](long c) {
    int32_t most = 0;
    for (int t = 0; t < threads; t++) most = column_bits[t * n + c] > most ? column_bits[t * n + c] : most;
    return most;
  });
}

constexpr long BLOCK_ROWS = 256, BLOCK_COLUMNS = 512;  // of tiles, whose pages and lines fit the second TLB and L2

// Both passes over x [R, C]. measure(from, to, bits): largest magnitudes of rows [from, to), those of rows as bits into
// rows.scale and those of columns into bits [C]. tile(r, c): the codes of TILE rows from r on and TILE columns from c on.
template <class Measure, class Tile>
void quantize_in_two_passes(long R, long C, const Side& rows, const Side& columns, float* row_inverse, float* column_inverse,
                            int32_t* column_bits, int threads, Measure measure, Tile tile) {
  const long down = (R + BLOCK_ROWS - 1) / BLOCK_ROWS, across = (C + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
#pragma omp parallel num_threads(threads)
  {
    // As many parts as threads, whether or not that many came
#pragma omp for schedule(static, 1)
    for (int t = 0; t < threads; t++) measure(R * t / threads, R * (t + 1) / threads, column_bits + t * C);
#pragma omp single
    {
      finish_row_scales(rows, row_inverse, R);
      finish_column_scales(columns, column_inverse, C, column_bits, threads);
    }
#pragma omp for schedule(static) nowait
    for (long i = 0; i < down * across; i++) {
      const long r0 = i / across * BLOCK_ROWS, r1 = r0 + BLOCK_ROWS < R ? r0 + BLOCK_ROWS : R;
      const long c0 = i % across * BLOCK_COLUMNS, c1 = c0 + BLOCK_COLUMNS < C ? c0 + BLOCK_COLUMNS : C;
      for (long r = r0; r < r1; r += TILE)
        for (long c = c0; c < c1; c += TILE) {
          if (columns.codes && c + 2 * TILE <= c1)  // the lines of the next tile, which lie far from each other
            for (long j = c + TILE; j < c + 2 * TILE; j++) __builtin_prefetch(columns.codes + j * R + r, 1);
          tile(r, c);
        }
    }
  }
}

// Memory that is aligned, grows, and is kept by its thread: fresh pages cost more than what they are used for.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  void* get(size_t bytes) {
    if (bytes > size_ || data_ == nullptr) {
      std::free(data_);
      size_ = round_up((long)bytes + 1, 4096);
      data_ = std::aligned_alloc(4096, size_);
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// counter_hash.py: the same bits.
constexpr uint32_t GOLDEN = 0x9E3779B9, MULTIPLIER_1 = 0x7FEB352D, MULTIPLIER_2 = 0x846CA68B;

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= MULTIPLIER_1;
  x ^= x >> 15;
  x *= MULTIPLIER_2;
  return x ^ (x >> 16);
}

struct RowKeys {
  uint32_t r0, r1;
};

struct Key {
  uint32_t k0, k1;
  Key(int64_t seed, int64_t step, int32_t stream) : k0(word(0x243F6A88, seed, step, stream)), k1(word(0x85A308D3, seed, step, stream)) {}
  static uint32_t word(uint32_t start, int64_t seed, int64_t step, int32_t stream) {
    uint32_t w = mix((uint32_t)seed ^ start);
    w = mix(w + (uint32_t)((uint64_t)seed >> 32));
    w = mix(w ^ (uint32_t)step);
    return mix(w + (uint32_t)stream);
  }
  RowKeys row(int64_t global_row) const { return {mix((uint32_t)global_row ^ k0), mix((uint32_t)global_row + k1)}; }
};

}  // namespace qtrain
