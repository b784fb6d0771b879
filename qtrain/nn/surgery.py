"""Surgery: give every linear layer of a model the recipe that a ModelRecipe has for it, in place.

    report = apply_recipe(model, recipe, seed=0)
    print(report)

Works on any nn.Module. It comes after the model is built and before the optimizer, the sharding and the compile.
Parameters are the same objects afterwards, so tied weights stay tied and checkpoints keep their keys.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qtrain_kernels.cpu_tier import tier
from torch import Tensor, nn

from qtrain.quant import LinearRecipe, ModelRecipe

from .clock import Clock
from .inventory import as_patterns, check_not_quantized, linear_layers, outside_matrices, why_not
from .linear import QuantizedLayer, k_major
from .native_ops import kinds_of, missing_on, obstacles
from .prologue import Prologue, sites
from .shared_codes import SharedCodes

Faster = Callable[[Mapping[str, tuple[tuple[int, int], LinearRecipe]]], set[str]]


@dataclass(frozen=True)
class LayerReport:
    """One linear layer: its dotted name, [out_features, in_features], and its recipe (None: high precision). Or a
    matrix outside of linear layers, of any shape and always in high precision. native: whether its GEMMs run on codes
    or are simulated. recomputes: whether it owns the activation in front of it (``prologue``)."""

    name: str
    shape: tuple[int, ...]
    recipe: LinearRecipe | None
    native: bool = False
    recomputes: bool = False

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SurgeryReport:
    """What ``apply_recipe`` did. ``clock``: shared by the quantized layers, to be set before each forward of a
    stochastic recipe. ``layers``: every linear layer, in the model's order, then what lies outside of them.
    ``compute``: how the quantized ones compute, and why not natively where that was left open."""

    clock: Clock
    layers: tuple[LayerReport, ...]
    compute: str = "simulated"

    @property
    def plan(self) -> dict[str, LinearRecipe]:
        """The quantized layers and their recipes, by name."""
        return {layer.name: layer.recipe for layer in self.layers if layer.recipe is not None}

    @property
    def quantized_fraction(self) -> float:
        """Share of the linear layers' weights, and so of their FLOPs, that follow a recipe; matrices outside of them
        (experts, convolutions) count as weights that do not."""
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

        title = f"{self.quantized_fraction:.1%} of the linear weights are quantized; compute: {self.compute}"
        table = Table(title=title)
        for column in ("layer", "out x in", "fprop x | W", "dgrad g | W", "wgrad g | x", "saved"):
            table.add_column(column, overflow="fold")
        for layer in self.layers:
            shape = " x ".join(map(str, layer.shape))
            if layer.recipe is None:
                table.add_row(layer.name, shape, *["high precision"] * 3, "")
                continue
            operands = [("-" if v is None else str(v)) for v in layer.recipe.operands().values()]
            gemms = []
            for i, gemm in enumerate(("fprop", "dgrad", "wgrad")):
                transform = getattr(layer.recipe, gemm).transform
                pair = f"{operands[2 * i]} | {operands[2 * i + 1]}"
                gemms.append(pair if transform is None else f"{pair} [{transform}]")
            saved = "recomputed" if layer.recomputes else layer.recipe.saved
            saved += ", native" if layer.native else ""
            table.add_row(layer.name, shape, *gemms, saved)
        simulated = self.simulated_only()
        if simulated:
            table.caption = (
                f"{len(simulated)} operands have a scale per contraction index and can only be simulated: "
                f"{', '.join(sorted({name.rpartition('/')[2] for name in simulated}))}"
            )
        out = StringIO()
        Console(file=out, width=160, markup=False).print(table)  # [hadamard:4] is no markup
        return out.getvalue()


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


def _check_layers(model: nn.Module, recipe: ModelRecipe, linears: dict[str, nn.Module]) -> None:
    refused = {
        n: why for n, layer in linears.items() if recipe.for_layer(n) and (why := why_not(model, n, layer))
    }
    if refused:
        name, why = next(iter(refused.items()))
        others = f" ({len(refused) - 1} others are refused too)" if len(refused) > 1 else ""
        raise TypeError(
            f"{name} {why}{others}; only plain nn.Linear and Conv1D layers are converted: add {name!r} to the recipe's "
            f"exclude to leave it as it is; all of them: exclude={as_patterns(list(refused))}"
        )
    for name, layer in linears.items():
        if (layer_recipe := recipe.for_layer(name)) is not None:
            QuantizedLayer.check(layer, layer_recipe, name)


def _check_outside(recipe: ModelRecipe, outside: dict[str, Tensor]) -> None:
    covered = [name for name in outside if recipe.for_layer(name) is not None]
    if covered:
        shown = ", ".join(f"{name} [{' x '.join(map(str, outside[name].shape))}]" for name in covered[:4])
        more = f" and {len(covered) - 4} more" if len(covered) > 4 else ""
        raise ValueError(
            f"the recipe covers matrices outside of linear layers, which surgery cannot quantize: {shown}{more} (fused "
            "experts, routers, convolutions, tables). To go on with them in high precision, say so: add to the recipe's "
            f"exclude {', '.join(map(repr, as_patterns(covered)))}"
        )


def _native_layers(
    recipe: ModelRecipe,
    plan: dict[str, LinearRecipe | None],
    linears: dict[str, nn.Module],
    device: str,
    faster: Faster | None,
) -> tuple[str, set[str]]:
    """How the plan computes, in a few words, and the names of the layers that do so natively."""
    planned = {name: layer for name, layer in plan.items() if layer is not None}
    if recipe.compute == "simulated" or not planned:
        return "simulated", set()
    why = {name: obstacles(layer) for name, layer in planned.items()}
    for name, layer in planned.items():
        missing = "" if device == "meta" else missing_on(device, layer)
        if not why[name] and missing:
            why[name] = [missing]
    if recipe.compute == "native":
        for name, found in why.items():
            if found:
                raise ValueError(
                    f"compute=native: {name} ({type(linears[name]).__name__}): {'; '.join(found)}; or exclude the layer, "
                    "or pass recipe.compute=simulated"
                )
    able = {name for name, found in why.items() if not found}
    if not able:
        return f"simulated ({next(iter(why.values()))[0]})", set()
    if recipe.compute == "auto":
        if faster is not None:
            able = faster({name: (_shape(linears[name]), planned[name]) for name in sorted(able)})
            if not able:
                return "simulated (by the measured plan)", set()
        elif device == "cpu" and not tier().library:
            return f"simulated (only torch's int8 GEMM is here: {tier().reason})", set()
    kinds = sorted({kind for name in able for kind in kinds_of(planned[name])}, reverse=True)
    others = f", {len(planned) - len(able)} layers simulated" if len(able) < len(planned) else ""
    return f"native, {' and '.join(kinds)} on {tier() if device in ('cpu', 'meta') else device}{others}", able


def _shape(layer: nn.Module) -> tuple[int, int]:
    out_features, in_features = k_major(layer).shape
    return out_features, in_features


def _recomputing(
    model: nn.Module, recipe: ModelRecipe, plan: dict[str, LinearRecipe | None]
) -> dict[str, Prologue]:
    """The layers that own the activation in front of them, and its function."""
    if not recipe.recompute_activations:
        return {}
    found = {name: site.prologue for name, site in sites(model).items() if plan.get(name) is not None}
    if not found:
        raise ValueError(
            f"recompute_activations=true: {type(model).__name__} has no quantized layer that alone reads an activation (a "
            "module with read_by says where; Hugging Face's have none, and a norm between them is one reader more); "
            "pass recompute_activations=false"
        )
    return found


def apply_recipe(
    model: nn.Module,
    recipe: ModelRecipe,
    *,
    seed: int = 0,
    device: str | None = None,
    faster: Faster | None = None,
) -> SurgeryReport:
    """Convert the linear layers of ``model`` in place; a second call with another recipe replaces the first.

    seed: of the random bits of stochastic recipes. device: the type of the one that the model is going to run on, where
    it isn't there yet. faster: of ``compute=auto``, {layer: (shape [O, I], recipe)} of the layers that could be native ->
    the names of those that shall (``measured_plan``); without it all shall, where there are built kernels. Raises
    ValueError for a pattern that matches nothing, a
    transform that does not divide a layer's widths, a model without linear layers, a model that was loaded quantized,
    a matrix outside of linear layers that the recipe covers (``inventory``), or ``compute=native`` with a recipe or on a
    device that has no native path; TypeError for a linear layer that
    cannot be converted and is not excluded: a subclass, a parametrized or adapted one. Nothing is changed when it
    raises.
    """
    linears, outside = linear_layers(model), outside_matrices(model)
    if not linears:
        raise ValueError(f"{type(model).__name__} has no nn.Linear: there is nothing to quantize")
    check_patterns(recipe, [*linears, *outside])
    plan = {name: recipe.for_layer(name) for name in linears}
    if any(plan.values()):
        check_not_quantized(model)
    _check_layers(model, recipe, linears)
    _check_outside(recipe, outside)
    device = device or next(iter(linears.values())).weight.device.type  # type: ignore[union-attr, assignment]
    compute, native = _native_layers(recipe, plan, linears, str(device), faster)
    reading = _recomputing(model, recipe, plan)
    clock, shared = Clock(seed), SharedCodes()
    for name, site in sites(model).items():
        site.set(deferred=name in reading)
    for name, layer in linears.items():
        layer_recipe = plan[name]
        if layer_recipe is not None:
            QuantizedLayer.convert(
                layer,
                layer_recipe,
                name=name,
                clock=clock,
                native=name in native,
                prologue=reading.get(name),
                shared=shared,
            )
        elif isinstance(layer, QuantizedLayer):
            layer.revert()
    layers = [
        LayerReport(name, tuple(k_major(layer).shape), plan[name], name in native, name in reading)
        for name, layer in linears.items()
    ]
    layers += [LayerReport(name, tuple(matrix.shape), None) for name, matrix in outside.items()]
    return SurgeryReport(clock, tuple(layers), compute)
