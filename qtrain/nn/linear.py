"""QuantizedLinear: an nn.Linear (and QuantizedConv1D: a Conv1D) whose three GEMMs follow a LinearRecipe.

    fprop  y  = Q(x H) . Q(W H)^T + b        H the transform of the GEMM, if any
    dgrad  dx = H^T ( M_x * Q(g) . Q(W) )    M the masks of the forward's estimators,
    wgrad  dW = H^T ( M_w * Q(g)^T . Q(x) )  applied in the forward's basis

It stays an nn.Linear: same parameters, same checkpoint keys, and, where its recipe quantizes nothing, the same
code. A module rather than a tensor subclass, so that optimizers, sharding and compile see ordinary tensors. W is
quantized from the parameter as it is stored (fp32 master), not from autocast's copy; x and g as they arrive.

T tokens, I in, O out.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from qtrain_kernels.counter_hash import stream_id
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qtrain.quant import (
    LinearRecipe,
    QTensor,
    Quantized,
    QuantSpec,
    pack,
    quantize_values,
    unpack,
)
from qtrain.quant.qtensor import grid_values, to_qtensor

from .clock import Clock, Draws
from .gemm import GemmOperand, enter, enter_transposed, quantized_gemm
from .native import NativeLinear


class QuantizedLayer(nn.Module):
    """A linear layer with a recipe. Made in place by ``apply_recipe``; ``name`` is its dotted name in the model and
    names its random bits. ``plain``: the class that it was. ``stores_transposed``: whether its weight is [I, O].
    ``native``: whether its GEMMs run on codes (``nn.native``) or are simulated."""

    stores_transposed = False
    weight: Tensor
    bias: Any  # a parameter, or None
    recipe: LinearRecipe
    clock: Clock
    name: str
    stream: int
    native: bool
    plain: type[nn.Module]

    @staticmethod
    def check(layer: nn.Module, recipe: LinearRecipe, name: str) -> None:
        """Raises TypeError for a subclass of nn.Linear or Conv1D, whose own forward would be lost, and ValueError
        for a transform that does not divide the layer's widths."""
        if not isinstance(layer, QuantizedLayer) and type(layer) not in (nn.Linear, conv1d_class()):
            raise TypeError(
                f"{name} is a {type(layer).__name__}, whose own forward a conversion would lose; only nn.Linear and "
                f"Hugging Face's Conv1D are converted: add {name!r} to the recipe's exclude"
            )
        out_features, in_features = k_major(layer).shape
        for gemm, contraction in (("fprop", in_features), ("dgrad", out_features)):
            transform = getattr(recipe, gemm).transform
            if transform is not None:
                transform.check(contraction, f"{name} ({gemm})")

    @staticmethod
    def convert(
        layer: nn.Module, recipe: LinearRecipe, *, name: str, clock: Clock, native: bool = False
    ) -> QuantizedLayer:
        """Turn ``layer`` itself into a quantized one: parameters, hooks and every reference to it survive. Raises as
        ``check`` does."""
        QuantizedLayer.check(layer, recipe, name)
        if not isinstance(layer, QuantizedLayer):
            plain = type(layer)
            layer.__class__ = QuantizedLinear if plain is nn.Linear else QuantizedConv1D
            assert isinstance(layer, QuantizedLayer)
            layer.plain = plain
        layer.recipe, layer.clock, layer.name = recipe, clock, name
        layer.stream, layer.native = stream_id(name), native
        clock.follow(layer.weight.device)
        return layer

    def revert(self) -> None:
        """Back to the plain layer, in place."""
        plain = self.plain
        for attribute in ("recipe", "clock", "name", "stream", "native", "plain"):
            delattr(self, attribute)
        self.__class__ = plain  # type: ignore[assignment]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedLayer:
        super()._apply(fn, recurse)
        self.clock.follow(self.weight.device)
        return self

    def extra_repr(self) -> str:
        quantized = ", ".join(f"{k}={v}" for k, v in self.recipe.operands().items() if v is not None)
        native = ", native" if self.native else ""
        return f"{super().extra_repr()}, {quantized or 'high precision'}{native}"

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., I] -> [..., O], in autocast's dtype where it is on. Raises TypeError for float16, whose
        range the products of codes leave, and ValueError for a number of tokens that the transform of wgrad does
        not divide."""
        if not self.recipe.quantizes:
            return self.plain.forward(self, input)
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"{self.name}: compute dtype {dtype}; quantized layers compute in bfloat16 or float32"
            )
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if trains and self.recipe.wgrad.transform is not None:
            tokens = input.numel() // input.shape[-1]
            self.recipe.wgrad.transform.check(tokens, f"{self.name} (wgrad, over tokens)")
        # Without draws the layers of a recipe are one function, which is compiled once for blocks that are alike
        counters, stream = (self.clock.counters, self.stream) if self.recipe.stochastic else (None, 0)
        function: Any = NativeLinear if self.native else _QuantizedLinear
        return function.apply(input, k_major(self), self.bias, counters, self.recipe, stream, dtype, trains)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """An nn.Linear with a recipe."""


class QuantizedConv1D(QuantizedLayer):
    """A Conv1D of Hugging Face's GPT-2 with a recipe. Its weight stays stored as [I, O]; specs refer to [O, I], as
    those of an nn.Linear do."""

    stores_transposed = True


def conv1d_class() -> type[nn.Module] | None:
    """Conv1D of Hugging Face, if somebody has imported it: a model that has one has."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def k_major(layer: nn.Module, matrix: Tensor | None = None) -> Tensor:
    """The weight of a linear layer, or a tensor of its shape such as the gradient, as GEMMs read it: [O, I], a view of
    what is stored."""
    stored = layer.weight if matrix is None else matrix
    assert isinstance(stored, Tensor)
    if isinstance(layer, QuantizedLayer):
        return stored.t() if layer.stores_transposed else stored
    return stored if isinstance(layer, nn.Linear) else stored.t()


