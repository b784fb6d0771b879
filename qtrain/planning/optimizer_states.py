"""What an optimizer holds and what a step of it moves, from the optimizer itself.

Of our AdamW the bytes of states are those of its layouts, exact, of all rows or of the first process's under FSDP2; of
others they are counted on fake parameters (torch's), or by the library's rule (bitsandbytes'). What an eager step moves is
counted in a real step of a small matrix; the fused kernel of a GPU reads and writes everything once.

bitsandbytes, n elements, 8 bits: n bytes and a float32 maximum a block of 256, each state; one map of 256 float32 a kind of state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from qtrain.optim import AdamW, parameter_groups
from qtrain.optim.eager import CPU_CHUNK, DEVICE_CHUNK
from qtrain.optim.fused import refusal_of_layouts

from .operations import Tracker

Make = Callable[[list[dict[str, Any]]], Optimizer]
_SAMPLE = (64, 1024)  # large against what a step allocates whatever its size
_BNB_BLOCK, _BNB_MAP = 256, 256 * 4


@dataclass(frozen=True)
class OptimizerBytes:
    """Of one process. states: held, exact. as_float32: the same moments in float32. moved: read and written by a step.
    transient: alive for a moment. eager: elements that are not stepped by a fused kernel."""

    states: int
    as_float32: int
    moved: float
    transient: int
    eager: int


def rows_of(shape: tuple[int, ...], processes: int) -> int:
    """Rows of dim 0 that the first process holds (``qtrain.optim.sharding``): no other holds more."""
    return -(-shape[0] // processes) if shape else 1


def local_elements(shape: tuple[int, ...], processes: int) -> int:
    """Elements of the first process."""
    return (
        math.prod(shape) if not shape or processes == 1 else rows_of(shape, processes) * math.prod(shape[1:])
    )


def optimizer_bytes(
    make: Make, model: nn.Module, weight_decay: float, *, device_type: str, shards: int = 1
) -> OptimizerBytes:
    """make: groups -> the optimizer. model: on the meta device. shards: processes over which FSDP2 spreads rows.
    Raises ValueError for an optimizer whose states are not known here."""
    groups = parameter_groups(model, weight_decay)
    optimizer = make(groups)
    if isinstance(optimizer, AdamW):
        return _ours(optimizer, make, device_type, shards)
    if type(optimizer).__module__ == "qtrain.optim.bnb":
        return _bnb(optimizer, shards)
    return _of_torch(make, model, optimizer, shards)


def _ours(optimizer: AdamW, make: Make, device_type: str, shards: int) -> OptimizerBytes:
    states = as_float32 = eager = transient = 0
    moved = 0.0
    rates: dict[bool, tuple[float, float]] = {}
    for _, p, group in optimizer._named_parameters():
        elements, size = local_elements(tuple(p.shape), shards), p.element_size()
        layouts = [layout.of_rows(rows_of(layout.shape, shards)) for layout in optimizer._layouts(p, group)]
        held = sum(
            math.prod(shape) * dtype.itemsize
            for layout in layouts
            for shape, dtype in layout.expected().values()
        )
        states += held + 4  # and the step, float32
        as_float32 += 8 * elements + 4
        if (
            device_type == "cuda"
            and optimizer.fused is not False
            and refusal_of_layouts((layouts[0], layouts[1])) is None
        ):
            moved += 3 * size * elements + 2 * held
            continue
        quantized = any(layout.spec is not None for layout in layouts)
        if quantized not in rates:
            rates[quantized] = _sampled(make, quantized)
        per_element, alive = rates[quantized]
        chunk = CPU_CHUNK if device_type == "cpu" else DEVICE_CHUNK
        moved, eager = moved + per_element * elements, eager + elements
        transient = max(transient, int(alive * min(elements, chunk)))
    return OptimizerBytes(states, as_float32, moved, transient, eager)


def _sampled(make: Make, quantize_states: bool) -> tuple[float, float]:
    """(bytes moved, bytes alive at once) an element, of one eager step of a matrix."""
    p = nn.Parameter(torch.ones(_SAMPLE))
    optimizer = make(
        [{"params": [p], "names": ["sample"], "weight_decay": 0.1, "quantize_states": quantize_states}]
    )
    for _ in range(2):  # the first makes the states
        p.grad = torch.ones(_SAMPLE)
        with Tracker() as tracker:
            optimizer.step()
    return sum(o.nbytes for o in tracker.operations) / p.numel(), tracker.peak / p.numel()


def _bnb(optimizer: Any, shards: int) -> OptimizerBytes:
    if shards > 1:
        raise ValueError(
            "bitsandbytes' states under trainer.strategy=fsdp2: take trainer=ddp, or optimizer=adamw"
        )
    states = as_float32 = 0
    moved, kinds = 0.0, 1 if optimizer.optimizer_name == "lion" else 2
    any_8bit = False
    for group in optimizer.param_groups:
        for p in group["params"]:
            n = p.numel()
            eight = optimizer._bits(group, p) == 8
            any_8bit |= eight
            one = n + 4 * -(-n // _BNB_BLOCK) if eight else 4 * n
            states += kinds * one
            as_float32 += kinds * 4 * n
            moved += 12 * n + 2 * kinds * one
    return OptimizerBytes(states + (kinds * _BNB_MAP if any_8bit else 0), as_float32, moved, 0, 0)


def _of_torch(make: Make, model: nn.Module, optimizer: Optimizer, shards: int) -> OptimizerBytes:
    if shards > 1:
        raise ValueError(f"{type(optimizer).__name__} under trainer.strategy=fsdp2: take optimizer=adamw")
    with FakeTensorMode() as mode:
        fakes = [
            nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in model.parameters() if p.requires_grad
        ]
        fake = make([{"params": fakes}])
        for p in fakes:
            p.grad = torch.empty_like(p)
        fake.step()
    del mode
    states = sum(
        t.numel() * t.element_size()
        for held in fake.state.values()
        for t in held.values()
        if isinstance(t, Tensor)
    )
    elements = sum(p.numel() for p in fakes)
    if optimizer.defaults.get("fused"):
        return OptimizerBytes(states, states, 12.0 * elements + 2 * states, 0, 0)
    sample = nn.Parameter(torch.ones(_SAMPLE))
    sampled = make([{"params": [sample]}])
    for _ in range(2):
        sample.grad = torch.ones(_SAMPLE)
        with Tracker() as tracker:
            sampled.step()
    rate, alive = (sum(o.nbytes for o in tracker.operations) / sample.numel(), tracker.peak / sample.numel())
    return OptimizerBytes(
        states, states, rate * elements, int(alive * max(p.numel() for p in fakes)), elements
    )
