"""The Triton kernels of ``activation_quantize``.

Rows alone: one program takes BLOCK_R whole rows, as in ``quantize_rows_triton``; y stays in registers between the maximum
and the codes, and beyond ONE_PASS_COLUMNS h is read and f computed twice.

With columns: the scale of a column needs all rows, so that two kernels run over tiles. The first takes the maxima of |y|
along both axes (as int32 bits, whose maximum depends on no order: atomics are deterministic); ``quantize_rows_columns``' own
makes the scales of them; the last computes y again, quantizes along both axes and writes the tile and its transpose. h is
read twice, y never stored.

f is computed in float32, in about 15 instructions: more would weigh against the memory (a GPU of 4 TB/s has some 20
instructions for an element of 3 bytes). silu and gelu_tanh are h * sigmoid, since (1 + tanh z) / 2 = sigmoid(2 z). Where
1 + exp passes 2^126 the sigmoid is flushed to 0: there |y| < 2^-100, whose code is 0 too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import activation_quantize as declaration
from qtrain_kernels.aot import Build
from qtrain_kernels.cast_triton import exp2, reciprocal, rounded
from qtrain_kernels.counter_hash_triton import key, row_keys
from qtrain_kernels.quantize_rows import MIN_SCALE
from qtrain_kernels.quantize_rows_columns_triton import EACH, NONE, SCALES_BLOCK, _scales_kernel
from qtrain_kernels.quantize_rows_triton import tile
from qtrain_kernels.rounding_triton import (
    FORBIDDEN_PTX,
    INT8,
    OPTIONS,
    codes,
    inverse_of,
    magnitude_bits,
    scale_of,
)

ONE_PASS_COLUMNS = 16384  # y in the registers of 16 warps
TILE = 64  # rows and columns of a tile: both copies are written in runs of 64 bytes
MAXIMA_TILE = {
    "STEPS": 16,
    "BLOCK_R": 16,
    "BLOCK_C": 256,
}  # 32 elements a thread; a row of a tile is one warp's


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """float32 -> float32; NaN stays NaN."""
    if ACTIVATION == "gelu":
        # h Phi(h) = max(h, 0) - |h| Phi(-|h|), and Phi(-|h|) = erfc(|h| / sqrt 2) / 2 = t p(t) exp(-h^2 / 2) with
        # t = 1 / (1 + 0.3275911 |h| / sqrt 2): Abramowitz and Stegun 7.1.26, |error| <= 0.75e-7; halved coefficients
        size = tl.abs(h)
        t = reciprocal(tl.fma(size, 0.23164189, 1.0))
        p = tl.fma(t, 0.5307027145, -0.7265760135)
        p = tl.fma(t, p, 0.7107068705)
        p = tl.fma(t, p, -0.142248368)
        p = tl.fma(t, p, 0.127414796)
        tail = t * p * exp2(h * h * -0.7213475204444817)  # log2(e) / 2
        y = tl.where(h < float("inf"), tl.where(h < 0.0, 0.0, h) - size * tail, h)
    elif ACTIVATION == "gelu_tanh":
        # -2 log2(e) sqrt(2 / pi) (h + 0.044715 h^3)
        e = exp2(h * tl.fma(h * h, -0.10294324, -2.302208198))
        y = h * reciprocal(1.0 + e)
    elif ACTIVATION == "silu":
        y = h * reciprocal(1.0 + exp2(h * -1.4426950408889634))  # log2(e)
    else:
        y = tl.where(h < 0.0, 0.0, h)
        if ACTIVATION == "relu2":
            y = y * y
    return y


@triton.jit
def _load_y(h_ptr, up_ptr, mask, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """y float32, rounded as eager PyTorch rounds it."""
    h = tl.load(h_ptr, mask=mask, other=0.0)
    y = rounded(activate(h.to(tl.float32), ACTIVATION), h.dtype)
    if GATED:
        up = tl.load(up_ptr, mask=mask, other=0.0).to(tl.float32)
        y = rounded(y * up, h.dtype)
    return y


@triton.jit(do_not_specialize=["qmax", "stream"])
def _activation_rows_kernel(
    h_ptr,
    up_ptr,
    codes_ptr,
    scale_ptr,
    seed_ptr,
    step_ptr,
    row_offset_ptr,
    R,
    C,
    stride_hr,
    stride_hc,
    stride_ur,
    stride_uc,
    qmax,
    stream,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_index = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = tl.expand_dims(row_index, 1)  # [BLOCK_R, 1]
    in_rows = row < R
    block = tl.expand_dims(tl.arange(0, BLOCK_C), 0).to(tl.int64)  # [1, BLOCK_C]
    h_row = h_ptr + row * stride_hr
    up_row = up_ptr + row * stride_ur
    codes_row = codes_ptr + row * C

    if ONE_PASS:
        mask = in_rows & (block < C)
        y = _load_y(h_row + block * stride_hc, up_row + block * stride_uc, mask, ACTIVATION, GATED)
        magnitude = magnitude_bits(y)
    else:
        magnitude = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            y = _load_y(h_row + column * stride_hc, up_row + column * stride_uc, mask, ACTIVATION, GATED)
            magnitude = tl.maximum(magnitude, magnitude_bits(y))
    scale = scale_of(tl.max(magnitude, axis=1), qmax, INT8)  # [BLOCK_R]
    tl.store(scale_ptr + row_index, scale, mask=row_index < R)
    inverse = tl.expand_dims(inverse_of(scale), 1)
    finite = inverse > 0.0
    if STOCHASTIC:
        k0, k1 = key(tl.load(seed_ptr), tl.load(step_ptr), stream)
        r0, r1 = row_keys(row + tl.load(row_offset_ptr), k0, k1)
    else:
        r0, r1 = 0, 0
    if ONE_PASS:
        code = tl.where(finite, codes(y, inverse, block, r0, r1, qmax, INT8, STOCHASTIC), 0)
        tl.store(codes_row + block, code.to(tl.int8), mask=mask)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            y = _load_y(h_row + column * stride_hc, up_row + column * stride_uc, mask, ACTIVATION, GATED)
            code = tl.where(finite, codes(y, inverse, column, r0, r1, qmax, INT8, STOCHASTIC), 0)
            tl.store(codes_row + column, code.to(tl.int8), mask=mask)


@triton.jit
def _activation_maxima_kernel(
    h_ptr,
    up_ptr,
    row_amax_ptr,
    column_amax_ptr,
    R,
    C,
    stride_hr,
    stride_hc,
    stride_ur,
    stride_uc,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """row_amax, column_amax: bits of the maximum of |y|, int32, zero before. A program goes down STEPS tiles: an atomic
    a column of all of them, and one a row of each."""
    across = tl.cdiv(C, BLOCK_C)
    first = (tl.program_id(0) // across).to(tl.int64) * (BLOCK_R * STEPS)
    column_index = (tl.program_id(0) % across).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.expand_dims(column_index, 0)
    magnitude = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
    for start in range(first, tl.minimum(first + BLOCK_R * STEPS, R), BLOCK_R):
        row_index = start + tl.arange(0, BLOCK_R)
        row = tl.expand_dims(row_index, 1)
        mask = (row < R) & (column < C)
        h = h_ptr + row * stride_hr + column * stride_hc
        up = up_ptr + row * stride_ur + column * stride_uc
        here = magnitude_bits(_load_y(h, up, mask, ACTIVATION, GATED))
        magnitude = tl.maximum(magnitude, here)
        if ROWS:
            tl.atomic_max(row_amax_ptr + row_index, tl.max(here, axis=1), mask=row_index < R, sem="relaxed")
    column_amax = tl.max(magnitude, axis=0)
    tl.atomic_max(column_amax_ptr + column_index, column_amax, mask=column_index < C, sem="relaxed")


@triton.jit(do_not_specialize=["row_qmax", "row_stream", "column_qmax", "column_stream"])
def _activation_both_kernel(
    h_ptr,
    up_ptr,
    row_inverse_ptr,
    column_inverse_ptr,
    row_codes_ptr,
    column_codes_ptr,
    seed_ptr,
    step_ptr,
    row_offset_ptr,
    R,
    C,
    stride_hr,
    stride_hc,
    stride_ur,
    stride_uc,
    row_qmax,
    row_stream,
    column_qmax,
    column_stream,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_STOCHASTIC: tl.constexpr,
    COLUMN_STOCHASTIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of both copies; an inverse is 0 where the scale is not finite."""
    along = tl.cdiv(C, BLOCK)
    row_tile, column_tile = tl.program_id(0) // along, tl.program_id(0) % along
    row_index = row_tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column_index = column_tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, column = tl.expand_dims(row_index, 1), tl.expand_dims(column_index, 0)
    mask = (row < R) & (column < C)
    h = h_ptr + row * stride_hr + column * stride_hc
    up = up_ptr + row * stride_ur + column * stride_uc
    y = _load_y(h, up, mask, ACTIVATION, GATED)

    seed, step, offset = 0, 0, 0
    if ROW_STOCHASTIC or COLUMN_STOCHASTIC:
        seed, step, offset = tl.load(seed_ptr), tl.load(step_ptr), tl.load(row_offset_ptr)
    r0, r1 = 0, 0
    if ROWS:
        inverse = tl.load(row_inverse_ptr + row, mask=row < R, other=0.0)
        if ROW_STOCHASTIC:
            k0, k1 = key(seed, step, row_stream)
            r0, r1 = row_keys(row + offset, k0, k1)
        code = codes(y, inverse, column, r0, r1, row_qmax, INT8, ROW_STOCHASTIC)
        code = tl.where(inverse > 0.0, code, 0)
        tl.store(row_codes_ptr + row * C + column, code.to(tl.int8), mask=mask)

    inverse = tl.load(column_inverse_ptr + column, mask=column < C, other=0.0)
    if COLUMN_STOCHASTIC:
        k0, k1 = key(seed, step, column_stream)
        r0, r1 = row_keys(row + offset, k0, k1)
    code = codes(y, inverse, column, r0, r1, column_qmax, INT8, COLUMN_STOCHASTIC)
    code = tl.where(inverse > 0.0, code, 0)
    transposed = tl.expand_dims(column_index, 1) * R + tl.expand_dims(row_index, 0)
    mask = (tl.expand_dims(column_index, 1) < C) & (tl.expand_dims(row_index, 0) < R)
    tl.store(column_codes_ptr + transposed, tl.trans(code.to(tl.int8)), mask=mask)


