"""A scaled GEMM for Hopper (sm_90) whose warps share the work by kind: one loads, two warpgroups multiply.

The loading warp runs ahead through the tiles of its program, as far as the ring of NUM_STAGES buffers allows, so that
loads never wait for an epilogue. Each warpgroup owns one half of the rows of a tile, and nothing but the ring ties it to the
other: while one stores, or adds its partial sums of fp8 in float32, the other keeps the tensor cores busy. (Cooperative
warp specialisation as in CUTLASS 3; promotion as in DeepSeek-V3, arXiv:2412.19437, section 3.3.2.)

Written in Gluon, Triton's language of explicit layouts and barriers, since Triton itself does not specialise warps on
Hopper. The interpreter cannot run it: its values are checked on a GPU alone (``tests/kernels``, marker gpu).
"""

from __future__ import annotations

from typing import Any

import torch
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

from qtrain_kernels.aot import Build
from qtrain_kernels.scaled_mm_config import Config
from qtrain_kernels.scaled_mm_triton import FORBIDDEN, OPTIONS, VECTORS, scaled, tile_of

WARPGROUPS = gl.constexpr(2)
# Registers a thread: 2 * 240 + 24 in groups of 128 threads are the 64512 of a multiprocessor that a kernel may have
CONSUMER_REGISTERS, PRODUCER_REGISTERS = gl.constexpr(240), gl.constexpr(24)
# Renamed between triton 3.6 and 3.9
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
CODES = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5}


