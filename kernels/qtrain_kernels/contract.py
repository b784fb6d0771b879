"""The contract of an op: on every case, each implementation does what the reference does.

    values         equal to the reference on CPU, bit for bit unless the op states a tolerance; NaN equals NaN; int8 codes
                   differ by one at most, in at most the share that the op states (or in one element)
    outputs        same shape, strides and dtype, on the device of the inputs; every element written (memory that is
                   handed out uninitialised is poisoned first)
    determinism    a second run gives the same bits
    inputs         unchanged, but for those that the op says it writes, which are compared like outputs
    execution      the op's counter moves by one a call, under the implementation that was meant

The tests, the interpreter check and the benchmark share this one list, so that no number is printed from a
kernel the tests would refuse. The meaning of the reference itself is tested against numpy in the test suite.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.deterministic
from torch import Tensor

from qtrain_kernels.op import Op


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors are filled: NaN for floats, the largest value for integers."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def to_device(x: Any, device: str) -> Any:
    """``x`` on ``device`` with the same size, strides and storage offset, whatever they are; lists likewise."""
    if isinstance(x, list):
        return [to_device(each, device) for each in x]
    if not isinstance(x, Tensor):
        return x
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return storage.to(device, copy=True).as_strided(x.size(), x.stride(), x.storage_offset())


def outputs(result: Any) -> tuple[Tensor, ...]:
    """An op's result as a tuple."""
    return () if result is None else (result,) if isinstance(result, Tensor) else tuple(result)


def effects(op: Op[Any, Any], run: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """What ``run`` returns, then what it wrote in place: the tensors of the arguments that the op mutates."""
    result = outputs(run(*inputs))
    written = [x for i, x in enumerate(inputs) if i in _mutated(op)]
    return result + tuple(t for x in written for t in (x if isinstance(x, list) else [x]))


def _mutated(op: Op[Any, Any]) -> set[int]:
    """Positions of the arguments that the op writes."""
    names = list(inspect.signature(op.reference).parameters) if op.mutates else []
    return {names.index(name) for name in op.mutates}


def difference(op: Op[Any, Any], got: Tensor, want: Tensor) -> str | None:
    """How ``got`` breaks the contract against ``want``, or None."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{list(got.shape)} {got.dtype} instead of {list(want.shape)} {want.dtype}"
    if want.numel() and got.stride() != want.stride():
        return f"strides {got.stride()} instead of {want.stride()}"
    got, want = got.cpu(), want.cpu()
    if got.is_floating_point() and got.element_size() == 1:  # codes: the sign of a zero counts
        got, want = got.view(torch.uint8), want.view(torch.uint8)
    if op.code_flips and want.dtype == torch.int8:
        apart = (got.int() - want.int()).abs()
        few = int(apart.count_nonzero()) <= math.ceil(op.code_flips * want.numel())
        wrong = apart > few
    else:
        wrong = ~torch.isclose(got.double(), want.double(), rtol=op.rtol, atol=op.atol, equal_nan=True)
    if not wrong.any():
        return None
    first = tuple(wrong.nonzero()[0].tolist())
    return f"{int(wrong.sum())} of {want.numel()} differ, first at {first}: {got[first]} instead of {want[first]}"


def failures(
    op: Op[Any, Any], device: str = "cpu", implementation: Callable[..., Any] | None = None
) -> list[str]:
    """What breaks the contract, one line each; empty if nothing does.

    Without ``implementation`` the registered op is called and its counter is checked; with one, that function.
    """
    run = op if implementation is None else implementation
    found = []
    for name, case in op.cases.items():
        try:
            found += [
                f"{op.name} {name}: {line}" for line in _case_failures(op, case, device, run, run is op)
            ]
        except Exception as error:  # a crash is a failure of this case, and the other cases still count
            found.append(f"{op.name} {name}: {type(error).__name__}: {error}")
    return found


def _case_failures(
    op: Op[Any, Any], case: Callable[[], tuple[Any, ...]], device: str, run: Callable[..., Any], counted: bool
) -> list[str]:
    want = effects(op, op.reference, case())
    key = device if device in op.kernels else "reference"
    before = op.executions[key]
    runs, found = [], []
    for _ in range(2):
        inputs = tuple(to_device(x, device) for x in case())
        with poisoned_memory():
            runs.append(effects(op, run, inputs))
        for i, (x, original) in enumerate(zip(inputs, case(), strict=True)):
            pairs = zip(x, original, strict=True) if isinstance(x, list) else [(x, original)]
            if i not in _mutated(op) and not all(same_bits(a, b) for a, b in pairs if isinstance(a, Tensor)):
                found.append(f"argument {i} was changed")
    if counted and op.executions[key] - before != 2:
        found.append(f"the {key!r} body ran {op.executions[key] - before} times in 2 calls")
    if len(runs[0]) != len(want):
        return [*found, f"{len(runs[0])} outputs instead of {len(want)}"]
    for i, (got, again, expected) in enumerate(zip(*runs, want, strict=True)):
        if got.device.type != device:
            found.append(f"output {i} is on {got.device}")
        if (line := difference(op, got, expected)) is not None:
            found.append(f"output {i}: {line}")
        if not same_bits(got, again):
            found.append(f"output {i}: two runs differ")
    return found


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bytes, NaN payloads included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)))
