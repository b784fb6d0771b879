"""The plan against numbers that were measured before: one linear layer on an H200 (kernels/README.md).

Forward, dgrad and wgrad at 15,872 tokens, quantization included, bf16 parameters, replayed by a CUDA graph.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from qtrain.nn.surgery import apply_recipe
from qtrain.quant import ModelRecipe

from .devices import Device
from .fake_model import fake_mode, to_fake
from .operations import Tracker
from .step_time import seconds_of

TOKENS = 15872
# I, O -> ms of bf16, native int8, native fp8 with a scale a row; commit 518c744
LAYERS: dict[tuple[int, int], tuple[float, float, float]] = {
    (4096, 12288): (6.42, 5.35, 6.93),
    (4096, 4096): (2.07, 1.75, 2.25),
    (4096, 16384): (8.62, 7.19, 9.12),
    (16384, 4096): (8.65, 6.82, 9.23),
}
# GPU time by kernel at 4096 -> 12288 with the GEMMs of commit 2f6987f, ms: native int8, native fp8 with a scale a row
LATER: dict[str, float] = {"native int8": 3.916, "native fp8": 4.308}


def recipe_of(kind: str, scale: str = "row") -> ModelRecipe:
    """``int8`` with the forward's codes reused; ``fp8`` quantized anew for each GEMM."""
    spec = f"{'int8' if kind == 'int8' else 'e4m3'}_{scale}"
    reuse = kind == "int8"
    linear = {
        "fprop": {"input": spec, "weight": spec},
        "dgrad": {"grad_output": spec, "weight": "fprop" if reuse else spec},
        "wgrad": {"grad_output": spec, "input": "fprop" if reuse else spec},
        "saved": "quantized",
    }
    return ModelRecipe(linear=linear, compute="native")  # type: ignore[arg-type]


class _OneLayer(nn.Sequential):
    """A linear layer and its input, for surgery by name."""


def predicted_linear(
    device: Device, shape: tuple[int, int, int], recipe: ModelRecipe | None
) -> dict[str, float]:
    """Seconds of fprop, dgrad and wgrad of one layer T, I, O by what takes them; None: bf16."""
    tokens, columns, rows = shape
    with torch.device("meta"):
        layer = _OneLayer(nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16))
    if recipe is not None:
        apply_recipe(layer, recipe, device="meta")
    found: Counter[str] = Counter()
    with fake_mode():
        to_fake(layer)
        x = torch.empty(tokens, columns, dtype=torch.bfloat16, requires_grad=True)
        g: Tensor = torch.empty(tokens, rows, dtype=torch.bfloat16)
        with Tracker() as tracker:
            layer(x).backward(g)
    found.update(seconds_of(tracker.operations, device, compiled=False))
    return dict(found)


def rows(device: Device) -> list[tuple[str, float, float]]:
    """(what, predicted ms, measured ms); device: the H200's."""
    found = []
    for name, recipe, column in (
        ("bf16", None, 0),
        ("native int8", recipe_of("int8"), 1),
        ("native fp8", recipe_of("fp8"), 2),
    ):
        total = [0.0, 0.0]
        for (columns, outputs), measured in LAYERS.items():
            ms = 1e3 * sum(predicted_linear(device, (TOKENS, columns, outputs), recipe).values())
            found.append((f"{name}, {columns} -> {outputs}", ms, measured[column]))
            total = [total[0] + ms, total[1] + measured[column]]
        found.append((f"{name}, the sum of four", total[0], total[1]))
    for name, measured_ms in LATER.items():
        recipe = recipe_of(name.split()[1])
        ms = 1e3 * sum(predicted_linear(device, (TOKENS, 4096, 12288), recipe).values())
        found.append((f"{name}, 4096 -> 12288, later GEMMs", ms, measured_ms))
    return found
