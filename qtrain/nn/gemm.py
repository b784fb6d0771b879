"""quantized_gemm: the one door to the GEMM kernels, and how operands come to it.

    y [M, N] = (a.values [M, K] @ b.values [N, K]^T) * a.scale [M, 1] * b.scale [N, 1]^T

Where the scales of an operand do not lie on the contraction, ``values`` are grid values (integers or small
floats, exact in bfloat16) and the scales multiply the product: what low-precision hardware computes, in an
ordinary GEMM. Where they do lie on it (groups, columns), or the levels are no bfloat16 numbers (codebooks),
``values`` are the dequantized numbers and there is no scale.

Error against the oracle (fp32 grid values . grid values, then scales): each rounding to bfloat16 contributes at
most 2^-8 relative: of the product, of the scaled result, and of each operand that enters dequantized.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtrain.quant import QuantSpec, dequantize_values


class GemmOperand(NamedTuple):
    """values: [F, K] in the compute dtype. scale: float32 [F, 1] or [1, 1], or None."""

    values: Tensor
    scale: Tensor | None


def multiplies_codes(spec: QuantSpec) -> bool:
    """Whether operands of this spec enter a GEMM as grid values, their scales in its epilogue."""
    return spec.folds and spec.number_format.exact_in_bf16


def enter(values: Tensor, scale: Tensor, spec: QuantSpec, dtype: torch.dtype) -> GemmOperand:
    """An operand on its grid (values [F, K], scale [F/r, K/c], float32) -> as it enters a GEMM."""
    if multiplies_codes(spec):
        return GemmOperand(values.to(dtype), scale)
    return GemmOperand(dequantize_values(values, scale, spec).to(dtype), None)


def enter_transposed(entered: GemmOperand, *, fold: bool) -> tuple[GemmOperand, Tensor | None]:
    """The forward's operand [F, K] as the [K, F] operand of another GEMM, and what to multiply into the other
    operand's contraction: [1, F] or None.

    With ``fold`` (the other operand is going to be quantized after that multiplication) codes stay codes;
    without, a scale per row has nowhere to go and the operand is dequantized. One scale for the whole tensor
    always factors out.
    """
    values, scale = entered
    if scale is None or scale.numel() == 1:
        return GemmOperand(values.t(), scale), None
    if fold:
        return GemmOperand(values.t(), None), scale.t()
    return GemmOperand((values.to(torch.float32) * scale).to(values.dtype).t(), None), None


def quantized_gemm(
    a: GemmOperand, b: GemmOperand, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """[M, N] in ``out_dtype``; bias: [N], added in float32. An empty contraction sums to zero: its operands have
    no scales. Raises ValueError where dtypes or shapes differ."""
    if a.values.dtype != b.values.dtype or a.values.shape[1] != b.values.shape[1]:
        raise ValueError(
            f"operands {tuple(a.values.shape)} {a.values.dtype} and {tuple(b.values.shape)} {b.values.dtype}: a "
            "GEMM needs one dtype and one contraction length"
        )
    product = a.values @ b.values.t()
    if a.scale is None and b.scale is None and bias is None:
        return product.to(out_dtype)
    y = product.to(torch.float32)
    if a.scale is not None and a.scale.numel():
        y = y * a.scale
    if b.scale is not None and b.scale.numel():
        y = y * b.scale.t()
    if bias is not None:
        y = y + bias.to(torch.float32)
    return y.to(out_dtype)
