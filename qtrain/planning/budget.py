"""From a step to a bill: tokens, days, cost, energy, and how often to write a checkpoint.

    tokens     20 a parameter (Hoffmann et al., 2203.15556: compute-optimal at their sizes), or ``tokens``, or from ``target_loss``:
    loss       L(N, D) = E + A / N^alpha + B / D^beta       nats a token of their corpus and tokenizer: an estimate elsewhere
    interval   tau = sqrt(2 delta M)                        Young, CACM 17 (1974); Daly, FGCS 22 (2006), to first order
    lost       delta / tau + (tau / 2 + R) / M              writing, work since the last checkpoint, restarting

delta seconds to write a checkpoint, R to restart, M mean time between failures of the whole: that of one GPU over their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TOKENS_A_PARAMETER = 20.0


@dataclass(frozen=True)
class ScalingLaw:
    """E, A, alpha, B, beta of L(N, D); N parameters without embeddings where the source counts so."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    source: str

    def loss(self, parameters: float, tokens: float) -> float:
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def tokens(self, parameters: float, loss: float) -> float:
        """Raises ValueError for a loss that no number of tokens reaches."""
        floor = self.E + self.A / parameters**self.alpha
        if not loss > floor:
            raise ValueError(
                f"target_loss={loss}: by the scaling law of {self.source} a model of {parameters:.3g} parameters stays above "
                f"{floor:.3f} nats whatever it reads; take a larger model or a higher loss"
            )
        return float((self.B / (loss - floor)) ** (1 / self.beta))


LAWS: Mapping[str, ScalingLaw] = {
    "hoffmann": ScalingLaw(1.69, 406.4, 0.34, 410.7, 0.28, "Hoffmann et al., 2203.15556, approach 3"),
    "besiroglu": ScalingLaw(1.8172, 482.01, 0.3478, 2085.43, 0.3658, "Besiroglu et al., 2404.10102"),
}


@dataclass(frozen=True, kw_only=True)
class Failures:
    """gpu_mtbf_hours: mean time between failures of one GPU and its share of everything else. restart_minutes: from
    the failure to the first new step. write_gb_per_s: at which a checkpoint is written (here rank 0 writes it whole)."""

    gpu_mtbf_hours: float
    restart_minutes: float
    write_gb_per_s: float

    @staticmethod
    def of(config: Mapping[str, Any]) -> Failures:
        for name, value in config.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"failures.{name}={value!r}: a positive number")
        return Failures(**{str(k): float(v) for k, v in config.items()})


@dataclass(frozen=True)
class Interval:
    """seconds between checkpoints; lost: the share of the time that writing, redoing and restarting take."""

    seconds: float
    lost: float
    mtbf_seconds: float
    write_seconds: float


def checkpoint_interval(failures: Failures, gpus: int, checkpoint_bytes: float) -> Interval:
    """Young's and Daly's first order; the shares of time are small against one or the formula does not hold."""
    mtbf = failures.gpu_mtbf_hours * 3600 / gpus
    write = checkpoint_bytes / (failures.write_gb_per_s * 1e9)
    seconds = math.sqrt(2 * write * mtbf)
    lost = write / seconds + (seconds / 2 + failures.restart_minutes * 60) / mtbf
    return Interval(seconds, lost, mtbf, write)


@dataclass(frozen=True)
class Budget:
    """tokens and where they come from; steps; days; gpu_hours; cost: None without a price; kwh: at full load, None where the
    data sheet's watts are unknown. loss: by the law, an estimate."""

    tokens: float
    because: str
    steps: int
    days: float
    gpu_hours: float
    cost: float | None
    kwh: float | None
    loss: float


def tokens_of(
    parameters: int, tokens: float | None, target_loss: float | None, law: ScalingLaw
) -> tuple[float, str]:
    """How many to train on, and why. Raises ValueError where both are given."""
    if tokens is not None and target_loss is not None:
        raise ValueError("tokens and target_loss: give one of them")
    if tokens is not None:
        return float(tokens), "tokens="
    if target_loss is not None:
        return law.tokens(parameters, target_loss), f"an estimate by {law.source}"
    return TOKENS_A_PARAMETER * parameters, "20 a parameter, Hoffmann et al., 2203.15556"


def budget(
    parameters: int,
    step_tokens: int,
    step_seconds: float,
    gpus: int,
    *,
    tokens: tuple[float, str],
    law: ScalingLaw,
    lost: float,
    price_per_hour: float | None,
    watts: float | None,
) -> Budget:
    """lost: share of the time that failures take."""
    steps = math.ceil(tokens[0] / step_tokens)
    seconds = steps * step_seconds / max(1e-9, 1 - min(lost, 0.99))
    hours = gpus * seconds / 3600
    return Budget(
        tokens[0], tokens[1], steps, seconds / 86400, hours,
        None if price_per_hour is None else hours * price_per_hour,
        None if watts is None else hours * watts / 1000,
        law.loss(parameters, tokens[0]),
    )  # fmt: skip
