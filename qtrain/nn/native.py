"""Native computation: the three GEMMs of a linear layer on codes, int8 with exact sums or fp8.

    fprop  y  = (xq . wq^T) s_x s_w^T + b      xq, wq   codes of x [T, I] and W [O, I]
    dgrad  dx = (gq . wq') s_g s_w'^T          gq       of g [T, O] along its rows
    wgrad  dW = (gq'^T . xq') s_g' s_x'^T      gq'      of g along its columns (tokens are the contraction)

x, W and g are quantized as the simulated layer does, to the same codes with the same random bits
(``quantize_rows_columns`` and its fp8 twin: g is read once for both of its GEMMs). The products are ``int8_scaled_mm``: int32
sums, then scales and bias in float32, then one rounding; or ``fp8_scaled_mm``, whose sums are those of its tensor cores. So
native differs from simulated by the roundings of the latter's bf16 products, and errs against the oracle by float32
roundings and the one at the end; fp8 by its sums too.

With "fprop" the backward multiplies the forward's codes; their row scales are folded into g before it is quantized.
Saved for the backward: codes of x (``saved="quantized"``; else x itself), one set for all layers that read it
(``shared_codes``); with a prologue what x is computed from, and nothing of x. Nothing of W, which is at hand: where dgrad
reuses the forward's codes, they are made again, with the same random bits.

T tokens, I in, O out.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from qtrain_kernels.fp8_scaled_mm import fp8_scaled_mm
from qtrain_kernels.int8_scaled_mm import int8_scaled_mm
from qtrain_kernels.quantize_fp8_rows_columns import quantize_fp8_rows_columns
from qtrain_kernels.quantize_rows_columns import quantize_rows_columns
from torch import Tensor
from torch.autograd.function import once_differentiable

from .clock import Draws
from .gemm import GemmOperand, quantized_gemm
from .native_ops import NativeSteps, OperandSteps, no_counters, run
from .prologue import Prologue
from .shared_codes import SharedCodes


class Codes(NamedTuple):
    """int8 or fp8 codes, K-major or as the forward's, and their scale: [rows], or [1] for the whole tensor."""

    codes: Tensor
    scale: Tensor


Kept = tuple[Tensor | None, Tensor | None, Tensor | None]


