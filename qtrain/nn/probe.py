"""Looking at a layer from outside: hooks catch what enters and leaves it, a dispatch mode the operands and results
of the matrix products that really execute in between. Nothing here asks the layer what it did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from qtrain_kernels.op import Op
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .linear import k_major
from .native_ops import KINDS
from .prologue import Prologue

GEMM_OPS = {"mm": 0, "addmm": 1, "_int_mm": 0, "_scaled_mm": 0}
"""Matrix products, and where among their arguments the two matrices begin."""

NATIVE_OPS: dict[str, Op[..., Any]] = {kind.multiply.name: kind.multiply for kind in KINDS.values()}
"""Products of our own. Their bodies are opaque to the dispatch mode, so that what they gave out is computed again."""

FP8_SUMS = 2.0**-11
"""What a sum of fp8 products may err, as a share of the sum of their magnitudes: tensor cores keep about 14 bits below the
largest product (DeepSeek-V3, arXiv 2412.19437, section 3.3.2) and round a term down, 2^-13 of it each."""

CHECKED_ROWS = 512
"""Rows of a native product, evenly spaced, that are computed again with the reference."""


@dataclass(frozen=True)
class Product:
    """A matrix product that executed: out [M, N] = a [M, K] . b [N, K]^T, plus something if ``added``.

    Of a native one, ``out`` is the product of its codes alone and ``native`` what it gave out, scales and bias included;
    ``wrong``: how many of the rows looked at are not what its reference gives: to the bit, or, of fp8, within
    ``FP8_SUMS`` and a rounding. ``slack``: how far the sums of an fp8 product may be from ``out``."""

    kernel: str
    a: Tensor
    b: Tensor
    out: Tensor
    added: bool
    native: Tensor | None = None
    wrong: int = 0
    slack: Tensor | None = None


class Watch(TorchDispatchMode):
    """Gives every matrix product that executes to each list that is open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[int, list[Product]] = {}
        self.native_calls = 0
        self.flops: dict[
            str, int
        ] = {}  # of all matrix products that executed, by the precision of their operands

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in NATIVE_OPS:
            self.native_calls += 1
            self._count(*args[:2])
            if self.open:
                self._give(_native_product(name, args, out))
        elif name in GEMM_OPS:
            self._count(args[GEMM_OPS[name]], args[GEMM_OPS[name] + 1].t())
        if self.open and name in GEMM_OPS:
            first = GEMM_OPS[name]
            a, b = args[first : first + 2]
            # Copies: of a sharded parameter the memory is given back after the forward
            a, b = a.detach().clone(), b.detach().clone().t()
            self._give(Product(name, a, b, out.detach().clone(), first == 1))
        return out

    def _give(self, product: Product) -> None:
        for products in self.open.values():
            products.append(product)

    def _count(self, a: Tensor, b: Tensor) -> None:
        """a [M, K] . b [N, K]^T."""
        name = _PRECISIONS.get(a.dtype, str(a.dtype).removeprefix("torch."))
        self.flops[name] = self.flops.get(name, 0) + 2 * a.shape[0] * a.shape[1] * b.shape[0]

    def start(self, products: list[Product]) -> None:
        self.open[id(products)] = products

    def stop(self, products: list[Product]) -> None:
        self.open.pop(id(products), None)


def _native_product(name: str, args: tuple[Any, ...], out: Tensor) -> Product:
    a, b, a_scale, b_scale, bias, dtype = args
    rows = torch.linspace(0, a.shape[0] - 1, min(CHECKED_ROWS, a.shape[0]), device=a.device).long()
    scale = a_scale if a_scale is None or a_scale.shape[0] == 1 else a_scale[rows]
    op = NATIVE_OPS[name]
    given, again = out[rows], op.reference(_rows(a, rows), b, scale, b_scale, bias, dtype)
    same = (again == given) | (again.isnan() & given.isnan())
    slack = None
    if a.dtype != torch.int8:
        magnitudes = [t.to(torch.float32).abs().to(t.dtype) for t in (a, b)]
        slack = FP8_SUMS * op.reference(*magnitudes, None, None, None, torch.float32)
        scaled = FP8_SUMS * op.reference(
            _rows(magnitudes[0], rows), magnitudes[1], scale, b_scale, None, torch.float32
        )
        same |= (again.float() - given.float()).abs() <= scaled + torch.finfo(dtype).eps * again.float().abs()
    codes = op.reference(a, b, None, None, None, torch.float32)
    wrong = int((~same.all(1)).sum())
    return Product(name, a.clone(), b.clone(), codes, False, out.detach().clone(), wrong, slack)


def _rows(codes: Tensor, rows: Tensor) -> Tensor:
    """There is no indexing of float8."""
    return codes.view(torch.int8)[rows].view(codes.dtype)


_PRECISIONS = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float16: "fp16",
}


