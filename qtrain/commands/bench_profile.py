"""Where the time of a step goes: its GPU time by the name of the kernel, as torch.profiler (CUPTI) sees it.

The sum is of kernels, copies and fills, each with its own time: what the GPU waits between them is not in it, and of
kernels that run beside each other both count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

STEPS = 3  # profiled together, after one that is not
SHOWN = 12
NAME_CHARACTERS = 100  # of a kernel's name in the text; the file has all of it


def check(cfg: Any, device: str) -> None:
    """Raises ValueError where a profile is asked of what has none."""
    if not isinstance(cfg.profile, bool):
        raise ValueError(f"profile={cfg.profile!r}: true or false")
    if cfg.profile and (cfg.what, device) != ("linear", "cuda"):
        raise ValueError(
            f"profile=true: bench {cfg.what} on device={device} has no profile, bench linear on a GPU has: "
            "qtrain bench linear device=cuda profile=true"
        )


def by_name(events: Iterable[tuple[str, float]], steps: int) -> dict[str, Any]:
    """events: (name, microseconds) of each launch in ``steps`` steps. Per step: {"us", "launches", "kernels": [{"name",
    "us", "launches"}, ...]}, the longest first."""
    totals: dict[str, list[float]] = {}
    for name, us in events:
        total = totals.setdefault(name, [0.0, 0])
        total[0] += us
        total[1] += 1
    longest_first = sorted(totals.items(), key=lambda item: (-item[1][0], item[0]))
    return {
        "us": sum(us for us, _ in totals.values()) / steps,
        "launches": sum(count for _, count in totals.values()) / steps,
        "kernels": [
            {"name": name, "us": us / steps, "launches": count / steps} for name, (us, count) in longest_first
        ],
    }


def launches(events: Iterable[Any], device: str) -> list[tuple[str, float]]:
    """(name, microseconds) of what ran on ``device``, from ``torch.profiler.profile.events()``. Ranges that user code
    named are no kernels; on a CPU an operation's own time is without that of those it calls."""
    kept = [e for e in events if e.device_type.name == device.upper() and not e.is_user_annotation]
    if device == "cpu":
        return [(e.name, e.self_cpu_time_total) for e in kept]
    return [(e.name, e.time_range.elapsed_us()) for e in kept]


def profiled(step: Callable[[], Any], device: str) -> dict[str, Any]:
    """What ``by_name`` says of ``STEPS`` calls of ``step``. Raises RuntimeError where the profiler saw nothing."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    finish()
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as profiler:
        for _ in range(STEPS):
            step()
        finish()
    found = launches(profiler.events() or (), device)
    if not found:
        raise RuntimeError("the profiler saw no kernel: another one may hold the device's counters (CUPTI)")
    return by_name(found, STEPS)


def text(title: str, found: Mapping[str, Any]) -> str:
    """The longest ones of a step as a Markdown table, the rest in a row, the sum in the title."""
    total, rows = found["us"], found["kernels"]
    lines = [
        f"{title}: {total:.1f} us in {found['launches']:g} launches a step",
        "",
        "| us | share | launches | kernel |",
        "|---|---|---|---|",
    ]

    def line(us: float, count: float, name: str) -> str:
        share = us / total if total else 0.0
        return f"| {us:.1f} | {share:.1%} | {count:g} | {name[:NAME_CHARACTERS].replace('|', '/')} |"

    lines += [line(r["us"], r["launches"], r["name"]) for r in rows[:SHOWN]]
    if rest := rows[SHOWN:]:
        us, count = sum(r["us"] for r in rest), sum(r["launches"] for r in rest)
        lines.append(line(us, count, f"{len(rest)} others"))
    return "\n".join(lines)
