"""The Triton kernel of ``quantize_rows``: blocks of whole rows (``row_block_triton``); what is read twice comes mostly from L2.

What makes it bit-equal to the reference on every input is in ``rounding_triton``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import quantize_rows as declaration
from qtrain_kernels.aot import Build
from qtrain_kernels.rounding_triton import FORBIDDEN_PTX, INT8, OPTIONS, magnitude_bits
from qtrain_kernels.row_block_triton import keys_of_rows, rows_of_program, store_codes, store_scales, tile

ONE_PASS_COLUMNS = 8192


@triton.jit
def _load(x_row, fold_ptr, column, stride_xc, mask, C, FOLDED: tl.constexpr):
    x = tl.load(x_row + column * stride_xc, mask=mask, other=0.0).to(tl.float32)
    if FOLDED:
        x = x * tl.load(fold_ptr + column, mask=column < C, other=0.0)
    return x


@triton.jit(do_not_specialize=["qmax", "stream"])
def _quantize_rows_kernel(
    x_ptr,
    fold_ptr,
    codes_ptr,
    scale_ptr,
    seed_ptr,
    step_ptr,
    row_offset_ptr,
    R,
    C,
    stride_xr,
    stride_xc,
    qmax,
    stream,
    FORMAT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FOLDED: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_index, row, in_rows, block = rows_of_program(R, BLOCK_R, BLOCK_C)
    x_row = x_ptr + row * stride_xr
    codes_row = codes_ptr + row * C

    if ONE_PASS:
        mask = in_rows & (block < C)
        x = _load(x_row, fold_ptr, block, stride_xc, mask, C, FOLDED)
        magnitude = magnitude_bits(x)
    else:
        magnitude = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = _load(x_row, fold_ptr, column, stride_xc, mask, C, FOLDED)
            magnitude = tl.maximum(magnitude, magnitude_bits(x))
    inverse = store_scales(scale_ptr, magnitude, row_index, R, qmax, FORMAT)

    r0, r1 = keys_of_rows(seed_ptr, step_ptr, row_offset_ptr, stream, row, STOCHASTIC)
    if ONE_PASS:
        store_codes(codes_row + block, x, inverse, block, r0, r1, qmax, mask, FORMAT, STOCHASTIC)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            x = _load(x_row, fold_ptr, column, stride_xc, mask, C, FOLDED)
            store_codes(codes_row + column, x, inverse, column, r0, r1, qmax, mask, FORMAT, STOCHASTIC)


def launch(
    x: Tensor, qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor
) -> tuple[Tensor, Tensor]:
    """``quantize_rows.reference`` by one kernel; the scalars are read on the device, nothing synchronizes."""
    declaration.check(x, qmax, stochastic, seed, step, stream, row_offset)
    R, C = x.shape
    codes = torch.empty((R, C), dtype=torch.int8, device=x.device)
    scale = torch.empty((R,), dtype=torch.float32, device=x.device)
    quantize(x, None, codes, scale, qmax, INT8.value, stochastic, seed, step, stream, row_offset)
    return codes, scale


def quantize(
    x: Tensor, fold: Tensor | None, codes: Tensor, scale: Tensor, qmax: int, number_format: int, stochastic: bool,
    seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> None:  # fmt: skip
    """Write ``codes`` [R, C] int8 (the bytes of ``number_format``) and ``scale`` [R] of x * fold; ``fold`` [C] float32,
    contiguous, or None. The arguments are not checked."""
    R, C = x.shape
    if R == 0:
        return
    block = tile(C, ONE_PASS_COLUMNS)
    _quantize_rows_kernel[(triton.cdiv(R, int(block["BLOCK_R"])),)](
        x, fold, codes, scale, seed, step, row_offset, R, C, x.stride(0), x.stride(1), qmax, stream,
        FORMAT=number_format, STOCHASTIC=stochastic, FOLDED=fold is not None, **block, **OPTIONS,
    )  # fmt: skip


def builds() -> list[Build]:
    """The specialisations that are built ahead of time: rows in registers and rows in a loop, and any strides."""

    def build(
        name: str, C: int, stochastic: bool, dtype: str = "*bf16", contiguous: bool = True, number_format: int = INT8.value
    ) -> Build:  # fmt: skip
        block = tile(C, ONE_PASS_COLUMNS)
        options = {"num_warps": block.pop("num_warps"), **OPTIONS}
        types = {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}
        types |= dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
        types |= dict.fromkeys(("R", "C", "stride_xr", "stride_xc", "qmax", "stream"), "i32")
        return Build(
            name,
            _quantize_rows_kernel,
            types,
            {"FORMAT": number_format, "STOCHASTIC": stochastic, "FOLDED": False, "fold_ptr": None, **block}
            | ({"stride_xc": 1} if contiguous else {}),
            divisible_by_16=("x_ptr", "codes_ptr", "C", "stride_xr") if contiguous else (),
            options=options,
            forbidden_ptx=FORBIDDEN_PTX,
            max_registers=128 if contiguous else 254,  # 64-bit addresses element by element
        )

    return [
        build("one pass, nearest", 4096, False),
        build("one pass, stochastic", 4096, True),
        build("one pass, stochastic, 8192", 8192, True),
        build("loop, stochastic", 14336, True),
        build("short rows, nearest, fp32", 96, False, "*fp32"),
        build("loop, stochastic, any strides", 14336, True, contiguous=False),
    ]
