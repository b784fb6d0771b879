"""What a piece of eager code does to memory and to the machine: every operation below autograd, with its bytes and FLOPs,
and how many bytes live at once.

    GEMM       2 M N K FLOPs a matrix product                       flash attention   2 * 2 S^2 D a head forward (half of it
    others     the bytes of what they read and write                                  where causal), 5/2 of that backward

Works alike on real tensors, where it measures, and on fake ones (``FakeTensorMode``), where it foretells. What is allocated
inside of a kernel is not seen, nor are the allocator's rounding and fragments.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GEMM, ATTENTION, QUANTIZE, ELEMENTWISE = "gemm", "attention", "quantize", "elementwise"
# Files whose arithmetic is quantization; what they multiply is a GEMM all the same
_QUANTIZING = ("/nn/simulated.py", "/nn/native.py", "/quant/qtensor.py", "/nn/quantizers.py")
_PRECISIONS = {
    torch.bfloat16: "bf16",
    torch.float16: "bf16",  # the same rate on every device here
    torch.float32: "fp32",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
# Of the forward's operations, those of the backward: five products of S x S against two
BACKWARD_PRODUCTS = 2.5
# Reads one row, or one number, of many: an index and what it picks
_PICKING = ("aten::embedding", "aten::nll_loss_forward", "aten::gather", "aten::index")
# First for the maxima, then for the codes
READING_TWICE = ("qtrain::quantize_rows_columns", "qtrain::quantize_fp8_rows_columns")
# Allocates, writes nothing
_ALLOCATING = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::detach")


@dataclass(frozen=True)
class Operation:
    """One kernel. kind: GEMM, ATTENTION, QUANTIZE or ELEMENTWISE. precision: of its products (``bf16``, ``fp32``, ``int8``,
    ``fp8``), empty where there are none. read, written: (storage, bytes) of each tensor. storage: a number of the
    tracker's, the same for all views."""

    name: str
    kind: str
    precision: str
    flops: float
    read: tuple[tuple[int, int], ...]
    written: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Read and written, each tensor once."""
        return sum(n for _, n in self.read) + sum(n for _, n in self.written)


def _renamed(name: str, outputs: list[Tensor]) -> str:
    """An op that writes codes along rows and along columns is another kernel where rows alone are wanted: one read."""
    if name in READING_TWICE and outputs[2].numel() == 0:
        return "qtrain::quantize_rows"
    return name


def _tensor_bytes(tensor: Tensor) -> int:
    """Of its elements; of an expanded one no more than there are."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class Tracker(TorchDispatchMode):
    """While it is on: ``operations``, in order, and ``live``, the bytes of storages that were made under it and still exist,
    with their ``peak``. Storages made before count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.live = self.peak = 0
        self._names: dict[int, int] = {}
        self._made = 0
        self._of_parameters: set[int] = set()

    def name_of(self, tensor: Tensor) -> int:
        """A number of the tensor's storage, never given again."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._names:
            self._made += 1
            self._names[key] = self._made
            weakref.finalize(storage, self._names.pop, key, None).atexit = False
        return self._names[key]

    def know_parameters(self, tensors: Iterable[Tensor]) -> None:
        """What is computed from these alone is ``of_parameters``."""
        self._of_parameters |= {self.name_of(t) for t in tensors}

    def of_parameters(self, tensor: Tensor) -> bool:
        """Whether no activation went into it: a copy of a weight in another dtype, its codes."""
        return self.name_of(tensor) in self._of_parameters

    def _born(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._died, nbytes).atexit = False

    def _died(self, nbytes: int) -> None:
        self.live -= nbytes

    def taken(self) -> tuple[Operation, ...]:
        """The operations so far; the next ones begin a new list."""
        found = tuple(self.operations)
        self.operations.clear()
        return found

    def restart_peak(self) -> None:
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
            return result
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        known = {t.untyped_storage()._cdata for t in inputs}
        fresh: list[Tensor] = []
        for t in outputs:
            key = t.untyped_storage()._cdata
            if key not in known and key not in self._names:
                known.add(key)
                fresh.append(t)
        name = _renamed(func._schema.name, outputs)
        constant = bool(inputs) and all(self.of_parameters(t) for t in inputs)
        for t in fresh:
            self._born(t)
            if constant:
                self._of_parameters.add(self.name_of(t))
        mutates = func._schema.is_mutable
        if name not in _ALLOCATING and (fresh or mutates):
            self.operations.append(self._operation(name, func, args, inputs, fresh, mutates))
        return result

    def _operation(
        self, name: str, func: Any, args: Any, inputs: list[Tensor], fresh: list[Tensor], mutates: bool
    ) -> Operation:
        written = [(self.name_of(t), _tensor_bytes(t)) for t in fresh]
        if mutates and not fresh:
            written = [(self.name_of(inputs[0]), _tensor_bytes(inputs[0]))]
        read: dict[int, int] = {}
        for t in inputs:
            key = self.name_of(t)
            read[key] = max(read.get(key, 0), _tensor_bytes(t))
        if name in _PICKING:
            out = sum(n for _, n in written)
            read = {key: min(n, out) for key, n in read.items()}
        if name in ("aten::fill_", "aten::zero_", "aten::zeros", "aten::ones_like", "aten::zeros_like"):
            read = {}
        kind, precision, flops = classified(name, args, inputs)
        if name in READING_TWICE:
            read = {key: 2 * n for key, n in read.items()}
        return Operation(name, kind, precision, flops, tuple(read.items()), tuple(written))


