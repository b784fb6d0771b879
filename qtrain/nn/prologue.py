"""Prologues: the elementwise function in front of a linear layer, taken into the layer.

    x = f(h)  or  x = f(gate) * up         y = x W^T

Outside of the layer, x is saved for dW and h for f'. Inside, h (gate, up) alone is: the backward computes x again, and
quantizes it again to the same codes. So the input of an MLP's second matrix, the largest of a block, costs nothing, and
everything is what it was to the bit.

A model says where this can be done: a module with a mapping ``read_by``, such as {"activation": "down"}: what the child
``activation`` gives out, the child ``down`` alone reads. ``activation`` has a ``name`` of FUNCTIONS and takes (h) or
(gate, up).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_aten: Any = torch.ops.aten
Value = Callable[[Tensor], Tensor]
Gradient = Callable[[Tensor, Tensor], Tensor]


def _squared(y: Tensor) -> Tensor:
    """In y's dtype: square() is a pow, which autocast computes in float32 on CUDA."""
    return y * y


def _twice(d: Tensor) -> Tensor:
    return d + d


FUNCTIONS: dict[str, tuple[Value, Gradient]] = {
    "gelu": (F.gelu, lambda d, h: _aten.gelu_backward(d, h)),
    "gelu_tanh": (
        lambda h: F.gelu(h, approximate="tanh"),
        lambda d, h: _aten.gelu_backward(d, h, approximate="tanh"),
    ),
    "relu": (F.relu, lambda d, h: _aten.threshold_backward(d, h, 0)),
    "relu2": (
        lambda h: _squared(F.relu(h)),
        lambda d, h: _aten.threshold_backward(_twice(d * F.relu(h)), h, 0),
    ),
    "silu": (F.silu, lambda d, h: _aten.silu_backward(d, h)),
}
"""f(h), and d f'(h) by the operations of autograd, which gives the same bits."""


@dataclass(frozen=True)
class Prologue:
    """function: of FUNCTIONS. x is f(h), or, where there is an ``up``, f(h) * up, in their dtype."""

    function: str

    def value(self, h: Tensor, up: Tensor | None) -> Tensor:
        y = FUNCTIONS[self.function][0](h)
        return y if up is None else y * up

    def again(self, h: Tensor, up: Tensor | None) -> Tensor:
        """``value`` in the backward. A compiler would merge it with the forward's and keep what it is quantized to; it
        does not see through a view."""
        return self.value(h.unsqueeze(0), None if up is None else up.unsqueeze(0)).squeeze(0)

    def gradients(self, dx: Tensor, h: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(dh, dup) of dx, all of one shape."""
        value, gradient = FUNCTIONS[self.function]
        if up is None:
            return gradient(dx, h), None
        return gradient(dx * up, h), (dx * value(h)).to(up.dtype)


class Deferred(nn.Module):
    """In the place of an activation whose function the layer behind owns: gives its inputs through to it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.deferred = activation

    def forward(self, h: Tensor, up: Tensor | None = None) -> Any:
        return h if up is None else (h, up)


@dataclass(frozen=True)
class Site:
    """Where a layer reads an activation alone: the module that holds both, the activation's name in it, the layer's name
    in the model."""

    parent: nn.Module
    activation: str
    layer: str

    @property
    def module(self) -> nn.Module:
        """The activation itself, deferred or not."""
        found = self.parent.get_submodule(self.activation)
        return found.deferred if isinstance(found, Deferred) else found

    @property
    def prologue(self) -> Prologue:
        return Prologue(str(self.module.name))

    def set(self, *, deferred: bool) -> None:
        setattr(self.parent, self.activation, Deferred(self.module) if deferred else self.module)


def sites(model: nn.Module) -> dict[str, Site]:
    """By the layer's name, what the model's modules say of themselves."""
    found = {}
    for name, module in model.named_modules():
        for activation, layer in getattr(module, "read_by", {}).items():
            full = f"{name}.{layer}" if name else layer
            found[full] = Site(module, activation, full)
    return found
