"""Native computation: the three GEMMs of a linear layer on int8 codes, with exact sums.

    fprop  y  = (xq . wq^T) s_x s_w^T + b      xq, wq   int8 codes of x [T, I] and W [O, I]
    dgrad  dx = (gq . wq') s_g s_w'^T          gq       of g [T, O] along its rows
    wgrad  dW = (gq'^T . xq') s_g' s_x'^T      gq'      of g along its columns (tokens are the contraction)

x, W and g are quantized as the simulated layer does, to the same codes with the same random bits
(``quantize_rows_columns``: g is read once for both of its GEMMs). The products are ``int8_scaled_mm``: int32 sums, then
scales and bias in float32, then one rounding. So native differs from simulated by the roundings of the latter's bf16
products, and errs against the oracle by float32 roundings and the one at the end.

With "fprop" the backward multiplies the forward's codes; their row scales are folded into g before it is quantized.
Saved for the backward: int8 codes of x (``saved="quantized"``; else x itself) and, where dgrad reuses them, of W.

T tokens, I in, O out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from qtrain_kernels.int8_scaled_mm import int8_scaled_mm
from qtrain_kernels.quantize_rows_columns import quantize_rows_columns
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtrain.quant import LinearRecipe

from .clock import Draws
from .gemm import GemmOperand, quantized_gemm
from .native_ops import missing_on, runs_natively


class Codes(NamedTuple):
    """int8 codes, K-major or as the forward's, and their scale: [rows], or [1] for the whole tensor."""

    codes: Tensor
    scale: Tensor


class _Side(NamedTuple):
    """Arguments of ``quantize_rows_columns`` for one copy."""

    qmax: int = 0
    stochastic: bool = False
    per_tensor: bool = False
    stream: int = 0
    fold: Tensor | None = None


