"""Does the compiled step quantize what the eager step does?

The census observes eagerly; a compiler may fuse, reorder and, in a bug, drop. Loss and gradients of the two
cannot be compared bit for bit in bfloat16, where a fused kernel skips roundings and codes near a threshold flip.
But quantization moves a gradient, and the direction of that move is known:

    gain = <Gc - Gu, Gq - Gu> / ||Gq - Gu||^2        per parameter of a quantized layer

with Gq the gradient of the eager quantized step, Gu of the eager step without quantization, Gc of the compiled
step. Noise that has nothing to do with quantization has no component along Gq - Gu: the gain is about 1 if the
compiled step quantizes alike and about 0 if it does not quantize.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.quant import LinearRecipe

from .census import CensusError, gradients_of_probe
from .linear import QuantizedLinear
from .surgery import SurgeryReport

MIN_GAIN, MAX_GAIN = 0.5, 1.5


@dataclass(frozen=True)
class CompiledComparison:
    """The compiled step beside the eager one, on the probe batch. gains: by parameter of the quantized layers."""

    loss_compiled: float
    loss_eager: float
    loss_unquantized: float
    gain: float
    gains: dict[str, float]

    def failures(self) -> list[str]:
        """A sentence for each thing that differs."""
        found = []
        if not MIN_GAIN <= self.gain <= MAX_GAIN:
            found.append(
                f"gradients of the compiled step show {self.gain:.2f} of the eager step's quantization, expected "
                f"{MIN_GAIN} to {MAX_GAIN}"
            )
        lost = [name for name, gain in self.gains.items() if gain < MIN_GAIN / 2]
        if lost:
            found.append(f"no quantization in the compiled gradient of {', '.join(lost[:5])}")
        return found

    def check(self) -> None:
        """Raises CensusError unless the compiled step quantizes as the eager one does."""
        if self.failures():
            raise CensusError("the compiled step is not the eager step: " + "; ".join(self.failures()))

    def summary(self) -> str:
        """One line."""
        worst = min(self.gains.items(), key=lambda item: item[1], default=("none", 1.0))
        return (
            f"compiled step shows {self.gain:.2f} of the eager step's quantization (least {worst[1]:.2f}, {worst[0]}); "
            f"loss {self.loss_compiled:.5f}, eager {self.loss_eager:.5f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers."""
        return {
            "summary": self.summary(),
            "failures": self.failures(),
            "gain": self.gain,
            "gains": self.gains,
        }


def compare_compiled(
    model: nn.Module, report: SurgeryReport, probe: Callable[[nn.Module], Tensor]
) -> CompiledComparison:
    """Run ``probe(model) -> scalar loss`` three times: as it is (compiled), eagerly, and eagerly with the recipes
    taken off. Parameters, gradients, random state and recipes are left as they were."""
    layers = {n: m for n, m in model.named_modules() if n in report.plan and isinstance(m, QuantizedLinear)}
    loss_c, compiled = gradients_of_probe(model, probe)
    with torch.compiler.set_stance("force_eager"):
        loss_q, eager = gradients_of_probe(model, probe)
        recipes = {name: layer.recipe for name, layer in layers.items()}
        try:
            for layer in layers.values():
                layer.recipe = LinearRecipe()
            loss_u, plain = gradients_of_probe(model, probe)
        finally:
            for name, layer in layers.items():
                layer.recipe = recipes[name]
    gains, dots, squares = {}, 0.0, 0.0
    for name in (f"{layer}.weight" for layer in layers):
        if name not in eager:
            continue  # a tied weight goes by its first name
        move = (eager[name] - plain[name]).to(torch.float64)
        dot = float(((compiled[name] - plain[name]).to(torch.float64) * move).sum())
        square = float(move.square().sum())
        gains[name] = dot / square if square else 1.0
        dots, squares = dots + dot, squares + square
    return CompiledComparison(loss_c, loss_q, loss_u, dots / squares if squares else 1.0, gains)
