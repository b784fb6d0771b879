"""``qtrain bench instruments run=FOLDER``: what the instruments cost in a run that was made, from its own times.

    share = (median time of a sampled step - median time of a plain one) / (100 * median time of a plain one)

of sampling every hundredth step, with every instrument that the run had. Times are those of whole steps, data, optimizer and
writing included; the first steps, which compile, are left out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

EVERY_STEPS = 100
# Compilation, caches that fill, the first allocation of states
WARMUP_STEPS = 5
LEAST_SAMPLES = 3


def check(cfg: DictConfig) -> None:
    """Raises ValueError where there is no run to look at."""
    if cfg.run is None:
        raise ValueError(
            "bench instruments looks at a run that was made: give run=outputs/NAME/RUN; short ones sample often, as after "
            "qtrain train steps=60 callbacks.quant_stats.every_steps=10 (and so on for the others)"
        )
    if not (Path(cfg.run) / "metrics.jsonl").is_file():
        raise ValueError(f"run={cfg.run}: has no metrics.jsonl; give the folder of a run")


def overhead(seconds: Mapping[int, float], sampled: Sequence[int]) -> dict[str, Any]:
    """step -> seconds, and the steps that were sampled -> medians, and the share at EVERY_STEPS.

    Raises ValueError for fewer than LEAST_SAMPLES of either kind after WARMUP_STEPS."""
    late = {step: t for step, t in seconds.items() if step > WARMUP_STEPS}
    looked = [t for step, t in late.items() if step in set(sampled)]
    plain = [t for step, t in late.items() if step not in set(sampled)]
    if min(len(looked), len(plain)) < LEAST_SAMPLES:
        raise ValueError(
            f"{len(looked)} sampled and {len(plain)} plain steps after the first {WARMUP_STEPS}: at least "
            f"{LEAST_SAMPLES} of each are needed; sample another rhythm, or train longer"
        )
    base, slow = statistics.median(plain), statistics.median(looked)
    return {
        "plain_s": base,
        "sampled_s": slow,
        "samples": len(looked),
        "steps": len(late),
        "share_at_100_steps": (slow - base) / (EVERY_STEPS * base),
    }


def measured(folder: Path) -> dict[str, Any]:
    """Of a run's folder. Raises ValueError as ``overhead`` does."""
    from qtrain.analysis.instrument_records import INSTRUMENTS, read_instruments
    from qtrain.training.callbacks.metrics_jsonl import METRICS, read_metrics

    rows = [row for row in read_metrics(folder / METRICS) if row["kind"] == "train"]
    seconds = {row["step"]: row["tokens"] / row["step"] / row["tokens_per_s"] for row in rows}
    samples = read_instruments(folder / INSTRUMENTS).samples
    found = overhead(seconds, list(samples))
    themes = {name.split("/")[0] for values in samples.values() for name in values}
    return {**found, "themes": sorted(themes)}


def table(found: Mapping[str, Any]) -> str:
    """For people."""
    extra = (found["sampled_s"] - found["plain_s"]) * 1e3
    return (
        f"plain step {found['plain_s'] * 1e3:.0f} ms, a sample {extra:.0f} ms more (medians of {found['samples']} samples in "
        f"{found['steps']} steps; {', '.join(found['themes'])})\n"
        f"every {EVERY_STEPS} steps: {found['share_at_100_steps']:.2%} of the run's time"
    )
