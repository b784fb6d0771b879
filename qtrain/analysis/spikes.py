"""Spikes and divergence of a curve, step by step as a run lives (of whole curves: ``curve_scores.py``).

    robust score   u_t = log x_t,    0.6745 (u_t - median(w)) / MAD(w),    w = the WINDOW steps before t
    spike score    share of steps with |x_t - mean(w)| > SIGMAS std(w),    w = the ROLLING steps before t
                   (OLMo 2, arXiv 2501.00656)
    divergence     a value that is not finite, or DIVERGED_STEPS in a row above the least one + DIVERGED_NATS

0.6745 makes the MAD of a Gaussian its standard deviation, and earlier spikes do not blunt it. Only upward scores count: a
falling loss is no spike. While a loss still falls steeply, its slope widens the MAD, and small spikes pass unseen.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

from .limits import DIVERGED_NATS, DIVERGED_STEPS, SIGMAS

WINDOW = 100
ROLLING = 1000
# With fewer steps before it a step has no score: a median of a few points of a steep start means nothing.
LEAST = 20
# Of a constant stretch; relative differences of losses below this are float32 noise.
LEAST_MAD = 1e-6


class RobustScore:
    """``of(x)``: the robust score of the next step, 0 before LEAST of them, inf for what is not positive and finite."""

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=WINDOW)

    def of(self, x: float) -> float:
        if not (math.isfinite(x) and x > 0):
            return math.inf
        u, score = math.log(x), 0.0
        if len(self.window) >= LEAST:
            middle = statistics.median(self.window)
            deviation = max(statistics.median(abs(y - middle) for y in self.window), LEAST_MAD)
            score = 0.6745 * (u - middle) / deviation
        self.window.append(u)
        return score


class SigmaSpikes:
    """``of(x)``: whether the next step is a spike; ``share``: of the steps so far."""

    def __init__(self) -> None:
        self.window: deque[float] = deque(maxlen=ROLLING)
        self.spikes = self.steps = 0

    def of(self, x: float) -> bool:
        self.steps += 1
        spike = not math.isfinite(x)
        if not spike:
            if len(self.window) >= LEAST:
                mean = math.fsum(self.window) / len(self.window)
                variance = math.fsum((y - mean) ** 2 for y in self.window) / len(self.window)
                # Of a constant stretch, as LEAST_MAD
                deviation = max(math.sqrt(variance), LEAST_MAD * abs(mean))
                spike = abs(x - mean) > SIGMAS * deviation
            self.window.append(x)
        self.spikes += spike
        return spike

    @property
    def share(self) -> float:
        return self.spikes / self.steps if self.steps else 0.0


class Divergence:
    """``of(loss)``: whether the run has diverged by this step; it then has for good."""

    def __init__(self) -> None:
        self.least, self.above, self.diverged = math.inf, 0, False

    def of(self, loss: float) -> bool:
        self.above = self.above + 1 if loss > self.least + DIVERGED_NATS else 0
        self.diverged |= not math.isfinite(loss) or self.above >= DIVERGED_STEPS
        self.least = min(self.least, loss) if math.isfinite(loss) else self.least
        return self.diverged


def state_of(curve: RobustScore | SigmaSpikes | Divergence) -> dict[str, Any]:
    """Plain numbers and lists, out of which ``put_back`` makes the same state."""
    return {k: list(v) if isinstance(v, deque) else v for k, v in vars(curve).items()}


def put_back(curve: RobustScore | SigmaSpikes | Divergence, state: Mapping[str, Any]) -> None:
    for k, v in state.items():
        setattr(curve, k, deque(v, maxlen=getattr(curve, k).maxlen) if isinstance(v, list) else v)
