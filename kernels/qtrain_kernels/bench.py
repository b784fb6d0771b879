"""``python -m qtrain_kernels.bench``: ops beside their rivals and beside the machine's roof, after their contracts.

The contract runs first, and of an op that breaks it no number is printed. Then, for each workload, the op, the
eager reference, torch.compile of that reference, the op's own rivals and the roof are timed in turns, one call of each
a round in rotating order, so that clocks, heat and neighbours weigh on all alike. The roof is measured, not read in a
data sheet:

    percent_of_copy    the op's least traffic (``Workload.bytes``) a second, of the bytes a second of a plain copy
    percent_of_peak    of the operations a second of the best bf16 GEMM (cuBLAS on CUDA); of twice that for operands
                       of 8 bits, and ``peak`` says so. Rivals on such operands are held to the same number

On CUDA a buffer larger than L2 is overwritten before each call, outside the timed interval: inputs come from
memory, and the queue hides the launch. On CPU, calls run back to back.

Without --op all ops are measured, on at most 2 workloads each (--limit), with contracts checked in parallel processes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import functools
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qtrain_kernels import contract
from qtrain_kernels.op import Op, Workload, all_ops

COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # read plus written: well beyond L2 (60 MB) and L3
PEAK_SHAPES = {
    "cuda": ((8192, 8192, 8192), (16384, 16384, 4096), (4096, 16384, 16384)),
    "cpu": ((1024, 1024, 1024),),
}
"""M, N, K of the bf16 GEMMs whose best is the peak: one shape alone was passed by other GEMMs of the same run (H200)."""
FLUSH_BYTES = (
    1 << 30
)  # beyond the L2 of any present GPU; takes 0.3 ms, which hides the launch of what follows
ROUNDS = {"cuda": 100, "cpu": 15}
LEAST_ROUNDS = 7
SECONDS = 2.0  # of the timed rounds of a workload: a slow rival takes rounds, not minutes
WARMUP = 3
WORKERS = 6  # processes of the contracts: each holds a CUDA context of about 0.5 GB

PEAK = "bf16 peak"
Row = dict[str, Any]


def contenders(
    op: Op[Any, Any], inputs: tuple[Any, ...], rivals: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """What is timed on ``inputs``: the op first, then the rivals asked for. Of an op that writes in place none: eager, its
    reference is no rival but a definition, and many tensors would be compiled one by one."""
    torch.compiler.reset()  # each workload's shape is compiled for itself, not as a dynamic shape of the last
    compiled = torch.compile(op.reference, dynamic=False)
    known: dict[str, Callable[..., Any]] = {"eager": op.reference, "compiled": compiled}
    if unknown := set(rivals) - set(known):
        raise ValueError(f"unknown rivals {sorted(unknown)}; the rivals are {sorted(known)}")
    functions: dict[str, Callable[..., Any]] = {"op": op}
    functions |= {} if op.mutates else {name: known[name] for name in rivals}
    return {name: functools.partial(f, *inputs) for name, f in functions.items()}


def interleaved_ms(
    functions: dict[str, Callable[[], Any]], device: str, rounds: int, seconds: float = float("inf")
) -> dict[str, list[float]]:
    """Milliseconds of each call, one of each function a round, in turns: ``rounds`` of them, or as many (at least
    ``LEAST_ROUNDS``) as begin within ``seconds``."""
    for function in functions.values():
        for _ in range(WARMUP):
            function()
    names = list(functions)
    times: dict[str, list[float]] = {name: [] for name in names}
    time_once = _cuda_timer() if device == "cuda" else _cpu_ms
    start = time.perf_counter()
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.perf_counter() - start > seconds:
            break
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(time_once(functions[name]))
    return times


def roof(
    device: str, shapes: Sequence[tuple[int, int, int]] = ()
) -> dict[str, tuple[Callable[[], Any], float]]:
    """name -> (what is timed, bytes or operations of one call): a copy, and GEMMs of ``PEAK_SHAPES`` and ``shapes``."""
    copied = COPY_BYTES[device]
    source = torch.ones(copied // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: dict[str, tuple[Callable[[], Any], float]] = {
        "copy": (lambda: target.copy_(source), float(copied))
    }
    for M, N, K in dict.fromkeys([*PEAK_SHAPES[device], *shapes]):
        a, b = (
            torch.randn(rows, K, device=device, dtype=torch.bfloat16) for rows in (M, N)
        )  # zeros run faster
        run = functools.partial(torch.mm, a, b.t(), out=a.new_empty(M, N))
        found[f"{PEAK} {M}x{N}x{K}"] = run, 2.0 * M * N * K
    return found


def rates(roofs: Mapping[str, float], median_ms: Mapping[str, float]) -> dict[str, float]:
    """{"copy": bytes a second, "bf16 peak": operations a second of the fastest GEMM}, from the work of one call each."""
    per_s = {name: work / median_ms[name] * 1e3 for name, work in roofs.items()}
    peaks = [rate for name, rate in per_s.items() if name.startswith(PEAK)]
    return {"copy": per_s["copy"], PEAK: max(peaks)} if peaks else {"copy": per_s["copy"]}


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
    """One row a contender, the roof included. A rival that fails is a row that says why; the op itself raises."""
    inputs = workload.inputs(device)
    functions = contenders(op, inputs, rivals)
    want = contract.effects(op, op.reference, workload.inputs(device))
    agrees = {"op": agreement(contract.effects(op, op, workload.inputs(device)), want)}
    missing: dict[str, str] = {}
    for name in set(functions) - {"op"}:
        try:
            agrees[name] = agreement(functions[name](), want)
        except Exception as error:
            missing[name] = _reason(error)
    del want
    for name, make in workload.rivals.items():
        try:
            functions[name] = make(inputs)
            functions[name]()
        except Exception as error:
            missing[name] = _reason(error)
    roofs = roof(device)
    if not workload.flops:
        roofs = {"copy": roofs["copy"]}
    timed = {n: f for n, f in functions.items() if n not in missing} | {n: f for n, (f, _) in roofs.items()}
    times = interleaved_ms(timed, device, rounds, SECONDS)
    row = {"op": op.name, "workload": workload.name}
    rows = []
    for name, ms in times.items():
        quantiles = torch.tensor(ms, dtype=torch.float64).quantile(
            torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        p20, median, p80 = quantiles.tolist()
        new = {"contender": name, "median_ms": median, "p20_ms": p20, "p80_ms": p80, "rounds": len(ms)}
        rows.append({**row, **new, "share_equal_to_reference": agrees.get(name), "missing": None})
    _add_rates(rows, workload, inputs, {name: work for name, (_, work) in roofs.items()})
    rows += [{**dict.fromkeys(rows[0]), **row, "contender": n, "missing": why} for n, why in missing.items()]
    return [{**row, **common} for row in rows]


def _add_rates(rows: list[Row], workload: Workload, inputs: tuple[Any, ...], roofs: dict[str, float]) -> None:
    """GB/s, TFLOP/s and their shares of the roof, from the rows' medians."""
    reached = rates(roofs, {row["contender"]: row["median_ms"] for row in rows})
    byte = any(isinstance(x, torch.Tensor) and x.dim() == 2 and x.itemsize == 1 for x in inputs)
    factor = 2 if byte else 1
    for row in rows:
        name, median = row["contender"], row["median_ms"]
        moved = roofs["copy"] if name == "copy" else None if name in roofs else workload.bytes
        flops = roofs[name] if name.startswith(PEAK) else None if name in roofs else workload.flops
        gb_per_s = moved and moved / median * 1e-6
        row["gb_per_s"] = gb_per_s
        row["percent_of_copy"] = gb_per_s and 100 * gb_per_s / (reached["copy"] * 1e-9)
        row["tflop_per_s"] = flops / median * 1e-9 if flops else None
        row["percent_of_peak"] = row["peak"] = None
        if flops:
            row["percent_of_peak"] = 100 * row["tflop_per_s"] / (factor * reached[PEAK] * 1e-12)
            row["peak"] = f"{factor} x {PEAK}"


