"""The Triton kernels of ``activation_quantize``.

Rows alone: blocks of whole rows (``row_block_triton``); beyond ONE_PASS_COLUMNS h is read and f computed twice. With columns,
whose scales need all rows: the kernels of ``quantize_rows_columns_triton``, which compute f of what they load. h is read twice
there, y never stored.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import activation_quantize as declaration
from qtrain_kernels import quantize_rows_columns_triton as rows_columns
from qtrain_kernels.activation_triton import load
from qtrain_kernels.aot import Build
from qtrain_kernels.rounding_triton import FORBIDDEN_PTX, INT8, OPTIONS, magnitude_bits
from qtrain_kernels.row_block_triton import keys_of_rows, rows_of_program, store_codes, store_scales, tile

ONE_PASS_COLUMNS = 16384  # y in the registers of 16 warps


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
    qmax,
    stream,
    ACTIVATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_index, row, in_rows, block = rows_of_program(R, BLOCK_R, BLOCK_C)
    h_row = row * stride_hr
    codes_row = codes_ptr + row * C

    if ONE_PASS:
        mask = in_rows & (block < C)
        y = load(h_ptr, up_ptr, h_row, block * stride_hc, mask, ACTIVATION)
        magnitude = magnitude_bits(y)
    else:
        magnitude = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            y = load(h_ptr, up_ptr, h_row, column * stride_hc, mask, ACTIVATION)
            magnitude = tl.maximum(magnitude, magnitude_bits(y))
    inverse = store_scales(scale_ptr, magnitude, row_index, R, qmax, INT8)
    r0, r1 = keys_of_rows(seed_ptr, step_ptr, row_offset_ptr, stream, row, STOCHASTIC)
    if ONE_PASS:
        store_codes(codes_row + block, y, inverse, block, r0, r1, qmax, mask, INT8, STOCHASTIC)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            y = load(h_ptr, up_ptr, h_row, column * stride_hc, mask, ACTIVATION)
            store_codes(codes_row + column, y, inverse, column, r0, r1, qmax, mask, INT8, STOCHASTIC)


def launch(
    h: Tensor, up: Tensor | None, activation: str,
    row_qmax: int, row_stochastic: bool, row_stream: int,
    column_qmax: int, column_stochastic: bool, column_stream: int,
    seed: Tensor, step: Tensor, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``activation_quantize.reference`` by one kernel, or by three with columns; nothing synchronizes. h and up of different
    strides are copied first."""
    arguments = (
        h, up, activation, row_qmax, row_stochastic, row_stream, column_qmax, column_stochastic, column_stream,
        seed, step, row_offset,
    )  # fmt: skip
    outputs = declaration._fake(*arguments)  # checks them, too
    if up is not None and up.stride() != h.stride():
        h, up = h.contiguous(), up.contiguous()
    R, C = h.shape
    if column_qmax or h.numel() == 0:
        rows = rows_columns.Side(row_qmax, INT8.value, row_stochastic, False, row_stream, None)
        columns = rows_columns.Side(column_qmax, INT8.value, column_stochastic, False, column_stream, None)
        rows_columns.quantize(
            h, rows, columns, (seed, step, row_offset), outputs, activation=activation, up=up
        )
    elif row_qmax:
        block = tile(C, ONE_PASS_COLUMNS)
        _activation_rows_kernel[(triton.cdiv(R, int(block["BLOCK_R"])),)](
            h, up, *outputs[:2], seed, step, row_offset, R, C, *h.stride(), row_qmax, row_stream,
            ACTIVATION=activation, STOCHASTIC=row_stochastic, **block, **OPTIONS,
        )  # fmt: skip
    return outputs


def builds() -> list[Build]:
    """Rows in registers and in a loop, each activation once; both copies gated and not."""
    types = {"h_ptr": "*bf16", "up_ptr": "*bf16", "codes_ptr": "*i8", "scale_ptr": "*fp32"}
    types |= dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
    types |= dict.fromkeys(("R", "C", "stride_hr", "stride_hc", "qmax", "stream"), "i32")

    def rows(C: int, activation: str, gated: bool, stochastic: bool, strided: bool = False) -> Build:
        block: dict[str, Any] = tile(C, ONE_PASS_COLUMNS)
        options = {"num_warps": block.pop("num_warps"), **OPTIONS}
        form = f"{activation}{', gated' if gated else ''}, {'stochastic' if stochastic else 'nearest'}"
        constants = {"ACTIVATION": activation, "STOCHASTIC": stochastic, **block}
        constants |= ({} if gated else {"up_ptr": None}) | ({} if strided else {"stride_hc": 1})
        aligned = ("h_ptr", *(("up_ptr",) if gated else ()), "codes_ptr", "C", "stride_hr")
        return Build(
            f"rows of {C}, {form}{', any strides' if strided else ''}",
            _activation_rows_kernel,
            types,
            constants,
            divisible_by_16=() if strided else aligned,
            options=options,
            # f may use fma and fast division, but relu2 and the quantization after f may not
            forbidden_ptx=FORBIDDEN_PTX if activation == "relu2" else (),
            max_registers=254 if strided else 128,  # 64-bit addresses element by element
        )

    stochastic = {"ROWS_STOCHASTIC": True, "COLUMNS_STOCHASTIC": True}
    both = rows_columns.activation_builds
    return [
        rows(4096, "gelu", False, False),
        rows(4096, "relu2", False, True),
        rows(16384, "gelu", False, True),
        rows(14336, "silu", True, True),
        rows(32768, "gelu_tanh", True, True),
        rows(32768, "silu", True, True, strided=True),
        *both("gelu", gated=False),
        *both("silu", gated=True, **stochastic),
    ]
