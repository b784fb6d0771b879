"""``qtrain bench instruments run=FOLDER``: what the instruments cost in a run that was made, from its own times.

    share = median over samples of (time of the sampled step - t) / (100 t),  t = median time of the plain steps next to it

of sampling every hundredth step, with every instrument that the run had. Times are those of whole steps, data, optimizer and
writing included; the first steps, which compile, are left out. Plain and sampled steps lie in turns in one run, and each
sample is held against its neighbours, so that a machine that slows down moves both. The interval is that of a median by its
order statistics: no shape of the times is supposed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

EVERY_STEPS = 100
CONFIDENCE = 0.95
# Plain steps on either side of a sample
NEIGHBOURS = 4
# Compilation, caches that fill, the first allocation of states
WARMUP_STEPS = 5
# Fewer give no interval of 95 %: 2 * 2^-6 is 0.03
LEAST_SAMPLES = 6


def check(cfg: DictConfig) -> None:
    """Raises ValueError where there is no run to look at."""
    if cfg.run is None:
        raise ValueError(
            "bench instruments looks at a run that was made: give run=outputs/NAME/RUN; short ones sample often, as after "
            "qtrain train steps=60 callbacks.quant_stats.every_steps=10 (and so on for the others)"
        )
    if not (Path(cfg.run) / "metrics.jsonl").is_file():
        raise ValueError(f"run={cfg.run}: has no metrics.jsonl; give the folder of a run")


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Two of the values, between which the median of their distribution lies with CONFIDENCE at least: the k-th least and
    the k-th greatest, k as large as 1 - 2 P(Binomial(n, 1/2) < k) allows. values: LEAST_SAMPLES or more."""
    n, ordered = len(values), sorted(values)
    below, k = 0.0, 0
    while True:
        below += math.comb(n, k) / 2**n
        if 2 * below > 1 - CONFIDENCE:
            break
        k += 1
    return ordered[k - 1], ordered[n - k]


def overhead(seconds: Mapping[int, float], sampled: Sequence[int]) -> dict[str, Any]:
    """step -> seconds, and the steps that were sampled -> medians, and the share at EVERY_STEPS with its interval.

    Raises ValueError for fewer than LEAST_SAMPLES samples with a plain step next to them after WARMUP_STEPS."""
    looked = set(sampled)
    plain = {step: t for step, t in seconds.items() if step > WARMUP_STEPS and step not in looked}
    extra, ratios = [], []
    for step in sorted(looked & seconds.keys()):
        near = [plain[s] for s in range(step - NEIGHBOURS, step + NEIGHBOURS + 1) if s in plain]
        if step > WARMUP_STEPS and near:
            beside = statistics.median(near)
            extra.append(seconds[step] - beside)
            ratios.append(extra[-1] / beside)
    if len(extra) < LEAST_SAMPLES:
        raise ValueError(
            f"{len(extra)} sampled steps with plain ones next to them after the first {WARMUP_STEPS}: at least "
            f"{LEAST_SAMPLES} are needed; sample another rhythm, or train longer"
        )
    return {
        "plain_s": statistics.median(plain.values()),
        "extra_s": statistics.median(extra),
        "extra_interval_s": median_interval(extra),
        "samples": len(extra),
        "steps": len(plain) + len(extra),
        "share_at_100_steps": statistics.median(ratios) / EVERY_STEPS,
        "share_interval": tuple(end / EVERY_STEPS for end in median_interval(ratios)),
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
    low, high = (end * 1e3 for end in found["extra_interval_s"])
    least, most = found["share_interval"]
    return (
        f"plain step {found['plain_s'] * 1e3:.0f} ms, a sample {found['extra_s'] * 1e3:.0f} ms more ({low:.0f} .. {high:.0f}; "
        f"median and {CONFIDENCE:.0%} interval of {found['samples']} samples in {found['steps']} steps; "
        f"{', '.join(found['themes'])})\n"
        f"every {EVERY_STEPS} steps: {found['share_at_100_steps']:.2%} ({least:.2%} .. {most:.2%}) of the run's time"
    )