class _QuantizedLinear(torch.autograd.Function):
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
        # The clock may move on before the backward runs; the bits of a layer are those of its forward.
        counters = None if counters is None else counters.clone()
        with torch.autocast(x.device.type, enabled=False):
            gemms = _Gemms(recipe, Draws(counters, stream), dtype)
            x2 = x.reshape(-1, x.shape[-1])
            xq, x_entered = gemms.forward_operand(x2, "input")
            wq, w_entered = gemms.forward_operand(
                weight.contiguous(), "weight"
            )  # [I, O] storage: the same sums
            y = quantized_gemm(x_entered, w_entered, dtype, bias)
            reused_w = w_entered if recipe.dgrad.weight == "fprop" else (None, None)
            kept = gemms.kept_of_input(x2, xq) if trains else (None,) * 5
            ctx.save_for_backward(weight, counters, *reused_w, *_bits(xq), *_bits(wq), *kept)
        ctx.recipe, ctx.stream, ctx.dtype = recipe, stream, dtype
        ctx.x_shape, ctx.x_dtype, ctx.has_bias = x.shape, x.dtype, bias is not None
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, counters, w_values, w_scale, x_bits, w_bits, *kept = ctx.saved_tensors
        dx = dw = db = None
        with torch.autocast(weight.device.type, enabled=False):
            gemms = _Gemms(ctx.recipe, Draws(counters, ctx.stream), ctx.dtype)
            g = grads[0].reshape(-1, weight.shape[0])
            if ctx.needs_input_grad[0]:
                dx = gemms.dgrad(g, weight, GemmOperand(w_values, w_scale), x_bits)
                dx = dx.to(ctx.x_dtype).reshape(ctx.x_shape)
            if ctx.needs_input_grad[1]:
                dw = gemms.wgrad(g, kept, w_bits, weight.shape[1]).to(weight.dtype)
            if ctx.has_bias and ctx.needs_input_grad[2]:
                db = g.to(torch.float32).sum(0).to(weight.dtype)
        return dx, dw, db, None, None, None, None, None


