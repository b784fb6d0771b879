"""Learning-rate schedules as pure functions of the step: a factor in [0, 1] of the peak learning rate.

Step s = 0, 1, ... is the number of optimizer steps taken before, as ``LambdaLR`` counts. All begin with a linear
warmup, (s + 1) / (warmup_steps + 1), whose first step is not lost and which reaches 1 exactly at s = warmup_steps:

    constant   1
    cosine     f + (1 - f) (1 + cos(pi x)) / 2,  x = (s - warmup) / (total - warmup)   (arXiv 1608.03983, eq. 5)
    wsd        1 until total - decay, then f + (1 - f) (1 - x) or f + (1 - f) (1 - sqrt(x)), x the share of the
               decay that is over (warmup-stable-decay: arXiv 2404.06395; forms: arXiv 2405.18392)

with f = min_lr_fraction, where they stay after total_steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

FORMS = ("linear", "1-sqrt")


def _whole(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be a whole number, {least} or more")


def _fraction(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r}: must lie in [0, 1], for example 0.1")


def _check_warmup(warmup_steps: int, total_steps: int) -> None:
    _whole("warmup_steps", warmup_steps, 0)
    _whole("total_steps", total_steps, 1)
    if warmup_steps >= total_steps:
        raise ValueError(
            f"warmup_steps={warmup_steps} with total_steps={total_steps}: the warmup must end before the run does"
        )


def _decay_steps(warmup_steps: int, total_steps: int, decay_fraction: float) -> int:
    _fraction("decay_fraction", decay_fraction)
    decay_steps = round(decay_fraction * total_steps)
    if warmup_steps + decay_steps > total_steps:
        raise ValueError(
            f"decay_fraction={decay_fraction} of total_steps={total_steps} is {decay_steps} steps, which overlap the "
            f"{warmup_steps} of the warmup; at most {(total_steps - warmup_steps) / total_steps:.3g}"
        )
    return decay_steps


def constant(step: int, *, warmup_steps: int = 0) -> float:
    """The factor at ``step``: warmup, then 1. Raises ValueError for negative or fractional steps."""
    _whole("step", step, 0)
    _whole("warmup_steps", warmup_steps, 0)
    return min(1.0, (step + 1) / (warmup_steps + 1))


def cosine(step: int, *, warmup_steps: int, total_steps: int, min_lr_fraction: float = 0.1) -> float:
    """The factor at ``step``: warmup, then half a cosine down to ``min_lr_fraction`` at ``total_steps``.

    Raises ValueError for negative or fractional steps, a warmup not shorter than the run, and a fraction outside
    [0, 1].
    """
    _check_warmup(warmup_steps, total_steps)
    _fraction("min_lr_fraction", min_lr_fraction)
    if step <= warmup_steps:
        return constant(step, warmup_steps=warmup_steps)
    _whole("step", step, 0)
    x = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return min_lr_fraction + (1.0 - min_lr_fraction) * (1.0 + math.cos(math.pi * x)) / 2


def wsd(
    step: int,
    *,
    warmup_steps: int,
    total_steps: int,
    decay_fraction: float = 0.2,
    min_lr_fraction: float = 0.0,
    form: str = "linear",
) -> float:
    """The factor at ``step``: warmup, 1, and over the last ``round(decay_fraction * total_steps)`` steps down to
    ``min_lr_fraction``, by ``form`` ``linear`` or ``1-sqrt``.

    Raises ValueError as ``cosine``, for an unknown form, and where decay and warmup overlap.
    """
    _check_warmup(warmup_steps, total_steps)
    _fraction("min_lr_fraction", min_lr_fraction)
    if form not in FORMS:
        raise ValueError(f"form={form!r}: allowed are {', '.join(FORMS)}")
    decay_steps = _decay_steps(warmup_steps, total_steps, decay_fraction)
    over = step - (total_steps - decay_steps)
    if step <= warmup_steps or over <= 0:
        return constant(step, warmup_steps=warmup_steps)
    _whole("step", step, 0)
    x = min(1.0, over / decay_steps) if decay_steps else 0.0
    return min_lr_fraction + (1.0 - min_lr_fraction) * (1.0 - (math.sqrt(x) if form == "1-sqrt" else x))


@dataclass(frozen=True, kw_only=True)
class ConstantSchedule:
    """``constant`` with its numbers; ``schedule(step)`` is the factor."""

    warmup_steps: int = 0

    def __post_init__(self) -> None:
        self(0)

    def __call__(self, step: int) -> float:
        return constant(step, warmup_steps=self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """``cosine`` with its numbers; ``schedule(step)`` is the factor."""

    warmup_steps: int
    total_steps: int
    min_lr_fraction: float = 0.1

    def __post_init__(self) -> None:
        self(0)

    def __call__(self, step: int) -> float:
        return cosine(
            step,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            min_lr_fraction=self.min_lr_fraction,
        )


@dataclass(frozen=True, kw_only=True)
class WSDSchedule:
    """``wsd`` with its numbers; ``schedule(step)`` is the factor."""

    warmup_steps: int
    total_steps: int
    decay_fraction: float = 0.2
    min_lr_fraction: float = 0.0
    form: str = "linear"

    def __post_init__(self) -> None:
        self(0)

    def __call__(self, step: int) -> float:
        return wsd(
            step,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
            decay_fraction=self.decay_fraction,
            min_lr_fraction=self.min_lr_fraction,
            form=self.form,
        )
