"""Seconds of a training step, from the operations of its trace and the rates of a device.

eager       sum over operations of  max(FLOPs / rate, bytes / bandwidth) + a kernel's overhead;
            at least what Python takes to launch them all
compiled    elementwise neighbours are one kernel: what only they read is not written (``fused_bytes``); nothing of Python
step        micro-batches * (forward + backward [+ forward of blocks, where they are computed again])
            + update, clipping included + communication that nothing hides
MFU         tokens/s * FLOPs a token / data-sheet bf16 peak                           (PaLM, 2204.02311, appendix B)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .communication import Communication
from .devices import Device
from .operations import ATTENTION, GEMM, QUANTIZE, READING_TWICE, Operation, fused_bytes
from .trace import Piece, StepTrace

_CLIPPING_BYTES = 12  # an element: the norm reads a gradient, scaling reads and writes it


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what takes them; ``total``; host: of Python, where the code is eager and that is longer than all else it computes, else 0; tokens_per_s: of all
    processes. mfu: None where the FLOPs a token are unknown."""

    parts: Mapping[str, float]
    total: float
    host: float
    communication: Communication
    tokens_per_s: float
    mfu: float | None

    @property
    def bound_by(self) -> str:
        if self.host:
            return "Python (compile=true takes it away)"
        return max(self.parts, key=self.parts.__getitem__)


def seconds_of(
    operations: Iterable[Operation],
    device: Device,
    *,
    compiled: bool,
    kept: Iterable[int] = (),
    head: bool = False,
) -> dict[str, float]:
    """By what takes them: ``GEMM bf16``, ..., ``attention``, ``quantization``, ``elementwise`` (of the head: ``loss``)."""
    ops = list(operations)
    found: defaultdict[str, float] = defaultdict(float)
    moved = fused_bytes(ops, kept) if compiled else ((o, o.nbytes) for o in ops)
    before = ""
    for operation, nbytes in moved:
        if operation.kind == GEMM:
            found[f"GEMM {operation.precision}"] += device.gemm_seconds(
                operation.precision, operation.flops, nbytes
            )
            before = ""
        elif operation.kind == ATTENTION:
            found["attention"] += device.attention_seconds(operation.flops, nbytes)
            before = ""
        else:
            part = "quantization" if operation.kind == QUANTIZE else "loss" if head else "elementwise"
            alone = not compiled or operation.name.startswith("qtrain::") or before != part
            share = device.quantize_fraction if operation.name in READING_TWICE else 1.0
            found[part] += device.copy_seconds(nbytes) / share + (device.kernel_us * 1e-6 if alone else 0.0)
            before = part
    return dict(found)


def launches(trace: StepTrace, checkpointing: bool) -> int:
    """Eager operations of a micro-batch."""
    count = 0
    for piece, many in trace.pieces():
        again = checkpointing and all(piece is not outer for outer in (trace.embed, trace.head))
        count += many * (len(piece.forward) * (2 if again else 1) + len(piece.backward))
    return count


def micro_batch(
    trace: StepTrace, device: Device, *, compiled: bool, checkpointing: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of forward and of backward, by part."""
    forward: defaultdict[str, float] = defaultdict(float)
    backward: defaultdict[str, float] = defaultdict(float)
    for piece, count in trace.pieces():
        head = piece is trace.head
        first, second = _piece(piece, device, compiled, head)
        _add(forward, first, count)
        _add(backward, second, count)
        if checkpointing and not head and piece is not trace.embed:
            _add(backward, first, count)
    return dict(forward), dict(backward)


def _add(to: defaultdict[str, float], seconds: Mapping[str, float], count: int) -> None:
    for part, value in seconds.items():
        to[part] += count * value


def _piece(
    piece: Piece, device: Device, compiled: bool, head: bool
) -> tuple[dict[str, float], dict[str, float]]:
    compiled = compiled and not head  # the loss stays outside of what training compiles
    return (
        seconds_of(piece.forward, device, compiled=compiled, kept=piece.kept_storages, head=head),
        seconds_of(piece.backward, device, compiled=compiled, head=head),
    )


def plan_time(
    forward: Mapping[str, float],
    backward: Mapping[str, float],
    device: Device,
    *,
    micro_batches: int,
    host_operations: int,
    optimizer_moved: float,
    local_parameters: int,
    communication: Communication,
    step_tokens: int,
    processes: int,
    flops_per_token: float | None,
) -> StepTime:
    """forward, backward: of a micro-batch. host_operations: eager ones of it, 0 where compiled. local_parameters: of this
    process, which it clips and updates. step_tokens: of all processes."""
    parts: defaultdict[str, float] = defaultdict(float)
    for seconds in (forward, backward):
        _add(parts, seconds, micro_batches)
    computing = sum(parts.values())
    host = micro_batches * host_operations * device.host_us * 1e-6
    parts["optimizer"] = device.copy_seconds(optimizer_moved + _CLIPPING_BYTES * local_parameters)
    if communication.exposed_seconds:
        parts["communication"] = communication.exposed_seconds
    total = max(computing, host) + parts["optimizer"] + communication.exposed_seconds
    rate = step_tokens / total
    peak = device.peak_tflops.get("bf16")
    mfu = (
        None
        if flops_per_token is None or peak is None
        else rate * flops_per_token / (processes * peak * 1e12)
    )
    return StepTime(dict(parts), total, host if host > computing else 0.0, communication, rate, mfu)
