"""The oracle of a quantized linear layer: what its three GEMMs must compute, in float32 and in one piece.

Every implementation (simulated, native, compiled) is bounded against it, and the census holds a running model to
it. It shares the algebra with the layer (``quantize_values``, ``Transform``), and nothing else: no saving, no
packing, no compute dtype, no folding into epilogues.

T tokens, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from qtrain.quant import LinearRecipe, Quantized, QuantSpec, dequantize_values, quantize_values

from .clock import Draws
from .gemm import multiplies_codes


@dataclass(frozen=True)
class OracleOperand:
    """One operand of one GEMM.

    source: [F, K] float32, what is to be quantized: transformed, and with folded scales multiplied in. values,
    scale: its grid values and scales, in the layout that ``spec`` tiles: [F, K], or [K, F] where ``transposed``
    (an operand of the forward in a backward GEMM). folded: whether its scales went into the other operand.
    zero_point: like scale, None of a symmetric spec; ``values`` are less it.
    """

    source: Tensor
    spec: QuantSpec | None
    values: Tensor
    scale: Tensor | None
    transposed: bool = False
    folded: bool = False
    zero_point: Tensor | None = None

    @property
    def multiplied(self) -> Tensor:
        """[F, K] float32: the numbers that the GEMM sums over, scales included except for folded ones."""
        if self.scale is None or self.spec is None:
            return self.source
        numbers = self.values if self.folded else dequantize_values(self.values, self.scale, self.spec)
        return numbers.t() if self.transposed else numbers


@dataclass(frozen=True)
class OracleGemm:
    """a [M, K] . b [N, K]^T, with the operands' names. result: what the layer gives out for it, ``given_out`` of
    the product: for a gradient the estimator's mask and the transform back, for y the product itself. mixes: whether
    that transform mixes the elements of a row."""

    names: tuple[str, str]
    a: OracleOperand
    b: OracleOperand
    given_out: Callable[[Tensor], Tensor]
    mixes: bool = False

    @cached_property
    def result(self) -> Tensor:
        return self.given_out(self.a.multiplied @ self.b.multiplied.t())


class _Operands:
    def __init__(self, recipe: LinearRecipe, draws: Draws, given: Mapping[str, Tensor]) -> None:
        self.recipe, self.draws, self.given = recipe, draws, given

    def transformed(self, view: Tensor, gemm: str) -> Tensor:
        transform = getattr(self.recipe, gemm).transform
        if transform is None:
            return view
        return transform.forward(view, self.draws.signs(transform, gemm, view.shape[1]))

    def quantized(self, source: Tensor, name: str, *, rows_are_contraction: bool) -> Quantized | None:
        spec = self.recipe.resolved(name)
        if spec is None:
            return None
        free, contraction = source.shape
        stored = (contraction, free) if rows_are_contraction else (free, contraction)
        noise = self.draws.noise(spec, name, stored, tokens=not name.endswith("weight"))
        if noise is not None and rows_are_contraction:
            noise = noise.t()
        return quantize_values(source, spec, noise, self.given.get(name))

    def make(
        self, view: Tensor, name: str, gemm: str, *, rows_are_contraction: bool = False
    ) -> OracleOperand:
        source = self.transformed(view, gemm)
        q = self.quantized(source, name, rows_are_contraction=rows_are_contraction)
        if q is None:
            return OracleOperand(source, None, source, None)
        return OracleOperand(source, self.recipe.resolved(name), q.values, q.scale, zero_point=q.zero_point)


def _reused(forward: OracleOperand, *, other_quantized: bool) -> tuple[OracleOperand, Tensor | None]:
    """The forward's operand in a backward GEMM, and the scale [1, K] that the other operand takes over."""
    assert forward.spec is not None and forward.scale is not None  # noqa: PT018
    folds = other_quantized and multiplies_codes(forward.spec) and forward.scale.numel() > 1
    operand = OracleOperand(
        forward.source.t(),
        forward.spec,
        forward.values,
        forward.scale,
        transposed=True,
        folded=folds,
        zero_point=forward.zero_point,
    )
    return operand, forward.scale.t() if folds else None


def _backward_through(
    recipe: LinearRecipe, draws: Draws, inside: Tensor | None, rotated: bool, d: Tensor
) -> Tensor:
    """A gradient of the forward's operand -> of the tensor itself: M in the forward's basis, then H^T."""
    transform = recipe.fprop.transform
    signs = None if transform is None else draws.signs(transform, "fprop", d.shape[1])
    if transform is not None and not rotated:
        d = transform.forward(d, signs)
    if inside is not None:
        d = torch.where(inside, d, 0.0)
    return d if transform is None else transform.inverse(d, signs)


@torch.no_grad()
def linear_oracle(
    recipe: LinearRecipe,
    draws: Draws,
    x: Tensor,
    weight: Tensor,
    g: Tensor | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, OracleGemm]:
    """The GEMMs of a layer by name: fprop, and dgrad and wgrad where the gradient g is given.

    x: [T, I]; weight: [O, I]; g: [T, O]; any float dtype. given: of the operands whose ranges have a state, what they
    were at that moment (``Quantizers.given``). Results: y [T, O] without bias, dx [T, I], dW [O, I].
    """
    x, weight = x.detach().to(torch.float32), weight.detach().to(torch.float32)
    make = _Operands(recipe, draws, given or {})
    xq, wq = make.make(x, "fprop.input", "fprop"), make.make(weight, "fprop.weight", "fprop")
    names = ("fprop.input", "fprop.weight")
    gemms = {"fprop": OracleGemm(names, xq, wq, lambda product: product)}
    if g is None:
        return gemms
    g = g.detach().to(torch.float32)
    for gemm, which, forward, other in (("dgrad", "weight", wq, xq), ("wgrad", "input", xq, wq)):
        reuse = getattr(recipe, gemm).__getattribute__(which) == "fprop"
        names = (f"{gemm}.grad_output", f"{gemm}.{which}")
        g_view = g if gemm == "dgrad" else g.t()
        if reuse:
            b, fold = _reused(forward, other_quantized=recipe.resolved(names[0]) is not None)
        else:
            tensor = weight if gemm == "dgrad" else x
            b, fold = make.make(tensor.t(), names[1], gemm, rows_are_contraction=True), None
        a = make.make(
            g_view if fold is None else g_view * fold, names[0], gemm, rows_are_contraction=gemm == "wgrad"
        )
        mixes = recipe.fprop.transform is not None
        inside = _inside(make, other, "fprop.input" if gemm == "dgrad" else "fprop.weight")
        gemms[gemm] = OracleGemm(names, a, b, partial(_backward_through, recipe, draws, inside, reuse), mixes)
    return gemms


def _inside(make: _Operands, forward: OracleOperand, name: str) -> Tensor | None:
    q = make.quantized(forward.source, name, rows_are_contraction=False)
    return None if q is None else q.inside
