"""The two collectives that carry rows, and what they carried.

    all_gather    every process gives its rows to all                 [c, b] -> [W c, b]
    all_to_all    every process gives each other one its rows         [W c, b] -> [W, c, b]

One call of torch.distributed each, on one tensor of uint8 that holds the rows of all pieces one after the other. It is
that tensor's bytes that are counted, not what a format promises.

Bytes are those that leave one process: (W - 1) times its rows, or (W - 1) / W of its buffer, which is what every
bandwidth-optimal algorithm sends. float32 beside it is what torch's own collective for the same elements sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

FLOAT32_BYTES = 4


class Traffic:
    """Bytes that left this process between ``start`` and ``stop``, by purpose: {purpose: [sent, what float32 would have
    sent]}."""

    def __init__(self) -> None:
        self.bytes: dict[str, list[int]] = {}
        self.counting = False

    def start(self) -> None:
        """A new step begins."""
        self.bytes, self.counting = {}, True

    def stop(self) -> None:
        """What follows is no step's: a validation."""
        self.counting = False

    def add(self, purpose: str, sent: int, float32: int) -> None:
        if not self.counting:
            return
        held = self.bytes.setdefault(purpose, [0, 0])
        held[0] += sent
        held[1] += float32

    def row(self) -> dict[str, int]:
        """As metrics: what was sent, in all and by purpose, and what float32 and bfloat16 would have sent."""
        found = {f"communication/{purpose}_bytes_sent": sent for purpose, (sent, _) in self.bytes.items()}
        sent, float32 = (sum(pair[i] for pair in self.bytes.values()) for i in range(2))
        return {
            "communication/bytes_sent": sent,
            **found,
            "communication/bytes_float32": float32,
            "communication/bytes_bfloat16": float32 // 2,
        }


class Exchange:
    """The processes of ``group`` (None: all), and the account of what they send."""

    def __init__(self, traffic: Traffic, group: dist.ProcessGroup | None = None) -> None:
        self.traffic, self.group = traffic, group

    @property
    def world(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def all_gather(self, parts: Sequence[Tensor], purpose: str, elements: int) -> list[Tensor]:
        """parts: [c, b] uint8 of each piece -> [W c, b] of each. elements: numbers that ``parts`` stand for."""
        mine = torch.cat([part.flatten() for part in parts])
        everyones = mine.new_empty(self.world * mine.numel())
        _all_gather(everyones, mine, group=self.group)
        others = self.world - 1
        self.traffic.add(purpose, others * mine.nbytes, others * elements * FLOAT32_BYTES)
        found = everyones.view(self.world, -1).split([part.numel() for part in parts], 1)
        return [f.reshape(-1, part.shape[1]) for f, part in zip(found, parts, strict=True)]

    def all_to_all(self, parts: Sequence[Tensor], purpose: str, elements: int) -> list[Tensor]:
        """parts: [W c, b] uint8 of each piece, the rows of process 0 first -> [W, c, b]: this process's rows, as each
        process has them. elements: numbers that ``parts`` stand for."""
        world = self.world
        theirs = torch.cat([part.reshape(world, -1) for part in parts], 1)
        mine = torch.empty_like(theirs)
        dist.all_to_all_single(mine, theirs, group=self.group)
        self.traffic.add(
            purpose, theirs.nbytes * (world - 1) // world, elements * FLOAT32_BYTES * (world - 1) // world
        )
        found = mine.split([part.numel() // world for part in parts], 1)
        return [f.reshape(world, -1, part.shape[1]) for f, part in zip(found, parts, strict=True)]


def _all_gather(output: Tensor, input: Tensor, *, group: Any) -> None:
    """torch 2.13 has renamed it."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(output, input, group=group)
