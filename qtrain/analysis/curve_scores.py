"""Scores of whole curves at once, for hundreds of finished runs; their definitions are those of ``spikes.py``.

    robust score   0.6745 (u_t - median(w)) / MAD(w),  u = log x,  w = the WINDOW finite values before t
    spike score    share of values more than 7 standard deviations from the mean of the 1000 before (OLMo 2, arXiv 2501.00656)
    excess         how far a rolling median of the loss lies above the least that it has been

A spike of the loss alone may be one odd batch; loss and gradient norm together are the weights' (``joint_spikes``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .limits import JOINT_SCORE, SIGMAS, SPIKE_SCORE
from .spikes import LEAST, LEAST_MAD, ROLLING, WINDOW

# Rows of windows at a time: 8192 x 100 float64 are 7 MB
_CHUNK = 8192


def robust_scores(values: ArrayLike) -> NDArray[np.float64]:
    """[n] -> [n]: the score of each value; nan where there is none (fewer than LEAST before it), inf for a value that is
    not positive and finite."""
    x = np.asarray(values, dtype=np.float64)
    good = np.isfinite(x) & (x > 0)
    u = np.log(x[good])
    scores = np.full(len(u), np.nan)
    few = np.arange(LEAST, min(WINDOW, len(u)))
    if len(few):
        # The windows that are not full yet, padded; inf sorts to the end
        before = np.where(np.arange(WINDOW) < few[:, None], np.resize(u, WINDOW), np.inf)
        middle = _padded_median(before, few)
        deviation = _padded_median(np.abs(before - middle[:, None]), few)
        scores[few] = 0.6745 * (u[few] - middle) / np.maximum(deviation, LEAST_MAD)
    if len(u) > WINDOW:
        windows = np.lib.stride_tricks.sliding_window_view(u, WINDOW)[:-1]
        for start in range(0, len(windows), _CHUNK):
            part = windows[start : start + _CHUNK]
            first = WINDOW + start
            scores[first : first + len(part)] = _score(u[first : first + len(part)], part)
    found = np.full(len(x), np.inf)
    found[good] = scores
    return found


def _padded_median(rows: NDArray[np.float64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of the ``lengths`` least values of each row."""
    ordered, each = np.sort(rows, axis=1), np.arange(len(rows))
    return (ordered[each, (lengths - 1) // 2] + ordered[each, lengths // 2]) / 2


def _score(u: NDArray[np.float64], windows: NDArray[np.float64]) -> NDArray[np.float64]:
    middle = np.median(windows, axis=1)
    deviation = np.median(np.abs(windows - middle[:, None]), axis=1)
    return 0.6745 * (u - middle) / np.maximum(deviation, LEAST_MAD)


def spikes(loss_scores: NDArray[np.float64]) -> list[int]:
    """Indices of the steps whose robust score exceeds SPIKE_SCORE; those that are not positive and finite count."""
    return np.flatnonzero(loss_scores > SPIKE_SCORE).tolist()


def joint_spikes(loss_scores: NDArray[np.float64], grad_norms: ArrayLike) -> list[int]:
    """Indices of the steps where loss and gradient norm score above JOINT_SCORE together. Gradient norms that are nan
    (not logged) have no score."""
    norms = np.asarray(grad_norms, dtype=np.float64)
    logged = ~np.isnan(norms)
    high = np.zeros(len(norms), dtype=bool)
    high[logged] = robust_scores(norms[logged]) > JOINT_SCORE
    return np.flatnonzero((loss_scores > JOINT_SCORE) & high).tolist()


def spike_score(values: ArrayLike) -> float | None:
    """The share of values more than 7 standard deviations from the mean of the 1000 before them (fewer at the start,
    LEAST at least), non-finite ones counted; None for fewer than LEAST + 1 values."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) <= LEAST:
        return None
    good = np.isfinite(x)
    centre = x[good].mean() if good.any() else 0.0
    u = x[good] - centre  # the sums of squares then cancel less
    first, second = (np.concatenate([[0.0], np.cumsum(p)]) for p in (u, u * u))
    end = np.arange(len(u))
    start = np.maximum(end - ROLLING, 0)
    n = np.maximum(end - start, 1)
    mean = (first[end] - first[start]) / n
    deviation = np.sqrt(np.maximum((second[end] - second[start]) / n - mean**2, 0.0))
    deviation = np.maximum(deviation, LEAST_MAD * np.abs(mean + centre))
    outside = (end >= LEAST) & (np.abs(u - mean) > SIGMAS * deviation)
    return float((outside.sum() + (~good).sum()) / len(x))


def excess(losses: ArrayLike) -> NDArray[np.float64]:
    """[n] -> [n]: the median of the LEAST losses up to each step (of all, where they are fewer), minus the least such
    median until then, nats. The losses are finite. A single batch cannot move it, but at the very start."""
    x = np.asarray(losses, dtype=np.float64)
    medians = np.array([np.median(x[: i + 1]) for i in range(min(LEAST - 1, len(x)))])
    if len(x) >= LEAST:
        whole = np.median(np.lib.stride_tricks.sliding_window_view(x, LEAST), axis=1)
        medians = np.concatenate([medians, whole])
    return medians - np.minimum.accumulate(medians)
