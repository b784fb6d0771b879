// y [M, N] = (a [M, K] . b [N, K]^T) * a_scale * b_scale^T + bias: int8 codes, sums in int32, one rounding at the end.
//
// b is packed once (panels.h), rows of a are copied as they are needed, sums live in registers, and y is written once,
// scaled and rounded. The products are those of AMX tiles or of vpdpbusd.

#include <sys/syscall.h>
#include <unistd.h>

#include "int8_scaled_mm_amx.h"
#include "int8_scaled_mm_vnni.h"

// Linux grants a process the tiles of AMX when it asks. 0 where it does.
extern "C" int qtrain_request_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  return (int)syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
}

// 0, or 1 where there is no memory.
extern "C" int qtrain_int8_scaled_mm(const int8_t* a, long a_stride, const int8_t* b, long b_stride, int b_k_major,
                                     const float* a_scale, const float* b_scale, const float* bias, void* y, int y_is_bf16,
                                     long M, long N, long K, int amx, int threads) {
  const qtrain::Operands o{{a, b, a_stride, b_stride, b_k_major != 0, a_scale, b_scale, bias, M, N, K}};
  if (y_is_bf16) {
    auto* out = (qtrain::bf16*)y;
    return amx ? qtrain::multiply_amx(o, out, threads) : qtrain::multiply_vnni(o, out, threads);
  }
  auto* out = (float*)y;
  return amx ? qtrain::multiply_amx(o, out, threads) : qtrain::multiply_vnni(o, out, threads);
}