def launch(
    h: Tensor, up: Tensor | None, activation: str,
    row_qmax: int, row_stochastic: bool, row_stream: int,
    column_qmax: int, column_stochastic: bool, column_stream: int,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``activation_quantize.reference`` by one kernel, or by three with columns; nothing synchronizes."""
    arguments = (
        h, up, activation, row_qmax, row_stochastic, row_stream, column_qmax, column_stochastic, column_stream,
        seed, step, row_offset,
    )  # fmt: skip
    outputs = declaration._fake(*arguments)
    if h.numel() == 0:
        for scale in outputs[1::2]:
            scale.fill_(MIN_SCALE)
        return outputs
    (R, C), gate = h.shape, h if up is None else up
    strides = (*h.stride(), *gate.stride())
    what = {"ACTIVATION": activation, "GATED": up is not None}
    if column_qmax:
        sides = {"ROWS": EACH.value if row_qmax else NONE.value, "COLUMNS": EACH.value}
        amax = torch.zeros(R + C, dtype=torch.int32, device=h.device).split((R, C))
        inverse = torch.empty(R + C, dtype=torch.float32, device=h.device).split((R, C))
        strips = triton.cdiv(R, MAXIMA_TILE["STEPS"] * MAXIMA_TILE["BLOCK_R"])
        _activation_maxima_kernel[(strips * triton.cdiv(C, MAXIMA_TILE["BLOCK_C"]),)](
            h, gate, *amax, R, C, *strides, ROWS=row_qmax > 0, **what, **MAXIMA_TILE, **OPTIONS
        )
        _scales_kernel[(triton.cdiv(max(R, C), SCALES_BLOCK),)](
            *amax, *inverse, *outputs[1::2], R, C, row_qmax, column_qmax,
            ROW_FORMAT=INT8.value, COLUMN_FORMAT=INT8.value, BLOCK=SCALES_BLOCK, **sides, **OPTIONS,
        )  # fmt: skip
        _activation_both_kernel[(triton.cdiv(R, TILE) * triton.cdiv(C, TILE),)](
            h, gate, *inverse, *outputs[::2], seed, step, row_offset, R, C, *strides,
            row_qmax, row_stream, column_qmax, column_stream,
            ROWS=row_qmax > 0, ROW_STOCHASTIC=row_stochastic and row_qmax > 0, COLUMN_STOCHASTIC=column_stochastic,
            BLOCK=TILE, **what, **OPTIONS,
        )  # fmt: skip
    elif row_qmax:
        block = tile(C, ONE_PASS_COLUMNS)
        _activation_rows_kernel[(triton.cdiv(R, int(block["BLOCK_R"])),)](
            h, gate, *outputs[:2], seed, step, row_offset, R, C, *strides, row_qmax, row_stream,
            STOCHASTIC=row_stochastic, **what, **block, **OPTIONS,
        )  # fmt: skip
    return outputs


def builds() -> list[Build]:
    """Rows in registers and in a loop, each activation once, and the two kernels of tiles."""
    pointers = dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
    pointers |= {
        "h_ptr": "*bf16",
        "up_ptr": "*bf16",
        "row_inverse_ptr": "*fp32",
        "column_inverse_ptr": "*fp32",
    }
    strides = ("R", "C", "stride_hr", "stride_hc", "stride_ur", "stride_uc")
    contiguous = {"stride_hc": 1, "stride_uc": 1}
    aligned = ("h_ptr", "up_ptr", "C", "stride_hr", "stride_ur")

    def rows(C: int, activation: str, gated: bool, stochastic: bool, strided: bool = False) -> Build:
        block = tile(C, ONE_PASS_COLUMNS)
        options = {"num_warps": block.pop("num_warps"), **OPTIONS}
        form = f"{activation}{', gated' if gated else ''}, {'stochastic' if stochastic else 'nearest'}"
        return Build(
            f"rows of {C}, {form}{', any strides' if strided else ''}",
            _activation_rows_kernel,
            pointers
            | {"codes_ptr": "*i8", "scale_ptr": "*fp32"}
            | dict.fromkeys((*strides, "qmax", "stream"), "i32"),
            {"ACTIVATION": activation, "GATED": gated, "STOCHASTIC": stochastic, **block}
            | ({} if strided else contiguous),
            divisible_by_16=() if strided else (*aligned, "codes_ptr"),
            options=options,
            # f may use fma and fast division, but relu2 and the quantization after f may not
            forbidden_ptx=FORBIDDEN_PTX if activation == "relu2" else (),
            max_registers=254 if strided else 128,  # 64-bit addresses element by element
        )

    def tiles(name: str, kernel: Any, extra: dict[str, str], constants: dict[str, Any], *more: str) -> Build:
        return Build(
            f"{name}, gelu",
            kernel,
            pointers
            | {"row_amax_ptr": "*i32", "column_amax_ptr": "*i32", **extra}
            | dict.fromkeys(strides, "i32"),
            {"ACTIVATION": "gelu", "GATED": False, "ROWS": True, **contiguous, **constants},
            divisible_by_16=(*aligned, "R", *more),
            options={"num_warps": 4, **OPTIONS},
        )

    stored = {"row_codes_ptr": "*i8", "column_codes_ptr": "*i8"}
    scalars = dict.fromkeys(("row_qmax", "row_stream", "column_qmax", "column_stream"), "i32")
    stochastic = {"ROW_STOCHASTIC": True, "COLUMN_STOCHASTIC": True, "BLOCK": TILE}
    return [
        rows(4096, "gelu", False, False),
        rows(4096, "relu2", False, True),
        rows(16384, "gelu", False, True),
        rows(14336, "silu", True, True),
        rows(32768, "gelu_tanh", True, True),
        rows(32768, "silu", True, True, strided=True),
        tiles("maxima", _activation_maxima_kernel, {}, MAXIMA_TILE),
        tiles(
            "both", _activation_both_kernel, stored | scalars, stochastic, "row_codes_ptr", "column_codes_ptr"
        ),
    ]
