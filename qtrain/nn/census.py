"""The census proves what ran: which GEMMs, on which numbers, and whether they are the configured ones.

Names and counters prove nothing: a bf16 matmul can stand beside any counter. The census runs one eager step
under outside observation (``probe``) and holds every operand and result to the oracle (``observation``).
``compare_compiled`` (``compiled``) then ties the compiled step to the eager one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .linear import QuantizedLayer
from .observation import Observation, missing, observe_layer
from .probe import NATIVE_OPS, LayerProbe, Watch
from .quantizers import notes_put_back
from .surgery import SurgeryReport


class CensusError(RuntimeError):
    """What ran is not what was configured."""


@dataclass(frozen=True)
class Census:
    """What a probe step showed. ``observations``: three pairs of operands, y, dx, dW and db of each passage through
    a layer. flops: of all matrix products that executed, by the precision of their operands (attention's own kernels
    are none)."""

    observations: tuple[Observation, ...]
    flops: Mapping[str, int] = field(default_factory=dict)

    def failures(self) -> list[str]:
        """A sentence for each thing that is not as configured."""
        return [f"{o.layer} {o.name}: {o.problem}" for o in self.observations if o.problem]

    def check(self) -> None:
        """Raises CensusError, naming the first failures, unless there are none."""
        failures = self.failures()
        if failures:
            more = f" (and {len(failures) - 5} more)" if len(failures) > 5 else ""
            raise CensusError("what ran is not what was configured: " + "; ".join(failures[:5]) + more)

    def quantized(self) -> list[Observation]:
        """The observations of quantized operands."""
        return [o for o in self.observations if o.levels is not None]

    def flops_summary(self) -> str:
        """``int8 96.2%, bf16 3.8%``: the share of the products' FLOPs in each precision."""
        total = sum(self.flops.values())
        shares = sorted(self.flops.items(), key=lambda item: -item[1])
        return ", ".join(f"{name} {flops / total:.1%}" for name, flops in shares) or "none seen"

    def summary(self) -> str:
        """One line."""
        quantized, failures = self.quantized(), self.failures()
        if not quantized:
            return f"no quantized operand, {len(failures)} failures"
        worst = min(quantized, key=lambda o: math.inf if math.isnan(o.sqnr_db) else o.sqnr_db)
        layers = len({o.layer for o in quantized})
        return (
            f"{len(quantized)} quantized operands in {layers} layers seen in their GEMMs, {len(failures)} failures; "
            f"lowest SQNR {worst.sqnr_db:.1f} dB ({worst.layer} {worst.name})"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain containers; numbers that JSON lacks (nan, inf) as None."""
        rows = [
            {k: (None if isinstance(v, float) and not math.isfinite(v) else v) for k, v in asdict(o).items()}
            for o in self.observations
        ]
        return {
            "summary": self.summary(),
            "failures": self.failures(),
            "flops": dict(self.flops),
            "flops_summary": self.flops_summary(),
            "observations": rows,
        }

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console
        from rich.table import Table

        table = Table(title=self.summary())
        for column in (
            "operand",
            "spec",
            "layers",
            "kernel",
            "dtype",
            "distinct",
            "SQNR dB: min",
            "median",
            "max",
        ):
            table.add_column(column)
        groups: dict[tuple[str, ...], list[Observation]] = {}
        for o in self.observations:
            groups.setdefault((o.name, o.spec, o.kernel, o.dtype), []).append(o)
        for (name, spec, kernel, dtype), rows in groups.items():
            values = sorted(o.sqnr_db for o in rows if not math.isnan(o.sqnr_db)) or [math.nan]
            most = max((o.distinct or 0 for o in rows), default=0)
            limit = rows[0].levels
            shown = f"{most} of {limit}" if limit else ""
            numbers = [f"{v:.1f}" for v in (values[0], values[len(values) // 2], values[-1])]
            table.add_row(name, spec, str(len(rows)), kernel, dtype, shown, *numbers)
        out = StringIO()
        Console(file=out, width=150, markup=False).print(table)
        return out.getvalue()


def gradients_of_probe(
    model: nn.Module, probe: Callable[[nn.Module], Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient by parameter name) of one step; gradients that were there before are put back."""
    kept = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    try:
        with torch.random.fork_rng(enabled=True):
            loss = probe(model)
            loss.backward()
        return float(loss.detach()), {
            n: p.grad.detach() for n, p in model.named_parameters() if p.grad is not None
        }
    finally:
        for name, p in model.named_parameters():
            p.grad = kept[name]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by the names that surgery gave them: torch.compile's wrapper adds a part to each."""
    return {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}


def probed_step(
    model: nn.Module, report: SurgeryReport, probe: Callable[[nn.Module], Tensor], watch: Watch | None = None
) -> dict[str, LayerProbe]:
    """Runs ``probe(model) -> scalar loss`` forward and backward once, eagerly, and gives what was seen of the planned
    layers that the model has. watch: sees the matrix products too. The model's parameters, gradients, random state, clock,
    ranges and compiled code are left as they were."""
    layers, counters = named_layers(model), report.clock.counters
    kept, seen = counters.clone(), watch or Watch()
    probes = {name: LayerProbe(layers[name], counters, seen) for name in report.plan if name in layers}
    try:
        with (
            torch.compiler.set_stance("force_eager"),
            notes_put_back(model),
            nullcontext() if watch is None else watch,
        ):
            gradients_of_probe(model, probe)
    finally:
        counters.copy_(kept)
        for layer_probe in probes.values():
            layer_probe.remove()
    return probes


def take_census(model: nn.Module, report: SurgeryReport, probe: Callable[[nn.Module], Tensor]) -> Census:
    """Run ``probe(model) -> scalar loss`` forward and backward once, eagerly, and look at every planned layer.

    The model's parameters, gradients, random state, clock and compiled code are left as they were. A probe in which
    a planned layer takes no part is a failure of the census, and so is a layer that the model does not have (the
    names of a wrapped model differ) or that quantizes against the plan.
    """
    layers, watch, calls = named_layers(model), Watch(), _native_calls()
    probes = probed_step(model, report, probe, watch)
    observations: list[Observation] = []
    if _native_calls() - calls != watch.native_calls:
        found = f"count {_native_calls() - calls} executions where {watch.native_calls} products were seen"
        observations.append(missing(" and ".join(NATIVE_OPS), found))
    for layer in report.layers:
        module = layers.get(layer.name)
        if layer.recipe is None:
            if isinstance(module, QuantizedLayer) and module.recipe.quantizes:
                observations.append(missing(layer.name, "is configured as high precision and was quantized"))
        elif layer.name not in probes:
            near = next((n for n in layers if n.endswith(f".{layer.name}")), "")
            hint = f" (there is {near}: pass the model that apply_recipe got)" if near else ""
            observations.append(missing(layer.name, f"is no module of the model{hint}"))
        else:
            observations += observe_layer(layer.name, layer.recipe, probes[layer.name], native=layer.native)
    return Census(tuple(observations), watch.flops)


def _native_calls() -> int:
    """What the counters inside the bodies of the ops say."""
    return sum(op.calls for op in NATIVE_OPS.values())