class NativeGemms:
    """The three GEMMs of one layer at one moment, on codes."""

    def __init__(self, recipe: LinearRecipe, draws: Draws, dtype: torch.dtype) -> None:
        self.recipe, self.draws, self.dtype = recipe, draws, dtype

    def quantized(
        self, x: Tensor, rows: str | None, columns: str | None, row_fold: Tensor | None = None, column_fold: Tensor | None = None
    ) -> tuple[Codes, Codes]:  # fmt: skip
        """x as the operand ``rows`` [R, C] and, transposed, as the operand ``columns`` [C, R]."""
        weight = (rows or columns or "").endswith("weight")
        counters, row_side = self._side(rows, row_fold, weight, x.device)
        more, column_side = self._side(columns, column_fold, weight, x.device)
        counters = more if rows is None or not row_side.stochastic else counters
        outputs = quantize_rows_columns(x, *row_side, *column_side, *counters)
        return self._codes(outputs[:2], rows), self._codes(outputs[2:], columns)

    def _side(
        self, operand: str | None, fold: Tensor | None, weight: bool, device: torch.device
    ) -> tuple[tuple[Tensor, Tensor, Tensor], _Side]:
        zero = torch.zeros((), dtype=torch.int64, device=device)
        if operand is None:
            return (zero, zero, zero), _Side()
        spec = self.recipe.resolved(operand)
        assert spec is not None
        qmax, per_tensor = int(spec.number_format.max), spec.granularity == "tensor"
        if not spec.stochastic:
            return (zero, zero, zero), _Side(qmax, False, per_tensor, 0, fold)
        seed, step, stream, offset = self.draws.words(operand)
        return (seed, step, zero if weight else offset), _Side(qmax, True, per_tensor, stream, fold)

    def _codes(self, outputs: tuple[Tensor, ...], operand: str | None) -> Codes:
        codes, scale = outputs
        if operand is not None:
            spec = self.recipe.resolved(operand)
            assert spec is not None
            if spec.granularity == "tensor" and scale.shape[0]:
                scale = scale[:1]
        return Codes(codes, scale)

    def fprop(
        self, x: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Codes | None, Codes | None]:
        """x [T, I] -> y [T, O], and the codes of x and W where they are quantized."""
        if not runs_natively(self.recipe, "fprop"):
            return self._high_precision(x, weight, self.dtype, bias), None, None
        xq, _ = self.quantized(x, "fprop.input", None)
        wq, _ = self.quantized(weight, "fprop.weight", None)
        return int8_scaled_mm(xq.codes, wq.codes, xq.scale, wq.scale, bias, self.dtype), xq, wq

    def _high_precision(self, a: Tensor, b: Tensor, out: torch.dtype, bias: Tensor | None = None) -> Tensor:
        return quantized_gemm(
            GemmOperand(a.to(self.dtype), None), GemmOperand(b.to(self.dtype), None), out, bias
        )

    def kept_of_input(
        self, x: Tensor, xq: Codes | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """(x, None, None), or (None, codes, scale) of wgrad.input."""
        if self.recipe.saved == "high_precision":
            return (x.to(self.dtype) if self.recipe.wgrad.input is None else x), None, None
        if self.recipe.wgrad.input == "fprop":
            assert xq is not None
            return None, *xq
        return None, *self.quantized(x, None, "wgrad.input")[1]

    def dgrad_weight(self, weight: Tensor, reused: Codes | None) -> tuple[Codes, Tensor | None]:
        """W as [I, O], and what is to be multiplied into g [T, O] before it is quantized: [O] or None."""
        if reused is None:
            return self.quantized(weight, None, "dgrad.weight")[1], None
        return _turned(reused)

    def wgrad_input(self, kept: list[Tensor | None]) -> tuple[Codes, Tensor | None]:
        """x as [I, T], and what is to be multiplied into g [T, O]: [T] or None."""
        x, codes, scale = kept
        reuse = self.recipe.wgrad.input == "fprop"
        if x is not None:
            rows, columns = ("fprop.input", None) if reuse else (None, "wgrad.input")
            found = self.quantized(x, rows, columns)
            entered = found[0] if reuse else found[1]
        else:
            assert codes is not None
            assert scale is not None
            entered = Codes(codes, scale)
        return _turned(entered) if reuse else (entered, None)

    def backward(
        self, g: Tensor, weight: Tensor, reused: Codes | None, kept: list[Tensor | None], needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """g [T, O] -> dx [T, I], dW [O, I], each where it is needed."""
        native = {gemm: need and runs_natively(self.recipe, gemm) for gemm, need in zip(("dgrad", "wgrad"), needs, strict=True)}  # fmt: skip
        dx = dw = w_fold = x_fold = None
        if native["dgrad"]:
            w, w_fold = self.dgrad_weight(weight, reused)
        elif needs[0]:
            dx = self._high_precision(g, weight.t(), self.dtype)
        if native["wgrad"]:
            x, x_fold = self.wgrad_input(kept)
        elif needs[1]:
            assert kept[0] is not None
            dw = self._high_precision(g.t(), kept[0].t(), torch.float32)
        if any(native.values()):
            rows, columns = self.quantized(
                g,
                "dgrad.grad_output" if native["dgrad"] else None,
                "wgrad.grad_output" if native["wgrad"] else None,
                w_fold,
                x_fold,
            )
            if native["dgrad"]:
                dx = int8_scaled_mm(
                    rows.codes, w.codes, rows.scale, _unless(w_fold, w.scale), None, self.dtype
                )
            if native["wgrad"]:
                dw = int8_scaled_mm(
                    columns.codes, x.codes, columns.scale, _unless(x_fold, x.scale), None, torch.float32
                )
        return dx, dw


def _turned(forward: Codes) -> tuple[Codes, Tensor | None]:
    """The forward's codes [F, K] as [K, F], and the scale per row that the other operand takes over. One scale for the
    whole tensor stays."""
    return Codes(forward.codes.t(), forward.scale), None if forward.scale.shape[0] == 1 else forward.scale


def _unless(folded: Tensor | None, scale: Tensor) -> Tensor | None:
    return scale if folded is None else None


class NativeLinear(torch.autograd.Function):
    """y = x W^T + b with its gradients. Arguments as those of the simulated layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        counters: Tensor | None,
        recipe: LinearRecipe,
        stream: int,
        dtype: torch.dtype,
        trains: bool,
    ) -> Tensor:
        if missing := missing_on(x.device.type, recipe):
            raise RuntimeError(f"compute=native: {missing}: pass recipe.compute=simulated")
        counters = None if counters is None else counters.clone()
        with torch.autocast(x.device.type, enabled=False):
            gemms = NativeGemms(recipe, Draws(counters, stream), dtype)
            x2 = x.reshape(-1, x.shape[-1])
            y, xq, wq = gemms.fprop(x2, weight, bias)
            reused = wq if recipe.dgrad.weight == "fprop" else None
            kept = gemms.kept_of_input(x2, xq) if trains else (None,) * 3
            ctx.save_for_backward(weight, counters, *(reused or (None, None)), *kept)
        ctx.recipe, ctx.stream, ctx.dtype = recipe, stream, dtype
        ctx.x_shape, ctx.x_dtype, ctx.has_bias = x.shape, x.dtype, bias is not None
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, counters, w_codes, w_scale, *kept = ctx.saved_tensors
        with torch.autocast(weight.device.type, enabled=False):
            gemms = NativeGemms(ctx.recipe, Draws(counters, ctx.stream), ctx.dtype)
            g = grads[0].reshape(-1, weight.shape[0])
            reused = None if w_codes is None else Codes(w_codes, w_scale)
            needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
            dx, dw = gemms.backward(g, weight, reused, kept, needs)
            dx = None if dx is None else dx.to(ctx.x_dtype).reshape(ctx.x_shape)
            dw = None if dw is None else dw.to(weight.dtype)
            needs_bias = ctx.has_bias and ctx.needs_input_grad[2]
            db = g.to(torch.float32).sum(0).to(weight.dtype) if needs_bias else None
        return dx, dw, db, None, None, None, None, None
