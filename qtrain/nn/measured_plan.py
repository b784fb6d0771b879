"""The plan of ``compute=auto``: which layers run natively, by measurement.

A problem is a layer's shape and recipe, the tokens of a forward rounded up to a power of two, and the compute dtype. Each
is timed once, fprop + dgrad + wgrad with everything that quantizes, as the native layer and as the simulated one that would
run in its place, both as the run has them: compiled by themselves where it compiles, else eager.

    native, unless   simulated < 0.9 native,   in the least of their times and in the median

The margin is for noise, and native has it because its layer also keeps less for the backward where codes are saved, and
reads its operands once. Least times are those of an undisturbed machine; on a busy one no passage of two threads is
undisturbed and the least of a few dozen is chance (up to twice either way, measured), while medians come out alike: there
the two seldom agree on anything but equality.

T tokens, I in, O out.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qtrain.quant import LinearRecipe

from .clock import Clock
from .linear import QuantizedLayer

WARMUP, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 2, 7, 40, 1.0
"""Passages before the clock runs (the first compiles, or chooses kernels), then rounds of both layers in turns until so
many seconds are gone."""
MARGIN = 0.1


@dataclass(frozen=True)
class Problem:
    """One kind of layer. tokens: T of a forward. dtype: ``bfloat16`` or ``float32``. compiled: whether the run is."""

    shape: tuple[int, int]
    recipe: LinearRecipe
    tokens: int
    dtype: str
    compiled: bool = False

    @property
    def bucket(self) -> int:
        """The tokens that it is timed with: the next power of two."""
        return 1 << max(0, self.tokens - 1).bit_length()

    @property
    def key(self) -> str:
        """What names it in files, among problems that are all compiled or all eager."""
        (O, I), operands = self.shape, self.recipe.operands().items()
        said = ", ".join(f"{name}={value}" for name, value in operands if value is not None)
        return f"T={self.bucket} I={I} O={O} {self.dtype}: {said}, saved={self.recipe.saved}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of fprop + dgrad + wgrad of both layers, (least, median) of several passages."""

    native_ms: tuple[float, float]
    simulated_ms: tuple[float, float]

    @property
    def native(self) -> bool:
        """Whether native is the choice."""
        pairs = zip(self.native_ms, self.simulated_ms, strict=True)
        return any(simulated >= (1 - MARGIN) * native for native, simulated in pairs)


@dataclass(frozen=True)
class Plan:
    """where: what its times hold for (device, versions, whether compiled). timings: by the problems' keys."""

    where: Mapping[str, Any]
    timings: Mapping[str, Timing]


Measure = Callable[[Problem, str], Timing]


def time_problem(problem: Problem, device: str) -> Timing:
    """Both layers, in turns, on that device. Random state is left as it was, and no compiled code stays: what was
    compiled before is compiled anew at its next call."""
    with torch.random.fork_rng([torch.cuda.current_device()] if device == "cuda" else []):
        if not problem.compiled:
            with torch.compiler.set_stance("force_eager"):
                return _time_problem(problem, device)
        try:
            return _time_problem(problem, device)
        finally:
            torch.compiler.reset()  # the code of many kinds of layers would pass the limit of recompilations


def _time_problem(problem: Problem, device: str) -> Timing:
    out_features, in_features = problem.shape
    dtype = getattr(torch, problem.dtype)
    passages = []
    x = torch.randn(problem.bucket, in_features, device=device).to(dtype).requires_grad_()
    g = torch.randn(problem.bucket, out_features, device=device).to(dtype)

    def passage(layer: nn.Module, run: Callable[..., Any]) -> None:
        x.grad = None
        layer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = run(x)
        y.backward(g)

    for native in (True, False):
        layer = nn.Linear(in_features, out_features, bias=False, device=device)
        QuantizedLayer.convert(layer, problem.recipe, name="measured", clock=Clock(), native=native)
        run = torch.compile(layer, dynamic=False) if problem.compiled else layer
        passages.append(partial(passage, layer, run))
    for _ in range(WARMUP):
        for run in passages:
            run()
    return Timing(*_least_and_median_ms(passages, device))


def _least_and_median_ms(passages: Sequence[Callable[[], None]], device: str) -> list[tuple[float, float]]:
    """In turns, each first as often as the others: the caches are another's, and a load meets all alike."""
    times: list[list[float]] = [[] for _ in passages]
    end = time.perf_counter() + SECONDS
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for i in range(len(passages)):
            which = (i + turn) % len(passages)
            times[which].append(_elapsed_ms(passages[which], device))
    return [(min(found), statistics.median(found)) for found in times]


def _elapsed_ms(run: Callable[[], None], device: str) -> float:
    if device != "cuda":
        begun = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begun)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def to_json(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Plain containers; ``of_json`` reads them."""
    return [
        {
            "where": dict(plan.where),
            "layers": {key: {**asdict(t), "native": t.native} for key, t in plan.timings.items()},
        }
        for plan in plans
    ]


def of_json(text: str) -> list[Plan]:
    """Of a file's text. Raises ValueError for one that holds no plans."""
    try:
        return [
            Plan(
                dict(found["where"]),
                {
                    key: Timing(_pair(v["native_ms"]), _pair(v["simulated_ms"]))
                    for key, v in found["layers"].items()
                },
            )
            for found in json.loads(text)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"other contents: {error!r}") from error


def _pair(found: Any) -> tuple[float, float]:
    least, median = found
    return float(least), float(median)