def classified(name: str, args: Any, inputs: list[Tensor]) -> tuple[str, str, float]:
    """(kind, precision, FLOPs) of an operation by its name, arguments and tensors."""
    if name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::_int_mm", "aten::_scaled_mm"):
        a, b = inputs[-2:] if name in ("aten::mm", "aten::addmm", "aten::bmm") else inputs[:2]
        return GEMM, _PRECISIONS.get(a.dtype, "fp32"), 2.0 * a.numel() * b.shape[-1]
    if name in ("qtrain::int8_scaled_mm", "qtrain::fp8_scaled_mm"):
        a, b = inputs[:2]  # [M, K], [N, K]
        return GEMM, "int8" if "int8" in name else "fp8", 2.0 * a.numel() * b.shape[0]
    if "scaled_dot_product" in name:
        return ATTENTION, *_attention(name, args, inputs)
    if name.startswith("qtrain::") or _quantizing():
        return QUANTIZE, "", 0.0
    return ELEMENTWISE, "", 0.0


def _attention(name: str, args: Any, inputs: list[Tensor]) -> tuple[str, float]:
    backward = "backward" in name
    q, k = inputs[1:3] if backward else inputs[:2]
    products = 2 * 2.0 * q.numel() * k.shape[-2]  # q k^T and p v
    causal = any(value is True for value in args)
    return _PRECISIONS.get(q.dtype, "fp32"), products * (0.5 if causal else 1.0) * (
        BACKWARD_PRODUCTS if backward else 1.0
    )


def _quantizing() -> bool:
    """Whether a quantized layer asked for it, and not for an activation that it owns."""
    frame: Any = sys._getframe(3)
    while frame is not None:
        if frame.f_code.co_filename.endswith("/nn/prologue.py"):
            return False
        if frame.f_code.co_filename.endswith(_QUANTIZING):
            return True
        frame = frame.f_back
    return False


def _visible(operation: Operation) -> bool:
    """Not merged by a compiler: calls of a library or of a kernel of ours."""
    return operation.kind in (GEMM, ATTENTION) or operation.name.startswith("qtrain::")


def fused_bytes(operations: Iterable[Operation], kept: Iterable[int] = ()) -> Iterator[tuple[Operation, int]]:
    """Operations and the bytes that each moves where neighbours that are elementwise are one kernel: what lies between two
    of them is not written unless a library's kernel or a later run of neighbours reads it, or it is ``kept`` (storages); what nobody
    reads afterwards is a result (a block's output, a gradient), and written. Each run reads a tensor once."""
    ops = list(operations)
    seen_outside = set(kept)
    made_in_run: set[int] = set()
    last_read: dict[int, int] = {}
    for i, operation in enumerate(ops):
        visible = _visible(operation)
        seen_outside.update(key for key, _ in operation.read if visible or key not in made_in_run)
        last_read.update((key, i) for key, _ in operation.read)
        made_in_run = set() if visible else made_in_run | {key for key, _ in operation.written}
    made_inside: set[int] = set()
    read_once: set[int] = set()
    for i, operation in enumerate(ops):
        if _visible(operation):
            made_inside, read_once = set(), set()
            yield operation, operation.nbytes
            continue
        moved = 0
        for key, nbytes in operation.read:
            if key not in made_inside and key not in read_once:
                moved += nbytes
                read_once.add(key)
        for key, nbytes in operation.written:
            made_inside.add(key)
            if key in seen_outside or last_read.get(key, -1) <= i:
                moved += nbytes
        yield operation, moved
