"""``python -m qtrain_kernels.bench --op NAME``: an op beside its rivals and beside a copy, after its contract.

The contract runs first and a failure ends the program before any number. Then, for each workload, the op, the
eager reference, torch.compile of that reference and a plain copy are timed in turns, one call of each a round in
rotating order, so that clocks, heat and neighbours weigh on all alike. The copy is the roof of a memory-bound op:
``percent_of_copy`` is the op's least traffic (``Workload.bytes``) per second over the copied bytes per second.

On CUDA a buffer larger than L2 is overwritten before each call, outside the timed interval: inputs come from
memory, and the queue hides the launch. On CPU, calls run back to back.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qtrain_kernels import contract
from qtrain_kernels.op import Op, Workload, all_ops

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # read plus written: well beyond L2 (60 MB) and L3
FLUSH_BYTES = 1 << 28  # beyond the L2 of any present GPU
ROUNDS = {"cuda": 100, "cpu": 15}
WARMUP = 3

Row = dict[str, Any]


def contenders(
    op: Op[Any, Any], inputs: tuple[Any, ...], rivals: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """What is timed on ``inputs``: the op first, then the rivals asked for."""
    torch.compiler.reset()  # each workload's shape is compiled for itself, not as a dynamic shape of the last
    compiled = torch.compile(op.reference, dynamic=False)
    known: dict[str, Callable[..., Any]] = {"eager": op.reference, "compiled": compiled}
    if unknown := set(rivals) - set(known):
        raise ValueError(f"unknown rivals {sorted(unknown)}; the rivals are {sorted(known)}")
    functions: dict[str, Callable[..., Any]] = {"op": op} | {name: known[name] for name in rivals}
    return {name: functools.partial(f, *inputs) for name, f in functions.items()}


def interleaved_ms(
    functions: dict[str, Callable[[], Any]], device: str, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each call, ``rounds`` a function, in turns."""
    for function in functions.values():
        for _ in range(WARMUP):
            function()
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    time_once = _cuda_timer() if device == "cuda" else _cpu_ms
    for i in range(rounds):
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(time_once(functions[name]))
    return times


def _cpu_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _cuda_timer() -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def once(function: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return once


def agreement(got: Any, want: Any) -> float:
    """The smallest share, over the outputs, of elements equal to the reference's."""
    shares = [
        torch.isclose(a.double(), b.double(), rtol=0, atol=0, equal_nan=True).double().mean().item()
        if b.numel()
        else 1.0
        for a, b in zip(contract.outputs(got), contract.outputs(want), strict=True)
    ]
    return min(shares)


def measure(
    op: Op[Any, Any], workload: Workload, device: str, rounds: int, rivals: Sequence[str], common: Row
) -> list[Row]:
    """One row a contender, the copy included."""
    inputs = workload.inputs(device)
    functions = contenders(op, inputs, rivals)
    want = op.reference(*workload.inputs(device))
    agrees = {name: agreement(function(), want) for name, function in functions.items()}
    functions |= {name: make(inputs) for name, make in workload.rivals.items()}
    source = torch.ones(COPY_BYTES[device] // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    functions["copy"] = lambda: target.copy_(source)
    quantiles = {
        name: torch.tensor(ms, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        for name, ms in interleaved_ms(functions, device, rounds).items()
    }
    copy_gb_per_s = COPY_BYTES[device] / quantiles["copy"][1].item() * 1e-6
    rows = []
    for name, quantile in quantiles.items():
        p20, median, p80 = quantile.tolist()
        gb_per_s = (COPY_BYTES[device] if name == "copy" else workload.bytes) / median * 1e-6
        row = {
            "op": op.name,
            "workload": workload.name,
            "contender": name,
            "median_ms": median,
            "p20_ms": p20,
        }
        row |= {"p80_ms": p80, "gb_per_s": gb_per_s, "percent_of_copy": 100 * gb_per_s / copy_gb_per_s}
        row |= {"tflop_per_s": workload.flops / median * 1e-9 if workload.flops and name != "copy" else None}
        row |= {"share_equal_to_reference": agrees.get(name), "rounds": rounds, **common}
        rows.append(row)
    return rows


def provenance(op: Op[Any, Any], device: str) -> Row:
    """Where the numbers come from; part of every row."""
    try:
        triton_version: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton_version = None
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    )
    kernel = op.kernels.get(device)
    return {
        "implementation": kernel if kernel else f"the eager reference (no {device} kernel is registered)",
        "device": name,
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _commit(),
        "utc": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _commit() -> str | None:
    """The checkout's commit, "-dirty" with uncommitted changes beside it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changes = subprocess.run([*git, "status", "--porcelain", "--", "."], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return (
        head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "") if head.returncode == 0 else None
    )


def write_atomically(path: Path, text: str) -> None:
    """A reader of ``path`` sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| workload | contender | median ms | p20 | p80 | Gop/s | GB/s | % of copy | equal to reference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        times = f"{r['median_ms']:.4f} | {r['p20_ms']:.4f} | {r['p80_ms']:.4f}"
        agrees = (
            "" if r["share_equal_to_reference"] is None else f"{100 * r['share_equal_to_reference']:.4f}%"
        )
        rate = "" if r["tflop_per_s"] is None else f"{1e3 * r['tflop_per_s']:.0f}"
        speed = f"{rate} | {r['gb_per_s']:.1f} | {r['percent_of_copy']:.1f}"
        lines.append(f"| {r['workload']} | {r['contender']} | {times} | {speed} | {agrees} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qtrain_kernels.bench", description=__doc__)
    parser.add_argument("--op", required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workload", help="only the workloads whose name holds this text")
    parser.add_argument("--rivals", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, help=f"timed calls of each contender (default: {ROUNDS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    args = parser.parse_args(argv)
    ops = all_ops()
    if args.op not in ops:
        parser.error(f"unknown op {args.op!r}; the ops are {', '.join(ops)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda, but torch finds no CUDA device; --device cpu times the CPU implementation"
        )
    op = ops[args.op]
    every = op.workloads(args.device)
    workloads = [w for w in every if args.workload is None or args.workload in w.name]
    if not workloads:
        parser.error(f"no workload holds {args.workload!r}; they are {', '.join(w.name for w in every)}")
    if broken := contract.failures(op, args.device):
        raise SystemExit("\n".join(["contract broken, nothing is measured:", *broken]))
    common = provenance(op, args.device)
    print(f"{op.name}: contract holds on {len(op.cases)} cases; measuring {common['implementation']}")
    print(", ".join(f"{key} {common[key]}" for key in ("device", "torch", "triton", "commit")))
    rows: list[Row] = []
    for workload in workloads:
        rounds = args.rounds or ROUNDS[args.device]
        rows += measure(op, workload, args.device, rounds, args.rivals, common)
    print(table(rows))
    if args.json is not None:
        write_atomically(args.json, json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