def _reason(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0].strip()}"[:200].replace("|", "/")


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
    """Markdown; of a rival that did not run, why."""
    lines = [
        "| op | workload | contender | median ms | p20 | p80 | Gop/s | % of peak | GB/s | % of copy | equal to reference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for r in rows:
        start = f"| {r['op']} | {r['workload']} | {r['contender']} |"
        if r["missing"]:
            lines.append(f"{start} missing: {r['missing']} | | | | | | | |")
            continue
        times = f"{r['median_ms']:.4f} | {r['p20_ms']:.4f} | {r['p80_ms']:.4f}"
        rate = f"{cell(r['tflop_per_s'] and 1e3 * r['tflop_per_s'], '.0f')} | {cell(r['percent_of_peak'], '.1f')}"
        speed = f"{cell(r['gb_per_s'], '.1f')} | {cell(r['percent_of_copy'], '.1f')}"
        share = r["share_equal_to_reference"]
        lines.append(f"{start} {times} | {rate} | {speed} | {cell(share and 100 * share, '.4f')} |")
    return "\n".join(lines)


def broken_contracts(names: Sequence[str], device: str) -> dict[str, list[str]]:
    """op -> what breaks its contract on ``device``. Several ops are checked by processes of their own, whose compiled
    kernels the caller then finds in Triton's cache."""
    if len(names) == 1:
        return {names[0]: contract.failures(all_ops()[names[0]], device)}
    workers = min(WORKERS, len(names), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return dict(zip(names, pool.map(_contract, names, [device] * len(names)), strict=True))


def _contract(name: str, device: str) -> list[str]:
    return contract.failures(all_ops()[name], device)


def _spread(workloads: Sequence[Workload], limit: int | None) -> list[Workload]:
    """At most ``limit`` of them, evenly spread, the last one among them."""
    if limit is None or len(workloads) <= limit:
        return list(workloads)
    return [workloads[round((i + 1) * len(workloads) / limit) - 1] for i in range(limit)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qtrain_kernels.bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )  # fmt: skip
    parser.add_argument("--op", action="append", help="an op; may be given several times (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workload", help="only the workloads whose name holds this text")
    parser.add_argument("--limit", type=int, help="workloads of each op (default: 2, with --op all)")
    parser.add_argument("--rivals", nargs="*", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, help=f"timed calls of each contender (default: {ROUNDS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw them here (needs matplotlib)")
    return parser


def _write(rows: Sequence[Row], json_file: Path | None, png_file: Path | None) -> None:
    if json_file is not None:
        write_atomically(json_file, json.dumps(rows, indent=1))
    if png_file is not None and rows:
        from qtrain_kernels.bench_picture import draw

        draw(rows, png_file)


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    ops = all_ops()
    names = args.op or list(ops)
    if unknown := [name for name in names if name not in ops]:
        parser.error(f"unknown op {unknown[0]!r}; the ops are {', '.join(ops)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda, but torch finds no CUDA device; --device cpu times the CPU implementation"
        )
    limit = args.limit or (None if args.op else 2)
    chosen: dict[str, list[Workload]] = {}
    for name in names:
        every = ops[name].workloads(args.device)
        chosen[name] = _spread([w for w in every if args.workload is None or args.workload in w.name], limit)
    if not any(chosen.values()):
        known = ", ".join(w.name for name in names for w in ops[name].workloads(args.device))
        parser.error(f"no workload holds {args.workload!r}; they are {known}")
    broken = broken_contracts(names, args.device)
    rows: list[Row] = []
    for name in names:
        if broken[name]:
            print("\n".join([f"{name}: contract broken, nothing is measured:", *broken[name]]), flush=True)
            continue
        common = provenance(ops[name], args.device)
        print(
            f"{name}: contract holds on {len(ops[name].cases)} cases; {common['implementation']}", flush=True
        )
        print(", ".join(f"{key} {common[key]}" for key in ("device", "torch", "triton", "commit")))
        mine: list[Row] = []
        for workload in chosen[name]:
            rounds = args.rounds or ROUNDS[args.device]
            try:
                mine += measure(ops[name], workload, args.device, rounds, args.rivals, common)
            except Exception:  # the other ops still count; the exit code tells
                traceback.print_exc()
                broken[name] = [*broken[name], f"{workload.name} failed"]
        rows += mine
        print(table(mine) if mine else "no workload of it holds that text", flush=True)
        _write(rows, args.json, args.png)  # after each op: a run that is stopped leaves what it has
    if red := [name for name in names if broken[name]]:
        raise SystemExit(
            "\n".join(["broken:", *(f"{name}: {line}" for name in red for line in broken[name])])
        )


if __name__ == "__main__":
    main()
