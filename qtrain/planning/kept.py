"""What autograd keeps between forward and backward, and for whom: by the kind of module that was running.

Sums agree with ``qtrain.nn.saved_tensors``, which measures; this one knows who asked, and runs on fake tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qtrain.nn.linear import QuantizedLayer

from .operations import Tracker


def kind_of(module: nn.Module) -> str:
    """What of a model a module is, for the table."""
    lowered = type(module).__name__.lower()
    if isinstance(module, nn.Linear | QuantizedLayer) or lowered == "conv1d":
        owns = isinstance(module, QuantizedLayer) and module.prologue is not None
        return "activation" if owns else "linear"
    if "norm" in lowered:
        return "norm"
    if "embedding" in lowered:
        return "embedding"
    if "atten" in lowered:
        return "attention"
    if "mlp" in lowered or "activation" in lowered or lowered in ("silu", "gelu", "relu"):
        return "activation"
    return "other"


class KeptFor:
    """Storages that autograd keeps, by the kind of module that was running, once each, without those of ``known``."""

    def __init__(self, model: nn.Module, tracker: Tracker) -> None:
        self.model, self.tracker = model, tracker
        tracker.know_parameters(model.parameters())
        self.bytes: Counter[str] = Counter()
        self.storages: set[int] = set()
        self._alive: list[Tensor] = []
        self._stack: list[str] = []
        self._known = {id_of(t) for t in (*model.parameters(), *model.buffers())}

    def forget(self) -> None:
        """Begins anew, and holds nothing alive any more."""
        self.bytes, self.storages, self._alive = Counter(), set(), []

    def know(self, tensors: Any) -> None:
        """Storages that are somebody else's."""
        self._known |= {id_of(t) for t in tree_leaves(tensors) if isinstance(t, Tensor)}

    def _pack(self, tensor: Tensor) -> Tensor:
        key = id_of(tensor)
        if key not in self._known:
            self._known.add(key)
            self._alive.append(tensor)
            kind = self._stack[-1] if self._stack else "loss"
            if self.tracker.of_parameters(tensor):
                kind = "weight copies"
            self.bytes[kind] += tensor.untyped_storage().nbytes()
            self.storages.add(self.tracker.name_of(tensor))
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for name, module in self.model.named_modules():
            kind = kind_of(module)
            if kind == "other" and name:
                continue
            handles.append(module.register_forward_pre_hook(lambda *_, kind=kind: self._stack.append(kind)))
            handles.append(module.register_forward_hook(lambda *_: self._stack.pop() and None))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
                yield
        finally:
            for handle in handles:
                handle.remove()


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
