"""Spikes that were put there are found, and nothing else is."""

from __future__ import annotations

import math
import random

from step_curves import diverged_at, joint_spike_steps, robust_scores, spike_share, spike_steps

from qtrain.analysis.limits import DIVERGED_NATS, DIVERGED_STEPS
from qtrain.analysis.spikes import (
    LEAST,
    ROLLING,
    Divergence,
    RobustScore,
    SigmaSpikes,
    put_back,
    state_of,
)


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


def test_the_scores_of_a_known_window() -> None:
    """log x of 1..5 repeated: median log 3, MAD the middle of the five distances."""
    window = [1.0, 2.0, 3.0, 4.0, 5.0] * 20
    distances = sorted(abs(math.log(x) - math.log(3)) for x in (1, 2, 3, 4, 5))
    expected = 0.6745 * (math.log(50) - math.log(3)) / distances[2]
    assert math.isclose(robust_scores([*window, 50.0])[-1], expected)
    # The oldest of WINDOW steps is forgotten: a start of 1e9 changes nothing
    assert robust_scores([1e9, *window, 50.0])[-1] == robust_scores([*window, 50.0])[-1]


def test_seven_sigmas_on_both_sides() -> None:
    """+-1 around 10 in turns: mean 10, deviation 1."""
    window = [9.0, 11.0] * (ROLLING // 2)
    assert spike_share([*window, 16.99]) == 0
    assert spike_share([*window, 17.01]) == 1 / (ROLLING + 1)
    assert spike_share([*window, 2.99]) == 1 / (ROLLING + 1)
    assert spike_share([*window, math.inf, math.nan]) == 2 / (ROLLING + 2)
    # What is not finite enters no window, and the window has ROLLING steps
    assert spike_share([1e6, math.nan, *window, 17.01]) == 2 / (ROLLING + 3)


def test_a_joint_spike_needs_both() -> None:
    losses, norms = curve(), [x / 2 for x in curve()]
    losses[200] += 1.0
    norms[250] += 1.0
    losses[300] += 1.0
    norms[300] += 1.0
    assert joint_spike_steps(losses, norms) == [300]


def test_divergence_lasts_and_a_spike_does_not() -> None:
    low, high = [2.0] * 10, [2.0 + DIVERGED_NATS + 0.01]
    assert diverged_at([*low, *high * DIVERGED_STEPS]) == 10 + DIVERGED_STEPS - 1
    assert diverged_at([*low, *high * (DIVERGED_STEPS - 1), *low, *high * (DIVERGED_STEPS - 1)]) is None
    assert diverged_at([*low, *[2.0 + DIVERGED_NATS] * 300]) is None
    assert diverged_at([*low, math.nan, 2.0]) == 10


def test_a_curve_goes_on_from_its_state() -> None:
    losses = [*curve(), *curve()]
    for kind in (RobustScore, SigmaSpikes, Divergence):
        whole, first, second = kind(), kind(), kind()
        expected = [whole.of(x) for x in losses]
        found = [first.of(x) for x in losses[:450]]
        put_back(second, state_of(first))
        assert found + [second.of(x) for x in losses[450:]] == expected
        assert state_of(second) == state_of(whole)
