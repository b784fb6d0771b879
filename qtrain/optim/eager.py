"""One AdamW step of one parameter by plain torch, in chunks of rows, so that decoded moments never exist at once.

The operations are those of torch's single-tensor loop, in its order, so that with float32 states the bits are too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from qtrain_kernels.counter_hash import random_bits, stream_id, uniform
from torch import Tensor

from .sharding import RowShard
from .states import Rows, StateLayout

# Elements worked on at once: on a CPU, 1 MiB a float32 temporary (measured best of 2^14 to 2^20); elsewhere
# 64 MiB each, few enough launches.
CPU_CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 24
Layouts = tuple[StateLayout, StateLayout]


class Numbers(NamedTuple):
    """The numbers of one step: ``w = decay * w - step_size * m / (sqrt(v) / root + eps)``."""

    decay: float
    beta1: float
    beta2: float
    step_size: float
    root: float
    eps: float


class Part(NamedTuple):
    """One parameter in one step: its local rows, their gradient and states (``held``, as ``layouts`` say)."""

    name: str
    weights: Tensor
    gradient: Tensor
    held: Mapping[str, Tensor]
    layouts: Layouts
    shard: RowShard
    now: Numbers


def numbers(group: Mapping[str, Any], step: int) -> Numbers:
    """Of the step-th step, from 1, of a parameter group."""
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    return Numbers(
        decay=1 - lr * group["weight_decay"],
        beta1=beta1,
        beta2=beta2,
        step_size=lr / (1 - beta1**step),
        root=(1 - beta2**step) ** 0.5,
        eps=group["eps"],
    )


def _chunks(p: Tensor, by_rows: bool) -> Iterator[tuple[int, Rows]]:
    """(index of the first row, rows) that cover the local tensor p along dim 0."""
    chunk = CPU_CHUNK if p.device.type == "cpu" else DEVICE_CHUNK
    if not by_rows or p.dim() == 0 or p.numel() <= chunk:
        yield 0, ...
        return
    rows = max(1, chunk * p.shape[0] // p.numel())
    for start in range(0, p.shape[0], rows):
        yield start, slice(start, start + rows)


def _update(w: Tensor, g: Tensor, m: Tensor, v: Tensor, now: Numbers) -> None:
    """One step of float32 weights, in place, m and v too; the operations of torch's single-tensor loop."""
    w.mul_(now.decay)
    m.lerp_(g, 1 - now.beta1)
    v.mul_(now.beta2).addcmul_(g, g, value=1 - now.beta2)
    denominator = v.sqrt().div_(now.root).add_(now.eps)
    w.addcdiv_(m, denominator, value=-now.step_size)


def step_eagerly(part: Part, step: int, seed: int) -> None:
    """Steps weights and states in place. step, seed: of stochastic rounding. A collective where the moments are
    sharded and share a scale over the tensor."""
    name, weights, gradient, held, layouts, shard, now = part
    over_shards = None if shard.mesh is None else shard.maximum
    for start, rows in _chunks(weights, all(layout.by_rows for layout in layouts)):
        some = weights[rows]
        m, v = (layout.read(held, rows) for layout in layouts)
        w = some if weights.dtype == torch.float32 else some.to(torch.float32)
        _update(w, gradient[rows].to(torch.float32), m, v, now)
        if w is not some:
            some.copy_(w)
        for layout, values in zip(layouts, (m, v), strict=True):
            noise = _noise(layout, name, seed, step, shard.start + start, values)
            layout.write(held, values, rows, noise, over_shards)


def _noise(layout: StateLayout, name: str, seed: int, step: int, start: int, values: Tensor) -> Tensor | None:
    """Uniform [n, K] for stochastic rounding, named by (seed, step, parameter and moment, row, column): the same
    bits whatever the chunks, the shards and the resumes. None where rounding is to nearest."""
    if layout.spec is None or not layout.spec.stochastic:
        return None
    seeds = torch.tensor([seed, step], dtype=torch.int64, device=values.device)
    columns = layout.matrix[1]
    stream = stream_id(f"{name}/{layout.kind}")
    return uniform(random_bits(seeds[0], seeds[1], stream, values.numel() // columns, columns, start))
