"""The scores of whole curves against plain loops over their definitions."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest
from step_curves import spike_steps

from qtrain.analysis import curve_scores


def curve(steps: int, seed: int = 1) -> list[float]:
    draw = random.Random(seed)
    return [2.0 + 3.5 * math.exp(-t / 60) + draw.gauss(0, 0.02) for t in range(steps)]


@pytest.mark.parametrize("steps", [0, 5, 20, 21, 99, 100, 101, 350])
def test_spikes_are_those_of_the_step_by_step_score(steps: int, monkeypatch) -> None:
    monkeypatch.setattr(curve_scores, "_CHUNK", 64)
    losses = curve(steps)
    for i, jump in (
        (30, 1.0),
        (31, math.nan),
        (90, 2.0),
        (150, -1.0),
        (151, math.inf),
        (300, 0.8),
        (301, 0.8),
    ):
        if i < steps:
            losses[i] += jump
    assert curve_scores.spikes(curve_scores.robust_scores(losses)) == spike_steps(losses)
    assert len(curve_scores.robust_scores(losses)) == steps


def test_a_score_by_hand() -> None:
    before = [math.exp(u) for u in [0.0] * 9 + [1.0] * 9 + [2.0] * 9]  # median 1, MAD 1
    scores = curve_scores.robust_scores([*before, math.exp(5.0)])
    assert scores[-1] == pytest.approx(0.6745 * 4)
    assert np.isnan(scores[:20]).all()
    assert not np.isnan(scores[20:]).any()


def test_together_means_loss_and_gradient_in_the_same_step() -> None:
    losses, norms = curve(500), curve(500, seed=2)
    for i in (420, 440):
        losses[i] += 3.0
    for i in (420, 460):
        norms[i] += 3.0
    scores = curve_scores.robust_scores(losses)
    assert curve_scores.joint_spikes(scores, norms) == [420]
    assert curve_scores.joint_spikes(scores, [math.nan] * 500) == []
    norms[40] = math.nan  # a step that was not logged moves no other
    assert curve_scores.joint_spikes(scores, norms) == [420]


def slow_spike_score(values: list[float]) -> float:
    found, before = 0, []
    for x in values:
        if not math.isfinite(x):
            found += 1
            continue
        window = before[-1000:]
        if len(window) >= 20:
            found += abs(x - statistics.fmean(window)) > 7 * max(
                statistics.pstdev(window), 1e-6 * abs(statistics.fmean(window))
            )
        before.append(x)
    return found / len(values)


def test_the_spike_score_is_that_of_its_definition() -> None:
    values = [2.0 + 0.1 * x for x in np.random.default_rng(0).normal(size=1500)]
    for i in (10, 500, 501, 1300):
        values[i] += 3.0
    values[700] = math.nan
    values[900] -= 3.0  # downwards counts too
    assert curve_scores.spike_score(values) == pytest.approx(slow_spike_score(values))
    assert slow_spike_score(values) == pytest.approx(5 / 1500)
    assert curve_scores.spike_score([5.0] * 60) == 0
    assert curve_scores.spike_score([5.0] * 20) is None


def test_excess_sees_a_rise_and_no_single_batch() -> None:
    falling = [5.0 - 0.01 * t for t in range(200)]
    falling[100] += 9.0
    assert curve_scores.excess(falling).max() < 0.2
    risen = [*falling[:150], *[6.0] * 50]
    found = curve_scores.excess(risen)
    assert found[149] < 0.2
    assert found[-1] == pytest.approx(6.0 - np.median(falling[130:150]), abs=0.02)
    assert curve_scores.excess([5.5, 5.4, *[300.0] * 30])[-1] == pytest.approx(300 - 5.45)
    assert len(curve_scores.excess([])) == 0
