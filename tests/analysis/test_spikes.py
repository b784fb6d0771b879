"""Spikes that were put there are found, and nothing else is."""

from __future__ import annotations

import math
import random

from qtrain.analysis.spikes import LEAST, spike_steps


def curve(steps: int = 400) -> list[float]:
    draw = random.Random(1)
    return [2.0 + 3.5 * math.exp(-t / 60) + draw.gauss(0, 0.02) for t in range(steps)]


def test_a_falling_noisy_loss_has_none() -> None:
    assert spike_steps(curve()) == []


def test_spikes_are_found_where_they_are_also_after_others() -> None:
    losses = curve()
    for step in (250, 300, 302):
        losses[step] += 1.0
    losses[350] = math.nan
    losses[351] -= 1.0  # down is no spike
    assert spike_steps(losses) == [250, 300, 302, 350]


def test_a_constant_loss_and_a_start_have_no_score() -> None:
    assert spike_steps([2.0] * 60) == []
    assert spike_steps([2.0] * (LEAST - 1) + [9.0]) == []
    assert spike_steps([2.0] * LEAST + [9.0]) == [LEAST]
