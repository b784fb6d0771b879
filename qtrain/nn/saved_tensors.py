"""What autograd keeps between forward and backward: bytes of distinct storages, however many layers saved them.

Only what is saved counts: neither parameters nor what a caller holds anyway (``but``), neither the allocator's rounding nor
what lives during a kernel alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Saved:
    """One storage: its size in bytes, and dtype and shape of the first tensor in it that was saved."""

    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self) -> str:
        size = f"{self.nbytes:>12,}"
        return f"{size}  {str(self.dtype).removeprefix('torch.'):<14}{' x '.join(map(str, self.shape))}"


def saved_for_backward(run: Callable[[], object], but: Iterable[Tensor] = ()) -> list[Saved]:
    """The storages that ``run()`` saves, in their order, without those of ``but`` (a model's parameters, its input)."""
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    kept: list[Tensor] = []  # alive, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    found = []
    for tensor in kept:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            found.append(Saved(storage.nbytes(), tensor.dtype, tuple(tensor.shape)))
    del result
    return found


def saved_bytes(run: Callable[[], object], but: Iterable[Tensor] = ()) -> int:
    """The sum of ``saved_for_backward``."""
    return sum(saved.nbytes for saved in saved_for_backward(run, but))
