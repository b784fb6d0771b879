"""The kernels that the scaled GEMMs share: int8 and fp8 codes, scales, bias and one rounding in the epilogue.

    y [M, N] = round((acc(a [M, K] . b [N, K]^T) * a_scale) * b_scale + bias)

Two variants, chosen by ``Config``. ``tma``: tiles come through tensor descriptors (sm_90 and later), in a persistent
grid. ``pointer``: masked loads, one tile a program, on every GPU. Both walk the output in groups of GROUP_M rows of
tiles, so that the tiles in flight share their operands in L2. Where the output has fewer tiles than the GPU
multiprocessors, the contraction is split: parts [SPLIT, M, N] are added in order by a second kernel, which never
depends on who finishes first.

Operands are K-major with rows of a multiple of 16 bytes: Hopper's wgmma takes 8-bit operands K-major alone, and both
descriptors and wide loads want aligned rows. ``scaled_mm_launch_triton`` launches them.

M, N free indices, K contraction.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from qtrain_kernels.aot import Build
from qtrain_kernels.cast_triton import INTERPRETED, cast
from qtrain_kernels.scaled_mm_config import BLACKWELL, ELSEWHERE, HOPPER, PROMOTED, Config

NONE, SCALAR, VECTOR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PART_ROWS, PART_COLUMNS = 16, 256
VARIANTS = (  # tiles that are small enough for the cases to have several
    Config("pointer", 64, 64, 128, 4, 3, GROUP_M=2),
    Config("tma", 64, 64, 128, 4, 3, GROUP_M=2),
    Config("tma", 64, 128, 128, 4, 3, SPLIT=3, subtile=True),
)
VECTORS = ("a_scale_ptr", "b_scale_ptr", "bias_ptr")
# An fma rounds once where the equation rounds twice; .ftz flushes subnormals.
FORBIDDEN = ("fma.rn.f32", ".ftz")
OPTIONS = {"enable_fp_fusion": False}  # a contracted multiply-add rounds once where the equation rounds twice


@triton.jit
def tile_of(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Number of a tile -> its row and column of tiles."""
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP_M
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP_M)
    return first + tile % per_group % height, tile % per_group // height