def _bits(q: Quantized | None) -> tuple[Tensor | None]:
    """Where the estimator passes the gradient, a bit an element."""
    return (None if q is None or q.inside is None else pack(q.inside.to(torch.uint8), 1),)


def _masked(d: Tensor, bits: Tensor | None) -> Tensor:
    return d if bits is None else d * unpack(bits, 1, d.shape[1]).to(d.dtype)


class _Gemms:
    """The three GEMMs of one layer at one moment."""

    def __init__(self, recipe: LinearRecipe, draws: Draws, dtype: torch.dtype) -> None:
        self.recipe, self.draws, self.dtype = recipe, draws, dtype

    def _transformed(self, view: Tensor, gemm: str) -> Tensor:
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
        return quantize_values(view, spec, noise)

    def _entered(self, view: Tensor, q: Quantized | None, operand: str) -> GemmOperand:
        if q is None:
            return GemmOperand(view.to(self.dtype), None)
        spec = self.recipe.resolved(operand)
        assert spec is not None
        return enter(q.values, q.scale, spec, self.dtype)

    def forward_operand(self, source: Tensor, which: str) -> tuple[Quantized | None, GemmOperand]:
        """``input`` [T, I] or ``weight`` [O, I] as fprop reads it."""
        view = self._transformed(source, "fprop")
        q = self._quantized(view, f"fprop.{which}")
        return q, self._entered(view, q, f"fprop.{which}")

    def _wgrad_input(self, x: Tensor) -> tuple[Tensor, Quantized | None]:
        view = self._transformed(x.t(), "wgrad")
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

    def dgrad(self, g: Tensor, weight: Tensor, w_entered: GemmOperand, x_bits: Tensor | None) -> Tensor:
        """g [T, O] -> dx [T, I]."""
        reuse, fold = self.recipe.dgrad.weight == "fprop", None
        if reuse:
            w, fold = enter_transposed(w_entered, fold=self.recipe.dgrad.grad_output is not None)
        else:
            w_view = self._transformed(weight.contiguous().t(), "dgrad")
            w = self._entered(
                w_view, self._quantized(w_view, "dgrad.weight", stored_transposed=True), "dgrad.weight"
            )
        g_view = self._transformed(g if fold is None else g.to(torch.float32) * fold, "dgrad")
        g_entered = self._entered(g_view, self._quantized(g_view, "dgrad.grad_output"), "dgrad.grad_output")
        return self._to_parameter_basis(quantized_gemm(g_entered, w, self.dtype), x_bits, rotated=reuse)

    def wgrad(self, g: Tensor, kept: list[Tensor | None], w_bits: Tensor | None, in_features: int) -> Tensor:
        """g [T, O] -> dW [O, I]."""
        reuse, fold = self.recipe.wgrad.input == "fprop", None
        x = self._kept_entered(kept, (g.shape[0], in_features))
        if reuse:
            x, fold = enter_transposed(x, fold=self.recipe.wgrad.grad_output is not None)
        g_view = self._transformed(g.t() if fold is None else g.t().to(torch.float32) * fold, "wgrad")
        gq = self._quantized(g_view, "wgrad.grad_output", stored_transposed=True)
        g_entered = self._entered(g_view, gq, "wgrad.grad_output")
        return self._to_parameter_basis(quantized_gemm(g_entered, x, torch.float32), w_bits, rotated=reuse)

    def _to_parameter_basis(self, d: Tensor, bits: Tensor | None, *, rotated: bool) -> Tensor:
        """A gradient [F, I] of an operand of fprop: masked in the forward's basis, given back in the stored one.
        rotated: whether it is in the forward's basis already (its GEMM read the forward's operand)."""
        transform = self.recipe.fprop.transform
        if transform is None:
            return _masked(d, bits)
        signs = self.draws.signs(transform, "fprop", d.shape[1])
        if not rotated:
            if bits is None:
                return d
            d = transform.forward(d, signs)
        return transform.inverse(_masked(d, bits), signs)
