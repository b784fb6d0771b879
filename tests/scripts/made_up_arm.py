"""Results of an arm of a study, without a run."""

from __future__ import annotations

import numpy as np
from optimizer_states_claims import ArmResult

WINDOWS = 64


def result(losses: list[float], seed: int = 0, noise: float = 0.0) -> ArmResult:
    """An arm with these validation losses, whose windows have a hardness of their own, alike in all arms; ``noise``: of
    the arm's own, in nats."""
    hardness = np.random.default_rng(99).normal(0, 0.3, WINDOWS)
    own = np.random.default_rng(seed).normal(0, noise or 1e-9, (len(losses), WINDOWS))
    windows = np.array(losses)[:, None] + (hardness - hardness.mean()) + own - own.mean(1, keepdims=True)
    return ArmResult(np.array(losses), windows)