@dataclass
class Call:
    """One passage through a layer: the tensors at its edges and the products in between. counters: of the clock, given:
    the ranges that have a state, as the layer was entered. needs_dx: whether its input asks for a gradient.

    Parameters are those that the layer was entered with: where they are sharded, it is whole only then. inputs: h and up
    of a layer that owns a prologue, for which edges have ``dh`` and ``dup`` and no dx."""

    counters: Tensor
    needs_dx: bool
    given: dict[str, Tensor] = field(default_factory=dict)
    prologue: Prologue | None = None
    inputs: tuple[Tensor, Tensor | None] | None = None
    edges: dict[str, Tensor] = field(default_factory=dict)
    forward: list[Product] = field(default_factory=list)
    backward: list[Product] = field(default_factory=list)

    def matrix(self, name: str) -> Tensor | None:
        """x, y, g, dx [T, .], weight, dW [O, I], bias or db [1, O] in float32, None where it was not seen."""
        tensor = self.edges.get(name)
        return None if tensor is None else tensor.reshape(-1, tensor.shape[-1]).to(torch.float32)

    def given_out(self, name: str) -> Tensor | None:
        """y, dx, dW as the layer gave them out; of a prologue dh and dup, side by side, for dx."""
        if name != "dx" or self.inputs is None:
            return self.matrix(name)
        parts = [
            self.matrix(edge) for edge, of in zip(("dh", "dup"), self.inputs, strict=True) if of is not None
        ]
        return None if any(part is None for part in parts) else torch.cat(parts, 1)  # type: ignore[arg-type]

    def through(self, name: str, result: Tensor) -> Tensor:
        """A y, dx or dW in the form of ``given_out``: dx [T, I], rounded as x is, goes through the prologue."""
        if name != "dx" or self.inputs is None or self.prologue is None:
            return result
        h, up = self.inputs
        dx = result.to(self.edges["x"].dtype).reshape(h.shape)
        parts = [d for d in self.prologue.gradients(dx, h, up) if d is not None]
        return torch.cat([d.reshape(-1, d.shape[-1]).to(torch.float32) for d in parts], 1)


class LayerProbe:
    """Hooks on one layer; ``calls``: its passages in order, recomputations by checkpointing included.

    During a call the layer sees aliases of its input and parameters, whose gradients are of this call alone, however
    many layers and calls read the same tensor.
    """

    def __init__(self, layer: nn.Module, counters: Tensor, watch: Watch) -> None:
        self.layer, self.counters, self.watch = layer, counters, watch
        self.calls: list[Call] = []
        self._parameters: list[dict[str, Any]] = []
        self.handles = [
            layer.register_forward_pre_hook(self._enter, with_kwargs=True),
            # First of all hooks, which may replace the output, and also after an exception, by which
            # checkpointing ends a recomputation
            layer.register_forward_hook(self._leave, prepend=True, always_call=True),
        ]

    def _alias(self, call: Call, tensor: Tensor, name: str) -> Tensor:
        alias = tensor.view_as(tensor)
        if alias.requires_grad:
            alias.register_hook(lambda grad: self._leave_backward(call, name, grad))
        return alias

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        entering: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        key, x = next(iter(entering.items()))
        h, up = x if isinstance(x, tuple) else (x, None)
        call = Call(self.counters.clone(), h.requires_grad and torch.is_grad_enabled())
        call.prologue = getattr(module, "prologue", None)
        if call.prologue is None:
            call.edges["x"] = h.detach().clone()
        else:
            call.inputs = (h.detach().clone(), None if up is None else up.detach().clone())
            call.edges["x"] = call.prologue.value(*call.inputs)
        quantizers = getattr(module, "quantizers", None)
        if quantizers is not None:
            call.given = {name: t.detach().clone() for name, t in quantizers.given().items()}
        self.calls.append(call)
        self._parameters.append(dict(module._parameters))
        for name, gradient in (("weight", "dW"), ("bias", "db")):
            parameter = module._parameters.get(name)
            if parameter is not None:
                kept = parameter.detach().clone()
                call.edges[name] = k_major(module, kept) if name == "weight" else kept
                module._parameters[name] = self._alias(call, parameter, gradient)  # type: ignore[assignment]
        alias = self._alias(call, h, "dx" if call.prologue is None else "dh")
        entering[key] = alias if up is None else (alias, self._alias(call, up, "dup"))
        self.watch.start(call.forward)
        return tuple(v for k, v in entering.items() if isinstance(k, int)), {
            k: v for k, v in entering.items() if not isinstance(k, int)
        }

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._parameters:
            return  # the layer was not entered: a hook before ours raised
        module._parameters.update(self._parameters.pop())
        call = self.calls[-1]
        self.watch.stop(call.forward)
        if output is None:
            return
        call.edges["y"] = output.detach().clone()
        if output.requires_grad:
            output.register_hook(lambda grad: self._enter_backward(call, grad))

    def _enter_backward(self, call: Call, grad: Tensor | None) -> None:
        if grad is None:  # a layer behind gave out nothing
            return
        call.edges["g"] = grad.detach().clone()
        self.watch.start(call.backward)

    def _leave_backward(self, call: Call, name: str, grad: Tensor | None) -> None:
        self.watch.stop(call.backward)
        if grad is not None:
            kept = grad.detach().clone()
            call.edges[name] = k_major(self.layer, kept) if name == "dW" else kept

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        while self._parameters:
            self.layer._parameters.update(self._parameters.pop())
