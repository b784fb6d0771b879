"""Surgery: give every linear layer of a model the recipe that a ModelRecipe has for it, in place.

    report = apply_recipe(model, recipe, seed=0)
    print(report)

Works on any nn.Module. It comes after the model is built and before the optimizer, the sharding and the compile.
Parameters are the same objects afterwards, so tied weights stay tied and checkpoints keep their keys.
"""

from __future__ import annotations

import difflib
import fnmatch
from dataclasses import dataclass

from torch import nn

from qtrain.quant import LinearRecipe, ModelRecipe

from .clock import Clock
from .linear import QuantizedLinear


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: its dotted name, [out_features, in_features], and its recipe (None: high precision)."""

    name: str
    shape: tuple[int, int]
    recipe: LinearRecipe | None

    @property
    def parameters(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class SurgeryReport:
    """What ``apply_recipe`` did. ``clock``: shared by the quantized layers, to be set before each forward of a
    stochastic recipe. ``layers``: every linear layer, in the model's order."""

    clock: Clock
    layers: tuple[LayerReport, ...]

    @property
    def plan(self) -> dict[str, LinearRecipe]:
        """The quantized layers and their recipes, by name."""
        return {layer.name: layer.recipe for layer in self.layers if layer.recipe is not None}

    @property
    def quantized_fraction(self) -> float:
        """Share of the linear layers' weights, and so of their FLOPs, that follow a recipe."""
        total = sum(layer.parameters for layer in self.layers)
        return sum(x.parameters for x in self.layers if x.recipe is not None) / total if total else 0.0

    def simulated_only(self) -> list[str]:
        """Operands whose scales lie on the contraction of their GEMM, which no low-precision GEMM factors out
        of its sum: layer/operand."""
        return [
            f"{layer.name}/{operand}"
            for layer in self.layers
            if layer.recipe is not None
            for operand in layer.recipe.operands()
            if (spec := layer.recipe.resolved(operand)) is not None and spec.granularity == "column"
        ]

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console
        from rich.table import Table

        table = Table(title=f"{self.quantized_fraction:.1%} of the linear weights are quantized")
        for column in ("layer", "out x in", "fprop x | W", "dgrad g | W", "wgrad g | x", "saved"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            if layer.recipe is None:
                table.add_row(layer.name, shape, *["high precision"] * 3, "")
                continue
            operands = [("-" if v is None else str(v)) for v in layer.recipe.operands().values()]
            gemms = []
            for i, gemm in enumerate(("fprop", "dgrad", "wgrad")):
                transform = getattr(layer.recipe, gemm).transform
                pair = f"{operands[2 * i]} | {operands[2 * i + 1]}"
                gemms.append(pair if transform is None else f"{pair} [{transform}]")
            table.add_row(layer.name, shape, *gemms, layer.recipe.saved)
        simulated = self.simulated_only()
        if simulated:
            table.caption = (
                f"{len(simulated)} operands have a scale per contraction index and can only be simulated: "
                f"{', '.join(sorted({name.rpartition('/')[2] for name in simulated}))}"
            )
        out = StringIO()
        Console(file=out, width=160, markup=False).print(table)  # [hadamard:4] is no markup
        return out.getvalue()


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear of the model by its (first) dotted name, subclasses included."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def check_patterns(recipe: ModelRecipe, names: list[str]) -> None:
    """Raises ValueError for a rule or an exclusion that matches no layer: it was meant for something."""
    for pattern in recipe.patterns():
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            shown = near or names[:8]
            raise ValueError(
                f"the pattern {pattern!r} of the recipe matches no linear layer. Near: {', '.join(shown)}; "
                f"patterns are shell wildcards against the whole name, such as '*.mlp.down' or 'lm_head'"
            )


def apply_recipe(model: nn.Module, recipe: ModelRecipe, *, seed: int = 0) -> SurgeryReport:
    """Convert the linear layers of ``model`` in place; a second call with another recipe replaces the first.

    seed: of the random bits of stochastic recipes. Raises ValueError for a pattern that matches nothing, a
    transform that does not divide a layer's widths, or a model without linear layers; TypeError for a subclass of
    nn.Linear under a recipe. Nothing is changed when it raises.
    """
    linears = linear_layers(model)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear: there is nothing to quantize")
    check_patterns(recipe, list(linears))
    plan = {name: recipe.for_layer(name) for name in linears}
    for name, layer_recipe in plan.items():
        if layer_recipe is not None:
            QuantizedLinear.check(linears[name], layer_recipe, name)
    clock = Clock(seed)
    for name, linear in linears.items():
        layer_recipe = plan[name]
        if layer_recipe is not None:
            QuantizedLinear.convert(linear, layer_recipe, name=name, clock=clock)
        elif isinstance(linear, QuantizedLinear):
            linear.revert()
    layers = tuple(
        LayerReport(name, (linear.out_features, linear.in_features), plan[name])
        for name, linear in linears.items()
    )
    return SurgeryReport(clock, layers)
