"""The Triton kernel of ``norm_quantize``: blocks of whole rows (``row_block_triton``).

A row of up to ONE_PASS_COLUMNS stays in registers from its one reading to its codes: sum, sum of squares and maximum are
reductions of registers. Longer rows are read three times (four by LayerNorm), after the first mostly from L2.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qtrain_kernels import norm_quantize as declaration
from qtrain_kernels.aot import Build
from qtrain_kernels.cast_triton import rounded
from qtrain_kernels.rounding_triton import FORBIDDEN_PTX, INT8, OPTIONS, magnitude_bits
from qtrain_kernels.row_block_triton import keys_of_rows, rows_of_program, store_codes, store_scales, tile

ONE_PASS_COLUMNS = 16384  # the row in the registers of 16 warps


@triton.jit
def _centred(x_ptr, mean, mask):
    """x - mean, 0 beyond the row, float32."""
    return tl.where(mask, tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32) - mean, 0.0)


@triton.jit
def _normalized(d, rstd, weight_ptr, bias_ptr, mask, dtype: tl.constexpr, BIASED: tl.constexpr):
    """y float32, rounded to ``dtype``; 0 beyond the row."""
    y = d * rstd * tl.load(weight_ptr, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        y = y + tl.load(bias_ptr, mask=mask, other=0.0).to(tl.float32)
    return rounded(y, dtype)


@triton.jit
def _rstd(sum_of_squares, length, eps):
    variance = tl.math.div_rn(sum_of_squares, length)
    return tl.math.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.math.sqrt_rn(variance + eps))


@triton.jit(do_not_specialize=["eps", "qmax", "stream"])
def _norm_quantize_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    codes_ptr,
    scale_ptr,
    rstd_ptr,
    mean_ptr,
    seed_ptr,
    step_ptr,
    row_offset_ptr,
    R,
    C,
    stride_xr,
    stride_xc,
    eps,
    qmax,
    stream,
    LAYER_NORM: tl.constexpr,
    BIASED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row_index, row, in_rows, block = rows_of_program(R, BLOCK_R, BLOCK_C)
    x_row = x_ptr + row * stride_xr
    codes_row = codes_ptr + row * C
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    length = tl.zeros([BLOCK_R], tl.float32) + C  # not C.to(): it is a plain int where specialised to 1
    mean = tl.zeros([BLOCK_R], tl.float32)
    mask = in_rows & (block < C)

    if ONE_PASS:
        d = _centred(x_row + block * stride_xc, 0.0, mask)
        if LAYER_NORM:
            mean = tl.math.div_rn(tl.sum(d, axis=1), length)
            d = tl.where(mask, d - tl.expand_dims(mean, 1), 0.0)
        rstd = _rstd(tl.sum(d * d, axis=1), length, eps)
        y = _normalized(d, tl.expand_dims(rstd, 1), weight_ptr + block, bias_ptr + block, mask, dtype, BIASED)
        magnitude = magnitude_bits(y)
    else:
        total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if LAYER_NORM:
            for start in range(0, C, BLOCK_C):
                column = start + block
                total += _centred(x_row + column * stride_xc, 0.0, in_rows & (column < C))
            mean = tl.math.div_rn(tl.sum(total, axis=1), length)
            total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        for start in range(0, C, BLOCK_C):
            column = start + block
            d = _centred(x_row + column * stride_xc, tl.expand_dims(mean, 1), in_rows & (column < C))
            total += d * d
        rstd = _rstd(tl.sum(total, axis=1), length, eps)
        magnitude = tl.zeros([BLOCK_R, BLOCK_C], tl.int32)
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            d = _centred(x_row + column * stride_xc, tl.expand_dims(mean, 1), mask)
            y = _normalized(
                d, tl.expand_dims(rstd, 1), weight_ptr + column, bias_ptr + column, mask, dtype, BIASED
            )
            magnitude = tl.maximum(magnitude, magnitude_bits(y))
    inverse = store_scales(scale_ptr, magnitude, row_index, R, qmax, INT8)
    tl.store(rstd_ptr + row_index, rstd, mask=row_index < R)
    if LAYER_NORM:
        tl.store(mean_ptr + row_index, mean, mask=row_index < R)
    r0, r1 = keys_of_rows(seed_ptr, step_ptr, row_offset_ptr, stream, row, STOCHASTIC)
    if ONE_PASS:
        store_codes(codes_row + block, y, inverse, block, r0, r1, qmax, mask, INT8, STOCHASTIC)
    else:
        for start in range(0, C, BLOCK_C):
            column = start + block
            mask = in_rows & (column < C)
            d = _centred(x_row + column * stride_xc, tl.expand_dims(mean, 1), mask)
            y = _normalized(
                d, tl.expand_dims(rstd, 1), weight_ptr + column, bias_ptr + column, mask, dtype, BIASED
            )
            store_codes(codes_row + column, y, inverse, column, r0, r1, qmax, mask, INT8, STOCHASTIC)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool,
    qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``norm_quantize.reference`` by one kernel; nothing synchronizes. Strided weights are copied first."""
    outputs = declaration._fake(
        x, weight, bias, eps, layer_norm, qmax, stochastic, seed, step, stream, row_offset
    )
    R, C = x.shape
    if R == 0:
        return outputs
    weight = weight.contiguous()
    block = tile(C, ONE_PASS_COLUMNS)
    _norm_quantize_kernel[(triton.cdiv(R, int(block["BLOCK_R"])),)](
        x, weight, weight if bias is None else bias.contiguous(), *outputs, seed, step, row_offset,
        R, C, x.stride(0), x.stride(1), eps, qmax, stream,
        LAYER_NORM=layer_norm, BIASED=bias is not None, STOCHASTIC=stochastic, **block, **OPTIONS,
    )  # fmt: skip
    return outputs


def builds() -> list[Build]:
    """Both norms, rows in registers and in a loop, and any strides."""

    def build(C: int, layer_norm: bool, stochastic: bool, strided: bool = False) -> Build:
        block: dict[str, Any] = tile(C, ONE_PASS_COLUMNS)
        options = {"num_warps": block.pop("num_warps"), **OPTIONS}
        types = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr"), "*bf16") | {
            "codes_ptr": "*i8",
            "eps": "fp32",
        }
        types |= dict.fromkeys(("scale_ptr", "rstd_ptr", "mean_ptr"), "*fp32")
        types |= dict.fromkeys(("seed_ptr", "step_ptr", "row_offset_ptr"), "*i64")
        types |= dict.fromkeys(("R", "C", "stride_xr", "stride_xc", "qmax", "stream"), "i32")
        kind, rounding = "layernorm" if layer_norm else "rmsnorm", "stochastic" if stochastic else "nearest"
        return Build(
            f"{kind} of {C}, {rounding}{', any strides' if strided else ''}",
            _norm_quantize_kernel,
            types,
            {"LAYER_NORM": layer_norm, "BIASED": layer_norm, "STOCHASTIC": stochastic, **block}
            | ({} if strided else {"stride_xc": 1}),
            divisible_by_16=()
            if strided
            else ("x_ptr", "weight_ptr", "bias_ptr", "codes_ptr", "C", "stride_xr"),
            options=options,
            forbidden_ptx=FORBIDDEN_PTX,
            max_registers=254 if strided else 128,  # 64-bit addresses element by element
        )

    return [
        build(768, True, False),
        build(4096, False, True),
        build(16384, False, False),
        build(16384, True, True),
        build(32768, False, True),
        build(32768, True, True, strided=True),
    ]
