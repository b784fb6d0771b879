"""``define_op``: one declaration turns an eager reference into the custom op ``qtrain::NAME``.

    reference   plain PyTorch; the op's meaning, its schema (from the annotations) and its default kernel
    fake        the outputs' shapes and dtypes, for tracing
    cuda, cpu   "module:function" of a faster kernel, imported at its first launch and never before
    cases       named inputs on which every kernel must agree with the reference
    workloads   named inputs on which the op is timed

A custom op is opaque to torch.compile, so the bodies below run in eager and in compiled execution alike and
never while tracing. That is what makes ``op.calls`` evidence that a GEMM or a quantizer really ran; a counter
in ``Module.forward`` would break the graph or count traces. (A CUDA graph replays kernels without their Python
body: it counts the capture only.)

Importing an op probes no device and needs no triton: files named ``*_triton`` and ``*_cpu`` hold kernels and are imported
by their launch alone.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from types import ModuleType
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
NAMESPACE = "qtrain"
DEVICES = ("cuda", "cpu")
KERNEL_FILES = ("_triton", "_cpu")


@dataclass(frozen=True)
class Workload:
    """One timed problem of an op.

    ``inputs``: device -> the op's arguments. ``bytes``: the least traffic any kernel needs, each input read once
    and each output written once. ``flops``: multiply and add counted apart, 0 for a memory-bound op. ``rivals``: what
    is timed beside the op though it computes something else (a GEMM in another precision): inputs -> what is called.
    """

    name: str
    inputs: Callable[[str], tuple[Any, ...]]
    bytes: int
    flops: int = 0
    rivals: Mapping[str, Callable[[tuple[Any, ...]], Callable[[], Any]]] = field(default_factory=dict)


@dataclass(eq=False)
class Op(Generic[P, R]):
    """A registered op. Call it like the reference; ``kernel(device)`` gives what runs on that device."""

    name: str
    reference: Callable[P, R]
    cases: Mapping[str, Callable[[], tuple[Any, ...]]]
    workloads: Callable[[str], Sequence[Workload]]
    kernels: dict[str, str]
    mutates: tuple[str, ...]
    rtol: float
    atol: float
    code_flips: float
    executions: dict[str, int] = field(default_factory=dict)
    overload: Any = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.overload(*args, **kwargs)

    @property
    def calls(self) -> int:
        """Executions of the op's body so far in this process, over all implementations."""
        return sum(self.executions.values())

    def kernel(self, device: str) -> Callable[P, R]:
        """The implementation that runs on ``device`` ("cuda", "cpu"), uncounted; the reference where none is."""
        target = self.kernels.get(device)
        return self.reference if target is None else _load(target)

    def _body(self, implementation: str, function: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """``function()`` resolved at each call, run on the device of its tensors, and counted once it returned."""
        self.executions[implementation] = 0

        def body(*args: Any, **kwargs: Any) -> Any:
            with _current_device(args, implementation):
                result = function()(*args, **kwargs)
            with self._lock:  # the autograd engine calls from a thread a device
                self.executions[implementation] += 1
            return result

        return body


_REGISTRY: dict[str, Op[Any, Any]] = {}


def define_op(
    name: str,
    reference: Callable[P, R],
    *,
    fake: Callable[P, R],
    cases: Mapping[str, Callable[[], tuple[Any, ...]]],
    workloads: Callable[[str], Sequence[Workload]],
    cuda: str | None = None,
    cpu: str | None = None,
    mutates: Sequence[str] = (),
    rtol: float = 0.0,
    atol: float = 0.0,
    code_flips: float = 0.0,
) -> Op[P, R]:
    """Register ``qtrain::name``; see the module docstring for the parts.

    ``cases`` return CPU tensors and build them at each call; ``workloads`` maps a device type to its problems.
    ``cuda`` and ``cpu`` are ``"package.module:function"`` with the reference's signature. ``mutates`` names the
    arguments that are written in place. ``rtol`` and ``atol`` bound every kernel's floats against the reference's,
    ``code_flips`` the share of an int8 output that may differ, by one; zero, the default, means bit-equal (one NaN
    equals another). Raises ValueError for a name that is taken, for no cases
    and for a malformed kernel path.
    """
    if name in _REGISTRY:
        raise ValueError(f"op {name!r} is defined twice; op names are unique within qtrain_kernels")
    if not cases:
        raise ValueError(
            f"op {name!r} has no cases; give at least one, since an op without cases is never checked"
        )
    kernels = {
        device: target for device, target in zip(DEVICES, (cuda, cpu), strict=True) if target is not None
    }
    for target in kernels.values():
        if target.count(":") != 1:
            raise ValueError(f'kernel {target!r} of op {name!r} must read "package.module:function"')
    op = Op(name, reference, dict(cases), workloads, kernels, tuple(mutates), rtol, atol, code_flips)
    definition = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        op._body("reference", lambda: reference),
        mutates_args=tuple(mutates),
        schema=torch.library.infer_schema(_resolved(reference), mutates_args=tuple(mutates)),
    )
    definition.register_fake(fake)
    for device in kernels:
        definition.register_kernel(device)(op._body(device, functools.partial(op.kernel, device)))
    op.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    _REGISTRY[name] = op
    return op


def all_ops() -> dict[str, Op[Any, Any]]:
    """Every op of the package by name, found by importing its files, except those of kernels."""
    package = importlib.import_module(__package__ or "qtrain_kernels")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.endswith(KERNEL_FILES):
            importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_REGISTRY.items()))


def kernel_module(op: Op[Any, Any], device: str) -> ModuleType:
    """The module that holds ``op``'s kernel for ``device``, imported now."""
    op.kernel(device)
    return importlib.import_module(op.kernels[device].split(":")[0])


@functools.cache
def _load(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(f"{target} needs triton: pip install triton", name="triton") from error


def _resolved(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``'s signature with its string annotations evaluated, which is what infer_schema reads."""

    def prototype() -> None: ...

    prototype.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    return prototype


def _current_device(args: tuple[Any, ...], implementation: str) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""
    if implementation == "cuda":
        for arg in chain.from_iterable(x if isinstance(x, list) else [x] for x in args):
            if isinstance(arg, Tensor) and arg.is_cuda:
                return torch.cuda.device_of(arg)
    return nullcontext()