class NativeGemms:
    """The three GEMMs of one layer at one moment, on codes."""

    def __init__(
        self, steps: NativeSteps, draws: Draws, dtype: torch.dtype, shared: SharedCodes | None = None
    ) -> None:
        self.steps, self.draws, self.dtype, self.shared = steps, draws, dtype, shared

    def quantized(
        self, x: Tensor, rows: str | None, columns: str | None, row_fold: Tensor | None = None, column_fold: Tensor | None = None,
        *, again: bool = False,
    ) -> tuple[Codes, Codes]:  # fmt: skip
        """x as the operand ``rows`` [R, C] and, transposed, as the operand ``columns`` [C, R]. again: in the backward,
        what the forward quantized (``OperandSteps.nothing``)."""
        row, column = (None if name is None else self.steps.operands[name] for name in (rows, columns))
        one = row or column
        assert one is not None
        if row is not None and column is not None and row.kind != column.kind:
            alone = self.quantized(x, None, columns, None, column_fold)
            return self.quantized(x, rows, None, row_fold)[0], alone[1]
        nothing = one.nothing(again=again)
        counters, row_side = self._side(rows, row, nothing, row_fold, x.device)
        more, column_side = self._side(columns, column, nothing, column_fold, x.device)
        counters = counters or more or no_counters(x.device)
        quantize = quantize_rows_columns if one.kind == "int8" else quantize_fp8_rows_columns
        codes, scale, column_codes, column_scale = run(quantize, x, *row_side, *column_side, *counters)
        if row is not None and row.per_tensor:
            scale = scale[:1]
        if column is not None and column.per_tensor:
            column_scale = column_scale[:1]
        return Codes(codes, scale), Codes(column_codes, column_scale)

    def _side(
        self, name: str | None, operand: OperandSteps | None, nothing: tuple[Any, ...], fold: Tensor | None, device: torch.device
    ) -> tuple[tuple[Tensor, Tensor, Tensor] | None, tuple[Any, ...]]:  # fmt: skip
        """The counters, if it draws, and the op's arguments for one copy."""
        if name is None or operand is None:
            return None, nothing
        if not operand.stochastic:
            return None, (operand.grid, False, operand.per_tensor, 0, fold)
        seed, step, stream, offset = self.draws.words(name)
        if name.endswith("weight"):
            offset = no_counters(device)[2]
        return (seed, step, offset), (operand.grid, True, operand.per_tensor, stream, fold)

    def of_input(
        self, x: Tensor, rows: str | None, columns: str | None, weight: Tensor, passage: str
    ) -> tuple[Codes, Codes]:
        """``quantized`` of x [T, I], which other layers may have read before. weight, passage: whose, and in which of
        forward and backward it is read."""
        if self.shared is None:
            return self.quantized(x, rows, columns)
        specs = tuple(None if name is None else self.steps.operands[name].spec for name in (rows, columns))
        reader = (weight.data_ptr(), passage)
        return self.shared.of(x, specs, lambda: self.quantized(x, rows, columns), reader)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, keep: bool) -> tuple[Tensor, Kept]:
        """x [T, I] -> y [T, O], and of x what the backward needs if ``keep``: (x, None, None), or (None, codes, scale) of
        wgrad.input, made in the same read of x as those of fprop."""
        steps = self.steps
        own = keep and steps.own_input
        xq = columns = None
        if steps.fprop or own:
            rows = "fprop.input" if steps.fprop else None
            xq, columns = self.of_input(x, rows, "wgrad.input" if own else None, weight, "forward")
        if steps.fprop:
            assert xq is not None
            wq, _ = self.quantized(weight, "fprop.weight", None)
            y = _multiplied(xq.codes, wq.codes, xq.scale, wq.scale, bias, self.dtype)
        else:
            y = self._high_precision(x, weight, self.dtype, bias)
        if not keep:
            return y, (None, None, None)
        if steps.keeps_codes:
            kept = columns if own else xq
            assert kept is not None
            return y, (None, *kept)
        return y, (x.to(self.dtype) if steps.plain_wgrad else x, None, None)

    def _high_precision(self, a: Tensor, b: Tensor, out: torch.dtype, bias: Tensor | None = None) -> Tensor:
        return quantized_gemm(
            GemmOperand(a.to(self.dtype), None), GemmOperand(b.to(self.dtype), None), out, bias
        )

    def dgrad_weight(self, weight: Tensor) -> tuple[Codes, Tensor | None]:
        """W as [I, O], and what is to be multiplied into g [T, O] before it is quantized: [O] or None."""
        if not self.steps.reuses_weight:
            return self.quantized(weight, None, "dgrad.weight")[1], None
        if self.steps.operands["fprop.weight"].per_tensor:
            # One scale: the codes along columns are those along rows, and lie as dgrad reads them
            return self.quantized(weight, None, "fprop.weight")[1], None
        return _turned(self.quantized(weight, "fprop.weight", None, again=True)[0])

    def wgrad_input(self, kept: Kept, weight: Tensor) -> tuple[Codes, Tensor | None]:
        """x as [I, T], and what is to be multiplied into g [T, O]: [T] or None."""
        x, codes, scale = kept
        reuse = self.steps.reuses_input
        if x is not None:
            rows, columns = ("fprop.input", None) if reuse else (None, "wgrad.input")
            found = self.of_input(x, rows, columns, weight, "backward")
            entered = found[0] if reuse else found[1]
        else:
            assert codes is not None
            assert scale is not None
            entered = Codes(codes, scale)
        return _turned(entered) if reuse else (entered, None)

    def backward(
        self, g: Tensor, weight: Tensor, kept: Kept, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """g [T, O] -> dx [T, I], dW [O, I], each where it is needed."""
        dgrad, wgrad = needs[0] and self.steps.dgrad, needs[1] and self.steps.wgrad
        dx = dw = w_fold = x_fold = None
        if dgrad:
            w, w_fold = self.dgrad_weight(weight)
        elif needs[0]:
            dx = self._high_precision(g, weight.t(), self.dtype)
        if wgrad:
            x, x_fold = self.wgrad_input(kept, weight)
        elif needs[1]:
            assert kept[0] is not None
            dw = self._high_precision(g.t(), kept[0].t(), torch.float32)
        if dgrad or wgrad:
            rows, columns = self.quantized(
                g,
                "dgrad.grad_output" if dgrad else None,
                "wgrad.grad_output" if wgrad else None,
                w_fold,
                x_fold,
            )
        if dgrad:
            dx = _multiplied(rows.codes, w.codes, rows.scale, _unless(w_fold, w.scale), None, self.dtype)
        if wgrad:
            # The one rounding, where the weight is stored in bfloat16
            out = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
            dw = _multiplied(columns.codes, x.codes, columns.scale, _unless(x_fold, x.scale), None, out)
        return dx, dw


def _multiplied(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor | None,
    b_scale: Tensor | None,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    multiply = int8_scaled_mm if a.dtype == torch.int8 else fp8_scaled_mm
    return run(multiply, a, b, a_scale, b_scale, bias, dtype)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Entering torch.autocast takes as long as a small kernel, and in a backward it is off already."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _turned(forward: Codes) -> tuple[Codes, Tensor | None]:
    """The forward's codes [F, K] as [K, F], and the scale per row that the other operand takes over. One scale for the
    whole tensor stays."""
    return Codes(forward.codes.t(), forward.scale), None if forward.scale.shape[0] == 1 else forward.scale


def _unless(folded: Tensor | None, scale: Tensor) -> Tensor | None:
    return scale if folded is None else None


class NativeLinear(torch.autograd.Function):
    """y = x W^T + b with its gradients; x = f(h) or f(h) * up where there is a prologue, else h. Arguments as those of
    the simulated layer, but for ``steps`` in the place of the recipe."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        up: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        counters: Tensor | None,
        steps: NativeSteps,
        stream: int,
        dtype: torch.dtype,
        trains: bool,
        prologue: Prologue | None,
        shared: SharedCodes | None,
    ) -> Tensor:
        counters = None if counters is None else counters.clone()
        with _without_autocast(h.device.type):
            x = h if prologue is None else prologue.value(h, up)
            gemms = NativeGemms(steps, Draws(counters, stream), dtype, shared if prologue is None else None)
            x2 = x.reshape(-1, x.shape[-1])
            y, kept = gemms.forward(x2, weight, bias, keep=trains and prologue is None)
            behind = (None, None) if prologue is None else (h, up)
            ctx.save_for_backward(*behind, weight, counters, *kept)
        ctx.steps, ctx.stream, ctx.dtype, ctx.prologue, ctx.shared = steps, stream, dtype, prologue, shared
        ctx.x_shape, ctx.x_dtype, ctx.has_bias = x.shape, x.dtype, bias is not None
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, up, weight, counters, *rest = ctx.saved_tensors
        dup = db = None
        with _without_autocast(weight.device.type):
            shared = ctx.shared if ctx.prologue is None else None
            gemms = NativeGemms(ctx.steps, Draws(counters, ctx.stream), ctx.dtype, shared)
            g = grads[0].reshape(-1, weight.shape[0])
            needs = (ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2])
            kept: Kept = (rest[0], rest[1], rest[2])
            if ctx.prologue is not None and needs[1]:
                kept = (ctx.prologue.again(h, up).reshape(-1, weight.shape[1]), None, None)
            dx, dw = gemms.backward(g, weight, kept, needs)
            dx = None if dx is None else dx.to(ctx.x_dtype).reshape(ctx.x_shape)
            if ctx.prologue is not None and dx is not None:
                dx, dup = ctx.prologue.gradients(dx, h, up)
            dw = None if dw is None else dw.to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[3]:
                db = g.sum(0, dtype=torch.float32).to(weight.dtype)
        return dx, dup, dw, db, *(None,) * 7
