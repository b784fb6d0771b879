"""Simulated computation: operands rounded to their grids, then multiplied in bf16 or fp32.

    fprop  y  = Q(x H) . Q(W H)^T + b        H the transform of the GEMM, if any
    dgrad  dx = H^T ( M_x * Q(g) . Q(W) )    M the masks of the forward's estimators,
    wgrad  dW = H^T ( M_w * Q(g)^T . Q(x) )  applied in the forward's basis

For every spec there is; ``native`` computes some of them on int8 codes. W is quantized from the parameter as it is stored
(fp32 master), not from autocast's copy; x and g as they arrive.

T tokens, I in, O out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qtrain.quant import LinearRecipe, QTensor, Quantized, QuantSpec, pack, quantize_values, unpack
from qtrain.quant.qtensor import grid_values, to_qtensor

from .clock import Draws
from .gemm import GemmOperand, enter, enter_transposed, quantized_gemm
from .prologue import Prologue
from .quantizers import OPERANDS, move_of_step, note, of_flat, step_gradient


class SimulatedLinear(torch.autograd.Function):
    """x = f(h) or f(h) * up where there is a prologue, else h. stream: of the layer's draws. dtype: the compute dtype.
    trains: whether x is needed for the backward. states: of ranges (``quantizers``)."""

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        up: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        counters: Tensor | None,
        recipe: LinearRecipe,
        stream: int,
        dtype: torch.dtype,
        trains: bool,
        prologue: Prologue | None,
        *states: Tensor | None,
    ) -> Tensor:
        # The clock may move on before the backward runs; the bits of a layer are those of its forward.
        counters = None if counters is None else counters.clone()
        with torch.autocast(h.device.type, enabled=False):
            given, notes = of_flat(states)
            x = h if prologue is None else prologue.value(h, up)
            gemms = SimulatedGemms(recipe, Draws(counters, stream), dtype, given, notes if trains else {})
            x2 = x.reshape(-1, x.shape[-1])
            xq, x_entered, x_move = gemms.forward_operand(x2, "input", moves=ctx.needs_input_grad[10])
            # Of [I, O] storage too: the sums of a GEMM go by the layout of what it reads
            wq, w_entered, w_move = gemms.forward_operand(
                weight.contiguous(), "weight", moves=ctx.needs_input_grad[11]
            )
            y = quantized_gemm(x_entered, w_entered, dtype, bias)
            reused_w = w_entered if recipe.dgrad.weight == "fprop" else (None, None)
            kept = gemms.kept_of_input(x2, xq) if trains and prologue is None else (None,) * 5
            behind = (None, None) if prologue is None else (h, up)
            ctx.save_for_backward(
                *behind,
                weight,
                counters,
                *reused_w,
                *_bits(xq),
                *_bits(wq),
                x_move,
                w_move,
                *kept,
                *states[: -len(OPERANDS)],
            )
        ctx.recipe, ctx.stream, ctx.dtype, ctx.notes = recipe, stream, dtype, states[-len(OPERANDS) :]
        ctx.x_shape, ctx.x_dtype, ctx.has_bias, ctx.prologue = x.shape, x.dtype, bias is not None, prologue
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        h, up, weight, counters, w_values, w_scale, x_bits, w_bits, x_move, w_move, *kept = ctx.saved_tensors
        kept, ranges = kept[:5], kept[5:]
        dx = dup = dw = db = dx_step = dw_step = None
        with torch.autocast(weight.device.type, enabled=False):
            given, notes = of_flat((*ranges, *ctx.notes))
            gemms = SimulatedGemms(ctx.recipe, Draws(counters, ctx.stream), ctx.dtype, given, notes)
            g = grads[0].reshape(-1, weight.shape[0])
            if ctx.needs_input_grad[0] or ctx.needs_input_grad[1] or x_move is not None:
                dx, dx_step = gemms.dgrad(g, weight, GemmOperand(w_values, w_scale), x_bits, x_move)
                dx = dx.to(ctx.x_dtype).reshape(ctx.x_shape)
                if ctx.prologue is not None:
                    dx, dup = ctx.prologue.gradients(dx, h, up)
            if ctx.needs_input_grad[2] or w_move is not None:
                if ctx.prologue is not None:
                    kept[0] = ctx.prologue.value(h, up).reshape(-1, weight.shape[1])
                dw, dw_step = gemms.wgrad(g, kept, w_bits, w_move, weight.shape[1])
                dw = dw.to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[3]:
                db = g.to(torch.float32).sum(0).to(weight.dtype)
        none = (None,) * (len(ranges) - 2 + len(ctx.notes))
        return dx, dup, dw, db, *(None,) * 6, dx_step, dw_step, *none


def _bits(q: Quantized | None) -> tuple[Tensor | None]:
    """Where the estimator passes the gradient, a bit an element."""
    return (None if q is None or q.inside is None else pack(q.inside.to(torch.uint8), 1),)


def _masked(d: Tensor, bits: Tensor | None) -> Tensor:
    return d if bits is None else d * unpack(bits, 1, d.shape[1]).to(d.dtype)


class SimulatedGemms:
    """The three GEMMs of one layer at one moment."""

    def __init__(
        self,
        recipe: LinearRecipe,
        draws: Draws,
        dtype: torch.dtype,
        given: dict[str, Tensor],
        notes: dict[str, Tensor],
    ) -> None:
        """given, notes: of the operands whose ranges have a state, by name (``qtrain.nn.quantizers``)."""
        self.recipe, self.draws, self.dtype = recipe, draws, dtype
        self.given, self.notes = given, notes

    def transformed(self, view: Tensor, gemm: str) -> Tensor:
        """[F, K] in the basis of that GEMM."""
        transform = getattr(self.recipe, gemm).transform
        if transform is None:
            return view
        return transform.forward(view, self.draws.signs(transform, gemm, view.shape[1]))

    def _quantized(self, view: Tensor, operand: str, *, stored_transposed: bool = False) -> Quantized | None:
        """The K-major view [F, K] on the grid of ``operand``, None where that is high precision."""
        spec = self.recipe.operands()[operand]
        if spec is None:
            return None
        assert isinstance(spec, QuantSpec)
        shape = (view.shape[1], view.shape[0]) if stored_transposed else (view.shape[0], view.shape[1])
        noise = self.draws.noise(spec, operand, shape, tokens=not operand.endswith("weight"))
        if noise is not None and stored_transposed:
            noise = noise.t()
        q = quantize_values(view, spec, noise, self.given.get(operand))
        if operand in self.notes:
            note(self.notes[operand], q)
        return q

    def _entered(self, view: Tensor, q: Quantized | None, operand: str) -> GemmOperand:
        if q is None:
            return GemmOperand(view.to(self.dtype), None)
        spec = self.recipe.resolved(operand)
        assert spec is not None
        return enter(q.values, q.scale, spec, self.dtype)

    def forward_operand(
        self, source: Tensor, which: str, *, moves: bool = False
    ) -> tuple[Quantized | None, GemmOperand, Tensor | None]:
        """``input`` [T, I] or ``weight`` [O, I] as fprop reads it. moves: give dx^/ds as well, [F, I] in the compute
        dtype."""
        view, operand = self.transformed(source, "fprop"), f"fprop.{which}"
        q = self._quantized(view, operand)
        move = None
        if moves and q is not None:
            spec = self.recipe.resolved(operand)
            assert spec is not None
            move = move_of_step(view, q, spec).to(self.dtype)
        return q, self._entered(view, q, operand), move

    def _wgrad_input(self, x: Tensor) -> tuple[Tensor, Quantized | None]:
        view = self.transformed(x.t(), "wgrad")
        return view, self._quantized(view, "wgrad.input", stored_transposed=True)

    def kept_of_input(self, x: Tensor, xq: Quantized | None) -> tuple[Tensor | None, ...]:
        """What the backward needs of x [T, I]: (x, None...) or (None, codes, scale, zero point, tensor scale)."""
        if self.recipe.saved == "high_precision":
            # A high-precision wgrad reads x in the compute dtype; a quantized one quantizes it as it arrived.
            return (x.to(self.dtype) if self.recipe.wgrad.input is None else x, None, None, None, None)
        spec = self.recipe.resolved("wgrad.input")
        assert spec is not None
        if self.recipe.wgrad.input == "fprop":
            q, shape = xq, tuple(x.shape)
        else:
            q, shape = self._wgrad_input(x)[1], (x.shape[1], x.shape[0])
        assert q is not None
        packed = to_qtensor(q, spec, shape)
        return (None, packed.codes, packed.scale, packed.zero_point, packed.tensor_scale)

    def _kept_entered(self, kept: list[Tensor | None], shape: tuple[int, int]) -> GemmOperand:
        """The operand of wgrad out of what ``kept_of_input`` kept of x, whose shape is ``shape`` [T, I]; for
        "fprop" in the forward's layout."""
        x, codes, scale, zero_point, tensor_scale = kept
        reuse = self.recipe.wgrad.input == "fprop"
        if x is not None:
            if reuse:
                return self.forward_operand(x, "input")[1]
            return self._entered(*self._wgrad_input(x), "wgrad.input")
        spec = self.recipe.resolved("wgrad.input")
        assert spec is not None
        assert codes is not None
        assert scale is not None
        packed = QTensor(codes, scale, zero_point, tensor_scale, shape if reuse else shape[::-1], spec)
        return enter(*grid_values(packed), spec, self.dtype)

    def dgrad(
        self,
        g: Tensor,
        weight: Tensor,
        w_entered: GemmOperand,
        x_bits: Tensor | None,
        x_move: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """g [T, O] -> dx [T, I], and the gradient of the input's learned step."""
        reuse, fold = self.recipe.dgrad.weight == "fprop", None
        if reuse:
            w, fold = enter_transposed(w_entered, fold=self.recipe.dgrad.grad_output is not None)
        else:
            w_view = self.transformed(weight.contiguous().t(), "dgrad")
            w = self._entered(
                w_view, self._quantized(w_view, "dgrad.weight", stored_transposed=True), "dgrad.weight"
            )
        g_view = self.transformed(g if fold is None else g.to(torch.float32) * fold, "dgrad")
        g_entered = self._entered(g_view, self._quantized(g_view, "dgrad.grad_output"), "dgrad.grad_output")
        d = quantized_gemm(g_entered, w, self.dtype)
        return self._to_parameter_basis(d, x_bits, x_move, "fprop.input", rotated=reuse)

    def wgrad(
        self,
        g: Tensor,
        kept: list[Tensor | None],
        w_bits: Tensor | None,
        w_move: Tensor | None,
        in_features: int,
    ) -> tuple[Tensor, Tensor | None]:
        """g [T, O] -> dW [O, I], and the gradient of the weight's learned step."""
        reuse, fold = self.recipe.wgrad.input == "fprop", None
        x = self._kept_entered(kept, (g.shape[0], in_features))
        if reuse:
            x, fold = enter_transposed(x, fold=self.recipe.wgrad.grad_output is not None)
        g_view = self.transformed(g.t() if fold is None else g.t().to(torch.float32) * fold, "wgrad")
        gq = self._quantized(g_view, "wgrad.grad_output", stored_transposed=True)
        g_entered = self._entered(g_view, gq, "wgrad.grad_output")
        d = quantized_gemm(g_entered, x, torch.float32)
        return self._to_parameter_basis(d, w_bits, w_move, "fprop.weight", rotated=reuse)

    def _to_parameter_basis(
        self, d: Tensor, bits: Tensor | None, move: Tensor | None, operand: str, *, rotated: bool
    ) -> tuple[Tensor, Tensor | None]:
        """A gradient [F, I] of an operand of fprop: masked in the forward's basis, given back in the stored one; and
        that of its learned step. rotated: whether it is in the forward's basis already (its GEMM read the forward's
        operand)."""
        transform, signs, step = self.recipe.fprop.transform, None, None
        if transform is not None:
            signs = self.draws.signs(transform, "fprop", d.shape[1])
            if not rotated:
                if bits is None and move is None:
                    return d, None
                d = transform.forward(d, signs)
        if move is not None:
            spec = self.recipe.resolved(operand)
            assert spec is not None
            step = step_gradient(d, move, spec, operand)
        d = _masked(d, bits)
        return d if transform is None else transform.inverse(d, signs), step
