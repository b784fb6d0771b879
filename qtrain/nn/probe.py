"""Looking at a layer from outside: hooks catch what enters and leaves it, a dispatch mode the operands of the
matrix products that really execute in between. Nothing here asks the layer what it did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qtrain.quant import LinearRecipe

GEMM_OPS = {"mm": 0, "addmm": 1, "_int_mm": 0, "_scaled_mm": 0}
"""Matrix products, and where among their arguments the two matrices begin."""


@dataclass(frozen=True)
class Product:
    """A matrix product that executed: a [M, K] . b [N, K]^T."""

    kernel: str
    a: Tensor
    b: Tensor


class Watch(TorchDispatchMode):
    """Collects the matrix products that execute, for whoever asks next."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []
        self.active = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.active and name in GEMM_OPS:
            a, b = args[GEMM_OPS[name] : GEMM_OPS[name] + 2]
            self.products.append(Product(name, a.detach(), b.detach().t()))
        return out

    def take(self) -> list[Product]:
        products, self.products = self.products, []
        return products


class LayerProbe:
    """Hooks on one layer: what enters and leaves it, and the products in between."""

    def __init__(self, layer: nn.Linear, recipe: LinearRecipe, watch: Watch) -> None:
        self.layer, self.recipe, self.watch = layer, recipe, watch
        self.seen: dict[str, Tensor] = {}
        self.products: dict[str, list[Product]] = {"forward": [], "backward": []}
        self.handles = [
            layer.register_forward_pre_hook(self._enter),
            layer.register_forward_hook(self._leave),
            layer.weight.register_hook(lambda grad: self._leave_backward("dW", grad)),
        ]

    def _begin(self) -> None:
        self.watch.take()
        self.watch.active = True

    def _end(self, direction: str) -> None:
        if self.watch.active:
            self.watch.active = False
            self.products[direction] = self.watch.take()

    def _enter(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        alias = args[0].view_as(args[0])  # its gradient is this layer's alone, however many read the input
        self.seen["x"] = alias.detach()
        if alias.requires_grad:
            alias.register_hook(lambda grad: self._leave_backward("dx", grad))
        self._begin()
        return (alias, *args[1:])

    def _leave(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._end("forward")
        self.seen["y"] = output.detach()
        if output.requires_grad:
            output.register_hook(self._enter_backward)

    def _enter_backward(self, grad: Tensor) -> None:
        self.seen["g"] = grad.detach().clone()
        self._begin()

    def _leave_backward(self, name: str, grad: Tensor) -> None:
        self._end("backward")
        self.seen[name] = grad.detach().clone()

    def matrix(self, name: str) -> Tensor | None:
        """x, y, g, dx [T, .] or dW [O, I] in float32, None where it was not seen."""
        tensor = self.seen.get(name)
        return None if tensor is None else tensor.reshape(-1, tensor.shape[-1]).to(torch.float32)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
