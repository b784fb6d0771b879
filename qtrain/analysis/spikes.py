"""Loss spikes, by a score that earlier spikes do not blunt.

    u_t = log loss_t,    score_t = 0.6745 (u_t - median(w)) / MAD(w),    w = the WINDOW steps before t

0.6745 makes the MAD of a Gaussian its standard deviation. Only upward scores count: a falling loss is no spike.
While a loss still falls steeply, its slope widens the MAD, and small spikes pass unseen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

WINDOW = 100
ALERT = 8.0
# With fewer steps before it a step has no score: a median of a few points of a steep start means nothing.
LEAST = 20
# Of a constant stretch; relative differences of losses below this are float32 noise.
LEAST_MAD = 1e-6


def spike_steps(losses: Sequence[float]) -> list[int]:
    """Indices of the steps whose score exceeds ALERT. Losses that are not positive and finite count as spikes."""
    found = []
    before: list[float] = []
    for i, loss in enumerate(losses):
        if not (math.isfinite(loss) and loss > 0):
            found.append(i)
            continue
        u = math.log(loss)
        window = before[-WINDOW:]
        if len(window) >= LEAST:
            middle = statistics.median(window)
            deviation = max(statistics.median(abs(x - middle) for x in window), LEAST_MAD)
            if 0.6745 * (u - middle) / deviation > ALERT:
                found.append(i)
        before.append(u)
    return found
