"""A plan in words: the table of a terminal and the numbers of a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from typing import Any

from .devices import GIB
from .plan import Inputs, RunPlan

BASELINE = "none"
TRANSIENT = "transient"


def _seconds(seconds: float) -> str:
    if seconds >= 86400:
        return f"{seconds / 86400:.1f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 120:
        return f"{seconds / 60:.1f} min"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _count(n: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"


def _table(title: str, rows: Sequence[Sequence[str]], columns: Sequence[str], width: int) -> str:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    out = StringIO()
    Console(file=out, width=width, markup=False).print(table)
    return out.getvalue()


def memory_rows(plan: RunPlan) -> list[tuple[str, int]]:
    """(what, bytes) at the peak, of which they are the parts."""
    memory = plan.memory
    rows = [
        ("weights", memory.weights),
        ("gradients", memory.gradients_at_peak),
        ("optimizer states", memory.states),
    ]
    rows.append(("gathers, buckets, residuals", memory.buffers))
    if memory.phase != "optimizer":
        rows += [
            (f"kept: {kind}", nbytes)
            for kind, nbytes in sorted(memory.kept.items(), key=lambda item: -item[1])
            if nbytes
        ]
    return [*rows, (TRANSIENT, memory.transient)]


def tables(inputs: Inputs, plans: Sequence[RunPlan], width: int = 150) -> str:
    """What the terminal shows. plans: the first is the planned recipe."""
    names = [plan.name for plan in plans]
    first = plans[0]
    head = (
        f"{_count(first.parameters)} parameters on {inputs.gpus} x {inputs.device.name}, {inputs.strategy}; a step is {inputs.batch_sequences} x "
        f"{inputs.sequence_tokens} tokens, {inputs.micro_batches} micro-batch(es) of {inputs.micro_batch_sequences}; "
        f"{'bf16' if inputs.bf16 else 'float32'}, {'compiled' if inputs.compile else 'eager'}"
        f"{', activations checkpointed' if inputs.checkpointing else ''}"
    )
    parts = list(dict.fromkeys(part for plan in plans for part in plan.time.parts))
    rows = [[part, *(f"{plan.time.parts.get(part, 0) * 1e3:.2f}" for plan in plans)] for part in parts]
    rows.append(["step", *(f"{plan.time.total * 1e3:.1f}" for plan in plans)])
    if any(plan.time.host for plan in plans):
        rows.append(["of it Python alone needs", *(f"{plan.time.host * 1e3:.1f}" for plan in plans)])
    rows.append(["tokens/s", *(_count(plan.time.tokens_per_s) for plan in plans)])
    rows.append(["MFU", *("-" if plan.time.mfu is None else f"{plan.time.mfu:.1%}" for plan in plans)])
    rows.append(["most of it", *(plan.time.bound_by for plan in plans)])
    times = _table("time of a step, ms", rows, ["", *names], width)
    return "\n".join([head, "", _memory_table(inputs, plans, width), times, _run_table(inputs, plans, width)])


def _memory_table(inputs: Inputs, plans: Sequence[RunPlan], width: int) -> str:
    rows = [dict(memory_rows(plan)) for plan in plans]
    unit, size = ("GiB", GIB) if max(plan.memory.peak for plan in plans) >= GIB else ("MiB", GIB // 1024)
    kinds = dict.fromkeys(kind for row in rows for kind in row if kind != TRANSIENT)
    shown = [[kind, *(f"{row.get(kind, 0) / size:.2f}" for row in rows)] for kind in kinds]
    shown.append([TRANSIENT, *(f"{memory_rows(plan)[-1][1] / size:.2f}" for plan in plans)])
    shown.append(["peak", *(f"{plan.memory.peak / size:.2f}" for plan in plans)])
    shown.append(["at its", *(plan.memory.phase for plan in plans)])
    fits = f"fits in {inputs.usable_bytes / size:,.1f}"
    shown.append([fits, *("yes" if plan.fits else "NO" for plan in plans)])
    shown.append(["largest micro-batch", *(str(plan.largest) for plan in plans)])
    return _table(f"memory of a GPU, {unit}", shown, ["", *(plan.name for plan in plans)], width)


def _run_table(inputs: Inputs, plans: Sequence[RunPlan], width: int) -> str:
    first = plans[0].budget
    base = next((plan for plan in plans if plan.name == BASELINE), None)
    rows = []
    for plan in plans:
        spent, saved = plan.budget, "-"
        if base is not None and plan is not base:
            saved = f"{1 - plan.memory.peak / base.memory.peak:+.0%} memory, {1 - plan.time.total / base.time.total:+.0%} time"
            if spent.cost is not None and base.budget.cost is not None:
                saved += f", {base.budget.cost - spent.cost:+,.0f} cost"
        rows.append(
            [
                plan.name, plan.compute, f"{spent.steps:,}", _seconds(spent.days * 86400), f"{spent.gpu_hours:,.1f}",
                "-" if spent.cost is None else f"{spent.cost:,.0f}", "-" if spent.kwh is None else f"{spent.kwh:,.0f}", saved,
            ]
        )  # fmt: skip
    title = f"to {_count(first.tokens)} tokens ({first.because}); loss about {first.loss:.2f} nats by {inputs.law.source}: an estimate"
    text = _table(
        title,
        rows,
        ["recipe", "compute", "steps", "takes", "GPU hours", "cost", "kWh", f"saves beside {BASELINE}"],
        width,
    )
    interval = plans[0].interval
    lines = [
        f"a failure every {_seconds(interval.mtbf_seconds)}: a checkpoint every {_seconds(interval.seconds)} (writing takes "
        f"{_seconds(interval.write_seconds)}) loses {interval.lost:.1%} of the time, which is in the table"
    ]
    lines.append(
        "times are sums over kernels; whole runs published elsewhere took 1.0 to 1.5 times as long (docs/scaling.md)"
    )
    device = inputs.device
    lines.append(f"measured of {device.name}: {device.measured or 'nothing'}")
    if device.sources:
        lines.append(f"the rest: {device.sources}")
    if device.price_per_hour is None:
        lines.append("cost: give the price of one GPU, as in hardware.price_per_hour=2.5")
    for plan in plans:
        lines += [f"WARNING {plan.name}: {text}" for text in plan.warnings]
    return text + "\n".join(lines)


def as_numbers(inputs: Inputs, plans: Sequence[RunPlan], refused: dict[str, str]) -> dict[str, Any]:
    """For JSON: bytes and seconds."""
    device = asdict(inputs.device)
    settings = {
        name: getattr(inputs, name)
        for name in (
            "gpus", "strategy", "batch_sequences", "micro_batch_sequences", "sequence_tokens", "bf16", "compile", "checkpointing",
            "overhead_gib", "margin_fraction", "usable_bytes", "micro_batches",
        )
    }  # fmt: skip
    found = []
    for plan in plans:
        numbers = asdict(plan)
        numbers["time"]["bound_by"] = plan.time.bound_by
        numbers["memory"]["kept_bytes"] = plan.memory.kept_bytes
        found.append(numbers)
    return {
        "settings": settings,
        "device": device,
        "scaling_law": asdict(inputs.law),
        "plans": found,
        "refused": refused,
    }
