"""Does the compiled step quantize what the eager step does?

The census observes eagerly; a compiler may fuse, reorder and, in a bug, drop. Loss and gradients of the two
cannot be compared bit for bit in bfloat16, where a fused kernel skips roundings and codes near a threshold flip.
But quantization moves a gradient, and the direction of that move is known:

    gain = <Gc - Gu, Gq - Gu> / ||Gq - Gu||^2        per parameter of a quantized layer

with Gq the gradient of the eager quantized step, Gu of the eager step without quantization, Gc of the compiled
step. The gain is about 1 if the compiled step quantizes alike and about 0 if it does not quantize, as far as
quantization outweighs the roundings n of bfloat16. Those of Gq and Gu are part of the move: with d its part that is
quantization, the two cases show

    1/2 + |d|^2 / 2 (|d|^2 + 2 |n|^2)        and        1/2 - |d|^2 / 2 (|d|^2 + 2 |n|^2)

so that 1/2 parts them, and the gain says whether the compiled step is nearer to Gq or to Gu. Measured (Inductor,
GPT of 4 layers of 64, bfloat16 autocast, 3 seeds): 0.98 with int8 in all six operands, 0.65 with int8 in the
forward alone.

What it does not show: which layer. A layer's gradient is moved by the quantization of all others, so that one layer
that lost its own mostly keeps a gain of 0.9 and more; ``gains`` find it only where its own share dominates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.quant import LinearRecipe

from .census import CensusError, gradients_of_probe, named_layers
from .linear import QuantizedLayer
from .quantizers import notes_put_back
from .surgery import SurgeryReport

MIN_GAIN, MAX_GAIN = 0.5, 1.5
LOST_GAIN = 0.2
"""Below this a parameter shows no quantization. In sound runs with Inductor (the above, and int8 weights alone, and
int8 gradients per token, 2 layers) single parameters reached down to 0.38."""


@dataclass(frozen=True)
class CompiledComparison:
    """The compiled step beside the eager one, on the probe batch. gain: of all of them together, nan where the
    probe shows nothing of quantization. gains: by parameter of the quantized layers, nan where its gradient is not
    moved. missing: planned layers that the model does not have."""

    loss_compiled: float
    loss_eager: float
    loss_unquantized: float
    gain: float
    gains: dict[str, float]
    missing: tuple[str, ...] = ()

    def failures(self) -> list[str]:
        """A sentence for each thing that differs."""
        found = []
        if not MIN_GAIN <= self.gain <= MAX_GAIN:
            found.append(
                f"gradients of the compiled step show {self.gain:.2f} of the eager step's quantization, expected "
                f"{MIN_GAIN} to {MAX_GAIN}"
            )
        if self.missing:
            found.append(
                f"{', '.join(self.missing[:5])}: no such quantized layer in the model; pass the one that "
                "apply_recipe got"
            )
        lost = sorted(
            (name for name, gain in self.gains.items() if gain < LOST_GAIN), key=self.gains.__getitem__
        )
        if lost:
            found.append(f"no quantization in the compiled gradient of {', '.join(lost[:5])}")
        return found

    def check(self) -> None:
        """Raises CensusError unless the compiled step quantizes as the eager one does."""
        if self.failures():
            raise CensusError("the compiled step is not the eager step: " + "; ".join(self.failures()))

    def summary(self) -> str:
        """One line."""
        shown = [item for item in self.gains.items() if not math.isnan(item[1])]
        worst = min(shown, key=lambda item: item[1], default=("none", math.nan))
        return (
            f"compiled step shows {self.gain:.2f} of the eager step's quantization (least {worst[1]:.2f}, {worst[0]}); "
            f"loss {self.loss_compiled:.5f}, eager {self.loss_eager:.5f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {
            "summary": self.summary(),
            "failures": self.failures(),
            "gain": _json(self.gain),
            "gains": {name: _json(gain) for name, gain in self.gains.items()},
        }


def _number(scalar: Tensor) -> float:
    """Of a sharded tensor's sum: over all processes, all of which ask for it."""
    whole = scalar.full_tensor() if hasattr(scalar, "full_tensor") else scalar
    return float(whole)


def _json(number: float) -> float | None:
    return number if math.isfinite(number) else None


def compare_compiled(
    model: nn.Module, report: SurgeryReport, probe: Callable[[nn.Module], Tensor]
) -> CompiledComparison:
    """Run ``probe(model) -> scalar loss`` three times: as it is (compiled), eagerly, and eagerly with the recipes
    taken off. Parameters, gradients, random state, clock and recipes are left as they were."""
    modules = named_layers(model)
    layers = {n: m for n in report.plan if isinstance(m := modules.get(n), QuantizedLayer)}
    kept = report.clock.counters.clone()

    def gradients() -> tuple[float, dict[str, Tensor]]:
        try:
            with notes_put_back(model):
                loss, found = gradients_of_probe(model, probe)
        finally:
            report.clock.counters.copy_(kept)
        return loss, {name.replace("_orig_mod.", ""): g for name, g in found.items()}

    loss_c, compiled = gradients()
    with torch.compiler.set_stance("force_eager"):
        loss_q, eager = gradients()
        recipes = {name: layer.recipe for name, layer in layers.items()}
        try:
            for layer in layers.values():
                layer.recipe = LinearRecipe()
            loss_u, plain = gradients()
        finally:
            for name, layer in layers.items():
                layer.recipe = recipes[name]
    gains, dots, squares = {}, 0.0, 0.0
    # A transform alone moves a gradient by rounding only
    quantized = [n for n, r in report.plan.items() if any(v is not None for v in r.operands().values())]
    for name in (f"{layer}.weight" for layer in quantized if layer in layers):
        if name not in eager:
            continue  # a tied weight goes by its first name, and a frozen one has no gradient
        move = (eager[name] - plain[name]).to(torch.float64)
        dot = _number(((compiled[name] - plain[name]).to(torch.float64) * move).sum())
        square = _number(move.square().sum())
        gains[name] = dot / square if square else math.nan
        dots, squares = dots + dot, squares + square
    nothing = math.nan if quantized else 1.0
    gain = dots / squares if squares else nothing
    missing = tuple(name for name in report.plan if name not in layers)
    return CompiledComparison(loss_c, loss_q, loss_u, gain, gains, missing)