@triton.jit
def _product(a, b, acc, IMPRECISE: tl.constexpr):
    """acc + a [M, K] . b [K, N]. The interpreter reads NaN of e4m3fn as 480."""
    if INTERPRETED and a.dtype != tl.int8:
        left, right = a.to(tl.float16), b.to(tl.float16)
        if a.dtype == tl.float8e4nv:
            left = tl.where((a.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), left)
        if b.dtype == tl.float8e4nv:
            right = tl.where((b.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F, float("nan"), right)
        return tl.dot(left, right, acc)
    else:
        return tl.dot(a, b, acc, max_num_imprecise_acc=IMPRECISE, out_dtype=acc.dtype)


@triton.jit
def scaled(y, a_scale_ptr, b_scale_ptr, bias_ptr, rows, columns, M, N,
            A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """The epilogue in float32, each operation rounded once."""
    y = y.to(tl.float32)
    if A_SCALE == VECTOR:
        y = y * tl.expand_dims(tl.load(a_scale_ptr + rows, mask=rows < M, other=0.0), 1)
    elif A_SCALE == SCALAR:
        y = y * tl.load(a_scale_ptr)
    if B_SCALE == VECTOR:
        y = y * tl.expand_dims(tl.load(b_scale_ptr + columns, mask=columns < N, other=0.0), 0)
    elif B_SCALE == SCALAR:
        y = y * tl.load(b_scale_ptr)
    if BIAS:
        y = y + tl.expand_dims(tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32), 0)
    return y


@triton.jit
def _store(acc, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, M, N,
           A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, BIAS: tl.constexpr,
           RAW: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Sums [HEIGHT, WIDTH] at row m, column n -> y, through the epilogue unless RAW."""
    rows, columns = m + tl.arange(0, HEIGHT), n + tl.arange(0, WIDTH)
    if RAW:
        out = acc
    else:
        out = scaled(acc, a_scale_ptr, b_scale_ptr, bias_ptr, rows, columns, M, N, A_SCALE, B_SCALE, BIAS)
    pointers = y_ptr + tl.expand_dims(rows.to(tl.int64) * N, 1) + tl.expand_dims(columns, 0)
    mask = (tl.expand_dims(rows, 1) < M) & (tl.expand_dims(columns, 0) < N)
    tl.store(pointers, cast(out, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["M", "K"]
)  # the number of tokens is one or the other, and may change from step to step
def _scaled_mm_tma_kernel(
    a, b, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, M, N, K,
    A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, IMPRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, SPLIT: tl.constexpr,
    SUBTILE: tl.constexpr,
):  # fmt: skip
    """a, b: descriptors of [M, K], [N, K]. With SPLIT, y_ptr takes the sums of each part, [SPLIT, M, N] of ACC."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)  # of one part; those past K read zeros
    for unit in tl.range(tl.program_id(0), tiles * SPLIT, tl.num_programs(0), flatten=True):
        i, j = tile_of(unit % tiles, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        m, n, start = i * BLOCK_M, j * BLOCK_N, unit // tiles * steps * BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
        for k in range(steps):
            rows = a.load([m, start + k * BLOCK_K])
            columns = b.load([n, start + k * BLOCK_K])
            acc = _product(rows, columns.T, acc, IMPRECISE)
        part_ptr = y_ptr + (unit // tiles).to(tl.int64) * M * N
        if SUBTILE:
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            _store(left, part_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, M, N,
                   A_SCALE, B_SCALE, BIAS, SPLIT > 1, BLOCK_M, BLOCK_N // 2)  # fmt: skip
            _store(right, part_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, m, n + BLOCK_N // 2, M, N,
                   A_SCALE, B_SCALE, BIAS, SPLIT > 1, BLOCK_M, BLOCK_N // 2)  # fmt: skip
        else:
            _store(acc, part_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, M, N,
                   A_SCALE, B_SCALE, BIAS, SPLIT > 1, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _add_parts_kernel(
    parts_ptr, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, M, N,
    A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[SPLIT, M, N] sums -> y [M, N], added in the order of the parts."""
    tiles = tl.cdiv(N, BLOCK_N)
    m, n = tl.program_id(0) // tiles * BLOCK_M, tl.program_id(0) % tiles * BLOCK_N
    rows, columns = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    mask = (tl.expand_dims(rows, 1) < M) & (tl.expand_dims(columns, 0) < N)
    pointers = parts_ptr + tl.expand_dims(rows.to(tl.int64) * N, 1) + tl.expand_dims(columns, 0)
    acc = tl.load(pointers, mask=mask, other=0.0)
    for _ in tl.static_range(SPLIT - 1):
        pointers += M.to(tl.int64) * N
        acc += tl.load(pointers, mask=mask, other=0.0)
    _store(acc, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, M, N,
           A_SCALE, B_SCALE, BIAS, False, BLOCK_M, BLOCK_N)  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def _scaled_mm_pointer_kernel(
    a_ptr, b_ptr, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, M, N, K, stride_am, stride_bn,
    A_SCALE: tl.constexpr, B_SCALE: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, IMPRECISE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    i, j = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    m, n = i * BLOCK_M, j * BLOCK_N
    # Rows past the end wrap around: they are read from memory that exists, and never stored.
    rows = ((m + tl.arange(0, BLOCK_M)) % M).to(tl.int64)
    columns = ((n + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    a = a_ptr + tl.expand_dims(rows * stride_am, 1) + tl.expand_dims(inner, 0)
    b = b_ptr + tl.expand_dims(inner, 1) + tl.expand_dims(columns * stride_bn, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            left, right = tl.load(a), tl.load(b)
        else:
            inside = inner < K - k * BLOCK_K
            left = tl.load(a, mask=tl.expand_dims(inside, 0), other=0.0)
            right = tl.load(b, mask=tl.expand_dims(inside, 1), other=0.0)
        acc = _product(left, right, acc, IMPRECISE)
        a += BLOCK_K
        b += BLOCK_K
    _store(acc, y_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, m, n, M, N,
           A_SCALE, B_SCALE, BIAS, False, BLOCK_M, BLOCK_N)  # fmt: skip


def builds(kind: str) -> list[Build]:
    """What the rules choose, ahead of time, but for the specialised kernel."""
    code, sums = {"int8": ("i8", "i32"), "fp8": ("fp8e4nv", "fp32")}[kind]
    everywhere = [*BLACKWELL, *(ELSEWHERE if kind == "int8" else ())]
    hopper = [tile for tile in HOPPER[kind, torch.bfloat16] if tile.config.variant == "pointer"]
    found = [_build(tile.config, code, "bf16") for tile in (*everywhere, *hopper)]
    return [*found, _build(BLACKWELL[0].config, code, "fp32"), _add_parts_build(sums)]


def _build(config: Config, code: str, out: str) -> Build:
    pointer = config.variant == "pointer"
    types = {"y_ptr": f"*{out}"} | dict.fromkeys(VECTORS, "*fp32")
    types |= dict.fromkeys(("M", "N", "K", "stride_am", "stride_bn"), "i32")
    types |= {
        "a_ptr": f"*{code}",
        "b_ptr": f"*{code}",
        "a": f"tensordesc<{code}[{config.BLOCK_M},{config.BLOCK_K}]>",
    }
    types["b"] = f"tensordesc<{code}[{config.BLOCK_N},{config.BLOCK_K}]>"
    kernel = _scaled_mm_pointer_kernel if pointer else _scaled_mm_tma_kernel
    constants: dict[str, Any] = {
        "A_SCALE": 2,
        "B_SCALE": 2,
        "BIAS": True,
        "ACC": tl.int32 if code == "i8" else tl.float32,
    }
    constants |= {
        "IMPRECISE": PROMOTED if code != "i8" else None,
        "GROUP_M": config.GROUP_M,
        "BLOCK_K": config.BLOCK_K,
    }
    constants |= {"BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "EVEN_K": True, "SPLIT": config.SPLIT}
    constants |= {"SUBTILE": config.subtile}
    return Build(
        f"{config.name}, {out}",
        kernel,
        types,
        {name: value for name, value in constants.items() if name in kernel.arg_names},
        divisible_by_16=(
            "y_ptr",
            *VECTORS,
            "N",
            *(("a_ptr", "b_ptr", "K", "stride_am", "stride_bn") if pointer else ()),
        ),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS},
        forbidden_ptx=FORBIDDEN,
        max_registers=255,  # sums of 128 x 256 in 8 warps are 128 registers; what counts is that none spills
        required_ptx=_instructions(code, config, out),
    )


def _instructions(code: str, config: Config, out: str) -> dict[int, tuple[str, ...]]:
    """The tensor core instructions of each architecture that runs the config; sm_100 by one build."""
    if config.variant == "pointer" and config.BLOCK_K == 128:
        return {90: (r"wgmma\.mma_async\S*\.s32\.s8\.s8", r"cp\.async")}
    if config.variant == "pointer":
        return {80: (r"mma\.sync\S*\.s32\.s8\.s8\.s32", r"cp\.async")}
    wgmma = r"wgmma\.mma_async\S*\.s32\.s8\.s8" if code == "i8" else r"wgmma\.mma_async\S*\.f32\.e4m3\.e4m3"
    found: dict[int, tuple[str, ...]] = {90: (wgmma, r"cp\.async\.bulk\.tensor")}
    if config.BLOCK_M == config.BLOCK_N == 128 and config.SPLIT == 1 and out == "bf16":
        # Triton 3.6 takes int8 in mma.sync there, 3.9 in tcgen05
        integer = r"tcgen05\.mma|mma\.sync\S*\.s32\.s8\.s8\.s32"
        found[100] = (integer if code == "i8" else r"tcgen05\.mma\S*kind::f8f6f4",)
    return found


def _add_parts_build(sums: str) -> Build:
    types = {
        "parts_ptr": f"*{sums}",
        "y_ptr": "*fp32",
        **dict.fromkeys(VECTORS, "*fp32"),
        "M": "i32",
        "N": "i32",
    }
    constants = {
        "A_SCALE": 2,
        "B_SCALE": 2,
        "BIAS": True,
        "SPLIT": 4,
        "BLOCK_M": PART_ROWS,
        "BLOCK_N": PART_COLUMNS,
    }
    return Build(
        "sum of 4 parts", _add_parts_kernel, types, constants, divisible_by_16=tuple(n for n in types if n != "M"), options=OPTIONS,
        forbidden_ptx=FORBIDDEN, required_ptx={90: ()},
    )  # fmt: skip
