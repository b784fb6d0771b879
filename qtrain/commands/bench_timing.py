"""Arms timed in turns, and the interval of a ratio of medians."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

RESAMPLES = 2000  # the interval's ends then vary by about 1 % of its width from seed to seed
Samples = dict[str, list[float]]


def timed_in_turns(
    steps: Mapping[str, Callable[[int], None]], device: str, rounds: int, warmup_rounds: int
) -> tuple[Samples, Samples]:
    """(wall ms, CPU ms) of each arm, one of each a round."""
    import torch

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    names = list(steps)
    wall: Samples = {name: [] for name in names}
    cpu: Samples = {name: [] for name in names}
    for i in range(warmup_rounds + rounds):
        if i == warmup_rounds:
            print(f"{rounds} rounds", flush=True)
        shift = i % len(names)
        for name in names[shift:] + names[:shift]:
            finish()
            wall_start, cpu_start = time.perf_counter(), time.process_time()
            steps[name](i)
            finish()
            if i >= warmup_rounds:
                cpu[name].append((time.process_time() - cpu_start) * 1e3)
                wall[name].append((time.perf_counter() - wall_start) * 1e3)
    return wall, cpu


def ratio_interval(values: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """(ratio of medians, its 2.5th and 97.5th percentile over resampled rounds). Rounds are resampled as pairs,
    since what slows one arm in a round slows the other."""
    import numpy as np

    a, b = np.asarray(values), np.asarray(base)
    drawn = np.random.default_rng(0).integers(len(a), size=(RESAMPLES, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(np.median(a) / np.median(b)), float(low), float(high)
