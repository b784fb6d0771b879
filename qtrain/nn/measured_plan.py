"""The plan of ``compute=auto``: which layers run natively, by measurement.

A problem is a layer's shape and recipe, the tokens of a forward rounded up to a power of two, and the compute dtype. Each
is timed once, fprop + dgrad + wgrad with everything that quantizes, as a native layer and as the plain nn.Linear in the
compute dtype. Native is chosen where it is the faster of the two. The plain layer stands for the simulated one, which
computes the same GEMMs and quantizes too, by code that the compiler may fuse well or badly: native is taken only where low
precision pays whatever that does.

T tokens, I in, O out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qtrain.quant import LinearRecipe

from .clock import Clock
from .linear import QuantizedLayer

WARMUP, ROUNDS = 2, 7
"""Passages before the clock runs (a first one compiles or chooses kernels) and then, in turns; the least counts, since
whatever disturbs only adds."""


@dataclass(frozen=True)
class Problem:
    """One kind of layer. tokens: T of a forward. dtype: ``bfloat16`` or ``float32``."""

    shape: tuple[int, int]
    recipe: LinearRecipe
    tokens: int
    dtype: str

    @property
    def bucket(self) -> int:
        """The tokens that it is timed with: the next power of two."""
        return 1 << max(0, self.tokens - 1).bit_length()

    @property
    def key(self) -> str:
        """What names it in files."""
        (O, I), operands = self.shape, self.recipe.operands().items()
        said = ", ".join(f"{name}={value}" for name, value in operands if value is not None)
        return f"T={self.bucket} I={I} O={O} {self.dtype}: {said}, saved={self.recipe.saved}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of fprop + dgrad + wgrad, the least of several."""

    native_ms: float
    plain_ms: float

    @property
    def native(self) -> bool:
        """Whether native is the choice."""
        return self.native_ms < self.plain_ms


Plan = Mapping[str, Timing]
Measure = Callable[[Problem, str], Timing]


def time_problem(problem: Problem, device: str) -> Timing:
    """Both layers, in turns, on that device. Random state is left as it was."""
    with torch.random.fork_rng(enabled=True), torch.compiler.set_stance("force_eager"):
        return _time_problem(problem, device)


def _time_problem(problem: Problem, device: str) -> Timing:
    out_features, in_features = problem.shape
    dtype = getattr(torch, problem.dtype)
    layers = []
    for native in (True, False):
        layer = nn.Linear(in_features, out_features, bias=False, device=device)
        if native:
            QuantizedLayer.convert(layer, problem.recipe, name="measured", clock=Clock(), native=True)
        layers.append(layer)
    x = torch.randn(problem.bucket, in_features, device=device).to(dtype).requires_grad_()
    g = torch.randn(problem.bucket, out_features, device=device).to(dtype)

    def passage(layer: nn.Module) -> None:
        x.grad = None
        layer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = layer(x)
        y.backward(g)

    times: list[list[float]] = [[], []]
    for turn in range(WARMUP + ROUNDS):
        for layer, found in zip(layers, times, strict=True):
            elapsed = _elapsed_ms(partial(passage, layer), device)
            if turn >= WARMUP:
                found.append(elapsed)
    native_ms, plain_ms = (min(found) for found in times)
    return Timing(native_ms, plain_ms)


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


def measured(
    problems: Mapping[str, Problem], device: str, known: Plan, measure: Measure = time_problem
) -> dict[str, Timing]:
    """Problem key -> its timing: that of ``known``, or measured now."""
    return {
        key: known[key] if key in known else measure(problem, device) for key, problem in problems.items()
    }


def to_json(plan: Plan) -> dict[str, Any]:
    """Plain containers; ``of_json`` reads them."""
    return {key: {**asdict(timing), "native": timing.native} for key, timing in plan.items()}


def of_json(text: str) -> dict[str, Timing]:
    """Of a file's text. Raises ValueError for one that is no plan."""
    try:
        found = json.loads(text)
        return {key: Timing(float(v["native_ms"]), float(v["plain_ms"])) for key, v in found.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no measured plan: {error!r}") from error


def describe(plan: Plan) -> str:
    """A line a problem."""
    return "\n".join(
        f"{'native' if t.native else 'simulated':<10}{t.native_ms:>9.3f} ms native {t.plain_ms:>9.3f} ms plain  {key}"
        for key, t in plan.items()
    )
