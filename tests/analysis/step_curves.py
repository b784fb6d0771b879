"""Scores of whole curves from the instruments' step-by-step ones: a second way to what ``curve_scores.py`` does at once."""

from __future__ import annotations

from collections.abc import Sequence

from qtrain.analysis.limits import JOINT_SCORE, SPIKE_SCORE
from qtrain.analysis.spikes import Divergence, RobustScore, SigmaSpikes


def robust_scores(values: Sequence[float]) -> list[float]:
    """The robust score of every step."""
    score = RobustScore()
    return [score.of(x) for x in values]


def spike_steps(losses: Sequence[float]) -> list[int]:
    """Indices of the steps whose score exceeds SPIKE_SCORE. Losses that are not positive and finite count as spikes."""
    return [i for i, score in enumerate(robust_scores(losses)) if score > SPIKE_SCORE]


def joint_spike_steps(losses: Sequence[float], grad_norms: Sequence[float]) -> list[int]:
    """Indices of the steps at which loss and gradient norm exceed JOINT_SCORE together."""
    both = zip(robust_scores(losses), robust_scores(grad_norms), strict=True)
    return [i for i, (loss, norm) in enumerate(both) if min(loss, norm) > JOINT_SCORE]


def spike_share(values: Sequence[float]) -> float:
    """The spike score of a curve, 0 to 1."""
    found = SigmaSpikes()
    for x in values:
        found.of(x)
    return found.share


def diverged_at(losses: Sequence[float]) -> int | None:
    """Index of the step by which the run had diverged, or None."""
    found = Divergence()
    return next((i for i, loss in enumerate(losses) if found.of(loss)), None)