@gluon.jit
def _produce(
    a, b, a_ring, b_ring, ready, free, M, N, K, NUM_STAGES: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Fill each buffer of the ring as soon as both warpgroups have read it."""
    HALF: gl.constexpr = BLOCK_M // WARPGROUPS
    step = 0
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(gl.cdiv(K, BLOCK_K), SPLIT)  # of one part; those past K read zeros
    for unit in range(gl.program_id(0), tiles * SPLIT, gl.num_programs(0)):
        i, j = tile_of(unit % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first = unit // tiles * steps
        for k in range(first * BLOCK_K, (first + steps) * BLOCK_K, BLOCK_K):
            stage = step % NUM_STAGES
            # A new barrier is in phase 0, and to wait for phase 1 is to pass: the first round waits for nobody
            mbarrier.wait(free.index(stage), (step // NUM_STAGES & 1) ^ 1)
            mbarrier.expect(ready.index(stage), (BLOCK_M + BLOCK_N) * BLOCK_K)
            for half in gl.static_range(WARPGROUPS):
                load(
                    a,
                    [i * BLOCK_M + half * HALF, k],
                    ready.index(stage),
                    a_ring.index(WARPGROUPS * stage + half),
                )
            load(b, [j * BLOCK_N, k], ready.index(stage), b_ring.index(stage))
            step += 1


@gluon.jit
def _consume(
    y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, a_ring, b_ring, ready, free, M, N, K, HALF_INDEX: gl.constexpr,
    A_SCALE: gl.constexpr, B_SCALE: gl.constexpr, BIAS: gl.constexpr, ACC: gl.constexpr, PROMOTE: gl.constexpr,
    NUM_STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """Multiply one half of the rows of each tile; PROMOTE: add every BLOCK_K products in float32."""
    HALF: gl.constexpr = BLOCK_M // WARPGROUPS
    # Triton's list of integer instructions has none of 256 columns
    WIDTH: gl.constexpr = 128 if a_ring.dtype == gl.int8 and BLOCK_N > 128 else BLOCK_N
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 32]
    )
    step = 0
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    steps = gl.cdiv(gl.cdiv(K, BLOCK_K), SPLIT)  # of one part; those past K read zeros
    for unit in range(gl.program_id(0), tiles * SPLIT, gl.num_programs(0)):
        i, j = tile_of(unit % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = gl.zeros((HALF, BLOCK_N), dtype=ACC, layout=LAYOUT)
        for k in range(steps):
            stage = step % NUM_STAGES
            mbarrier.wait(ready.index(stage), step // NUM_STAGES & 1)
            left = a_ring.index(WARPGROUPS * stage + HALF_INDEX)
            right = b_ring.index(stage).permute((1, 0))
            if PROMOTE:
                part = gl.zeros((HALF, BLOCK_N), dtype=ACC, layout=LAYOUT)
                part = warpgroup_mma(left, right, part, use_acc=False, is_async=True)
                part = warpgroup_mma_wait(num_outstanding=0, deps=[part])
                mbarrier.arrive(free.index(stage))
                acc = acc + part
            else:
                acc = warpgroup_mma(left, right, acc, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=[acc])  # the step before this one is done
                mbarrier.arrive(free.index((step + NUM_STAGES - 1) % NUM_STAGES), pred=k > 0)
            step += 1
        if not PROMOTE:
            acc = warpgroup_mma_wait(num_outstanding=0, deps=[acc])
            mbarrier.arrive(free.index((step + NUM_STAGES - 1) % NUM_STAGES))
        rows = i * BLOCK_M + HALF_INDEX * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, LAYOUT))
        columns = j * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
        y = acc
        if SPLIT == 1:
            y = scaled(acc, a_scale_ptr, b_scale_ptr, bias_ptr, rows, columns, M, N, A_SCALE, B_SCALE, BIAS)
        part_ptr = y_ptr + (unit // tiles).to(gl.int64) * M * N
        pointers = part_ptr + gl.expand_dims(rows.to(gl.int64) * N, 1) + gl.expand_dims(columns, 0)
        mask = gl.expand_dims(rows < M, 1) & gl.expand_dims(columns < N, 0)
        gl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=mask)


@gluon.jit(do_not_specialize=["M", "K"])
def _scaled_mm_specialised_kernel(
    a, b, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, M, N, K,
    A_SCALE: gl.constexpr, B_SCALE: gl.constexpr, BIAS: gl.constexpr, ACC: gl.constexpr, PROMOTE: gl.constexpr,
    NUM_STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """a, b: descriptors of [M, K] in blocks of half a tile, and of [N, K]. With SPLIT, y_ptr takes the sums of each part,
    [SPLIT, M, N] of ACC."""
    a_ring = gl.allocate_shared_memory(
        a.dtype, [WARPGROUPS * NUM_STAGES, BLOCK_M // WARPGROUPS, BLOCK_K], a.layout
    )
    b_ring = gl.allocate_shared_memory(b.dtype, [NUM_STAGES, BLOCK_N, BLOCK_K], b.layout)
    ready = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [NUM_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(NUM_STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=WARPGROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, a_ring, b_ring, ready, free, M, N, K, 0,
                        A_SCALE, B_SCALE, BIAS, ACC, PROMOTE, NUM_STAGES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT)),
            (_consume, (y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, a_ring, b_ring, ready, free, M, N, K, 1,
                        A_SCALE, B_SCALE, BIAS, ACC, PROMOTE, NUM_STAGES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT)),
            (_produce, (a, b, a_ring, b_ring, ready, free, M, N, K, NUM_STAGES, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SPLIT)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def _layout(rows: int, config: Config, dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows, config.BLOCK_K], CODES[dtype])


def specialised_launch(
    a: Tensor, b: Tensor, config: Config, promote: bool
) -> tuple[Any, list[Any], dict[str, Any]]:
    """Kernel, descriptors and constants of a launch; ``a`` and ``b`` K-major with rows of a multiple of 16 bytes."""
    half = config.BLOCK_M // WARPGROUPS.value
    descriptors = [
        TensorDescriptor.from_tensor(a, [half, config.BLOCK_K], _layout(half, config, a.dtype)),
        TensorDescriptor.from_tensor(
            b, [config.BLOCK_N, config.BLOCK_K], _layout(config.BLOCK_N, config, b.dtype)
        ),
    ]
    return _scaled_mm_specialised_kernel, descriptors, {"NUM_STAGES": config.num_stages, "PROMOTE": promote}


def build_specialised(config: Config, dtype: torch.dtype, out: str) -> Build:
    """Ahead of time, for sm_90."""
    code = {torch.int8: "i8", torch.float8_e4m3fn: "fp8e4nv"}[dtype]
    types = {"y_ptr": f"*{out}", **dict.fromkeys(VECTORS, "*fp32"), **dict.fromkeys("MNK", "i32")}
    for name, rows in (("a", config.BLOCK_M // WARPGROUPS.value), ("b", config.BLOCK_N)):
        types[name] = f"tensordesc<{code}[{rows},{config.BLOCK_K}],{_layout(rows, config, dtype)!r}>"
    constants = {"A_SCALE": 2, "B_SCALE": 2, "BIAS": True, "ACC": gl.int32 if code == "i8" else gl.float32}
    constants |= {"PROMOTE": code != "i8", "NUM_STAGES": config.num_stages, "GROUP_M": config.GROUP_M}
    constants |= {"SPLIT": config.SPLIT}
    constants |= {key: getattr(config, key) for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    return Build(
        f"{config.name}, {out}",
        _scaled_mm_specialised_kernel,
        types,
        constants,
        divisible_by_16=("y_ptr", *VECTORS, "N"),
        options={"num_warps": config.num_warps, **OPTIONS},
        forbidden_ptx=FORBIDDEN,
        max_registers=168,  # 65536 of a multiprocessor over the 384 threads of a block
        required_ptx={90: (r"wgmma\.mma_async", r"setmaxnreg", r"cp\.async\.bulk\.tensor")},
    )
