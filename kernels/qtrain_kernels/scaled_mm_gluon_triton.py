"""Warp-specialised scaled GEMM for Hopper: one warp loads, two warpgroups multiply half a tile each."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qtrain_kernels.scaled_mm_config import properties
from qtrain_kernels.scaled_mm_triton import _mode, k_major

# Renamed between triton 3.6 and 3.9
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def _tile_of(tile, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    per_group = GROUP_M * gl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP_M
    height = gl.minimum(gl.cdiv(M, BLOCK_M) - first, GROUP_M)
    return first + tile % per_group % height, tile % per_group // height


@gluon.jit
def _produce(a, b, a_smem, b_smem, ready, free, M, N, K, STAGES: gl.constexpr,
             HALF_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr):  # fmt: skip
    BYTES: gl.constexpr = (2 * HALF_M + BLOCK_N) * BLOCK_K
    step = 0
    tiles = gl.cdiv(M, 2 * HALF_M) * gl.cdiv(N, BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = _tile_of(tile, M, N, 2 * HALF_M, BLOCK_N, GROUP_M)
        m, n = i * (2 * HALF_M), j * BLOCK_N
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), BYTES)
            load(a, [m, k], ready.index(stage), a_smem.index(2 * stage))
            load(a, [m + HALF_M, k], ready.index(stage), a_smem.index(2 * stage + 1))
            load(b, [n, k], ready.index(stage), b_smem.index(stage))
            step += 1


@gluon.jit
def _consume(y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, a_smem, b_smem, ready, free, M, N, K, HALF: gl.constexpr,
             A_SCALE: gl.constexpr, B_SCALE: gl.constexpr, BIAS: gl.constexpr, ACC: gl.constexpr,
             PROMOTE: gl.constexpr, STAGES: gl.constexpr, HALF_M: gl.constexpr, BLOCK_N: gl.constexpr,
             BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr):  # fmt: skip
    # Triton's list of integer instructions has none of 256 columns
    WIDTH: gl.constexpr = BLOCK_N if ACC == gl.float32 or BLOCK_N < 128 else 128
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32]
    )
    step = 0
    tiles = gl.cdiv(M, 2 * HALF_M) * gl.cdiv(N, BLOCK_N)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        i, j = _tile_of(tile, M, N, 2 * HALF_M, BLOCK_N, GROUP_M)
        acc = gl.zeros((HALF_M, BLOCK_N), dtype=ACC, layout=LAYOUT)
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), step // STAGES & 1)
            left, right = a_smem.index(2 * stage + HALF), b_smem.index(stage).permute((1, 0))
            if PROMOTE:
                part = gl.zeros((HALF_M, BLOCK_N), dtype=ACC, layout=LAYOUT)
                part = warpgroup_mma(left, right, part, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
                mbarrier.arrive(free.index(stage))
                acc = acc + part
            else:
                acc = warpgroup_mma(left, right, acc, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])
                mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        if not PROMOTE:
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        rows = i * (2 * HALF_M) + HALF * HALF_M + gl.arange(0, HALF_M, layout=gl.SliceLayout(1, LAYOUT))
        columns = j * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        y = acc.to(gl.float32)
        if A_SCALE == 2:
            y = y * gl.expand_dims(gl.load(a_scale_ptr + rows, mask=rows < M, other=0.0), 1)
        elif A_SCALE == 1:
            y = y * gl.load(a_scale_ptr)
        if B_SCALE == 2:
            y = y * gl.expand_dims(gl.load(b_scale_ptr + columns, mask=columns < N, other=0.0), 0)
        elif B_SCALE == 1:
            y = y * gl.load(b_scale_ptr)
        if BIAS:
            y = y + gl.expand_dims(gl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(gl.float32), 0)
        pointers = y_ptr + gl.expand_dims(rows.to(gl.int64) * N, 1) + gl.expand_dims(columns, 0)
        mask = gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < N, 0)
        gl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _scaled_mm_specialised_kernel(
    a, b, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, M, N, K,
    A_SCALE: gl.constexpr, B_SCALE: gl.constexpr, BIAS: gl.constexpr, ACC: gl.constexpr, PROMOTE: gl.constexpr,
    STAGES: gl.constexpr, HALF_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    a_smem = gl.allocate_shared_memory(a.dtype, [2 * STAGES, HALF_M, BLOCK_K], a.layout)
    b_smem = gl.allocate_shared_memory(b.dtype, [STAGES, BLOCK_N, BLOCK_K], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, a_smem, b_smem, ready, free, M, N, K, 0,
                        A_SCALE, B_SCALE, BIAS, ACC, PROMOTE, STAGES, HALF_M, BLOCK_N, BLOCK_K, GROUP_M)),
            (_consume, (y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, a_smem, b_smem, ready, free, M, N, K, 1,
                        A_SCALE, B_SCALE, BIAS, ACC, PROMOTE, STAGES, HALF_M, BLOCK_N, BLOCK_K, GROUP_M)),
            (_produce, (a, b, a_smem, b_smem, ready, free, M, N, K, STAGES, HALF_M, BLOCK_N, BLOCK_K, GROUP_M)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def scaled_mm_specialised(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype,
    acc: Any, promote: bool, *, BLOCK_N: int = 256, stages: int = 4, GROUP_M: int = 8, HALF_M: int = 64,
) -> Tensor:  # fmt: skip
    a, b = k_major(a), k_major(b)
    (M, K), N = a.shape, b.shape[0]
    y = torch.empty((M, N), dtype=out_dtype, device=a.device)
    pointers = [y if v is None else v.contiguous() for v in (a_scale, b_scale, bias)]
    code = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5}
    BLOCK_K = 128
    layouts = [
        gl.NVMMASharedLayout.get_default_for([rows, BLOCK_K], code[x.dtype])
        for x, rows in ((a, HALF_M), (b, BLOCK_N))
    ]
    tiles = triton.cdiv(M, 2 * HALF_M) * triton.cdiv(N, BLOCK_N)
    _scaled_mm_specialised_kernel[(min(tiles, properties(a.device)[1]),)](
        TensorDescriptor.from_tensor(a, [HALF_M, BLOCK_K], layouts[0]),
        TensorDescriptor.from_tensor(b, [BLOCK_N, BLOCK_K], layouts[1]),
        y, *pointers, M, N, K,
        A_SCALE=_mode(a_scale), B_SCALE=_mode(b_scale), BIAS=bias is not None, ACC=acc, PROMOTE=promote,
        STAGES=stages, HALF_M=HALF_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M,
        CONSUMER_REGISTERS=240, PRODUCER_REGISTERS=24, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return y
