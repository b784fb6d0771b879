"""Which layer, GEMM and operand is to blame, from instruments.jsonl, or the census at step 0 where nothing was logged.

An operand is said to lose much of what it carries below ``limits.LOW_FORWARD_DB``, of gradients ``LOW_GRADIENT_DB``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .curves import Operand, Series
from .limits import (
    FALL_DB,
    LEAST_SAMPLES,
    LOW_FORWARD_DB,
    LOW_GRADIENT_DB,
    MAX_LOGIT,
    NOISE_FLOOR,
    STALLED_SHARE,
    ZERO_BIN,
)
from .run_records import RunRecord


@dataclass(frozen=True)
class Blame:
    """operand: layer, GEMM and operand; or the name of a parameter. why: with its number. step: of the observation."""

    operand: Operand | str
    why: str
    step: int

    def __str__(self) -> str:
        return f"look at {self.operand} first: {self.why}"


def _limit(operand: Operand) -> float:
    return LOW_GRADIENT_DB if operand.operand == "grad_output" else LOW_FORWARD_DB


def sqnr_series(run: RunRecord) -> dict[Operand, Series]:
    """Of every quantized operand: logged ones, else the census's one value at step 0. Infinite values (exact) are kept."""
    if run.curves.sqnr:
        return dict(run.curves.sqnr)
    found: dict[Operand, Series] = {}
    for row in run.observations:
        gemm, _, operand = str(row["name"]).partition(".")
        if operand and row["sqnr_db"] is not None:
            key = Operand(str(row["layer"]), gemm, operand)
            least = min(float(row["sqnr_db"]), found[key][1][0]) if key in found else float(row["sqnr_db"])
            found[key] = (np.zeros(1), np.array([least]))
    return found


def lowest_sqnr(run: RunRecord) -> tuple[float, Operand, int] | None:
    """(dB, operand, step) of the lowest SQNR that was seen."""
    found = [
        (float(values[i]), operand, int(steps[i]))
        for operand, (steps, values) in sqnr_series(run).items()
        if not np.isnan(values).all()
        for i in [int(np.nanargmin(values))]
    ]
    return min(found, default=None)


def low_operands(run: RunRecord) -> list[tuple[float, str]]:
    """(median dB, sentence) of the worst operand whose median SQNR lies below its limit; a passing dip is no alarm."""
    low = []
    for operand, (steps, values) in sqnr_series(run).items():
        known = values[~np.isnan(values)]
        if len(known) and (middle := float(np.median(known))) < _limit(operand):
            first = int(steps[np.flatnonzero(values < _limit(operand))[0]])
            low.append((middle, operand, first))
    if not low:
        return []
    middle, operand, first = min(low)
    more = f" (and {len(low) - 1} more operands)" if len(low) > 1 else ""
    text = f"the SQNR of {operand} is {middle:.1f} dB from step {first} on, below {_limit(operand):.1f}{more}"
    return [(middle, text)]


def lasting_trouble(run: RunRecord) -> list[str]:
    """A sentence for the weight gradient that quantization noise hides, and for the attention that is saturated, over most of
    the run: the worst median of LEAST_SAMPLES samples or more. A passing dip is a note (``worst_instruments``)."""
    found = []
    for suffix, sign, limit, text in (
        ("/noise_floor", 1, NOISE_FLOOR, "{0} is {1:.2f} from step {2} on, below {3:g}: quantization noise hides the gradient"),
        ("/max_logit", -1, MAX_LOGIT, "{0} is {1:.0f} from step {2} on, above {3:g}: attention is saturated"),
    ):  # fmt: skip
        lasting = []
        for name, (steps, values) in run.curves.instruments.items():
            known = ~np.isnan(values)
            if not name.endswith(suffix) or known.sum() < LEAST_SAMPLES:
                continue
            middle = float(np.median(values[known]))
            beyond = known & (sign * values < sign * limit)
            if sign * middle < sign * limit:
                lasting.append((sign * middle, name, int(steps[np.flatnonzero(beyond)[0]])))
        if lasting:
            worst, name, first = min(lasting)
            found.append(text.format(name, sign * worst, first, limit))
    return found


def failing_operand(run: RunRecord, step: int | None) -> Blame | None:
    """Who to look at for what happened at ``step`` (None: over the whole run): the parameter whose gradient was the
    first not to be finite; else the operand below its limit; else the second moment stored as 0; else the operand whose
    SQNR had fallen most by then; else the lowest. None where nothing was observed."""
    parameter = run.verdict.get("parameter")
    if run.verdict.get("outcome") == "non_finite" and parameter:
        return Blame(str(parameter), "its gradient is the first that is not finite", int(run.verdict["step"]))
    until = math.inf if step is None else step
    low, falls, lowest = [], [], []
    for operand, (steps, values) in sqnr_series(run).items():
        seen = ~np.isnan(values) & (steps <= until)
        if not seen.any():
            continue
        at, known = steps[seen], values[seen]
        last, worst = float(known[-1]), int(np.argmin(known))
        lowest.append((float(known[worst]), operand, int(at[worst])))
        if last < _limit(operand):
            low.append((last, operand, int(at[-1])))
        if len(known) > 1 and np.isfinite(known).all():
            falls.append((float(np.median(known[:-1])) - last, operand, last, int(at[-1])))
    if low:
        db, operand, at_step = min(low)
        return Blame(
            operand, f"its SQNR is {db:.1f} dB at step {at_step}, below {_limit(operand):.1f}", at_step
        )
    if (state := _zeroed_state(run, until)) is not None:
        return state
    if falls and max(falls)[0] > FALL_DB:
        fall, operand, last, at_step = max(falls)
        return Blame(
            operand, f"its SQNR had fallen by {fall:.1f} dB to {last:.1f} at step {at_step}", at_step
        )
    if lowest and math.isfinite(min(lowest)[0]):
        db, operand, at_step = min(lowest)
        return Blame(operand, f"it has the lowest SQNR, {db:.1f} dB at step {at_step}", at_step)
    return None


def _zeroed_state(run: RunRecord, until: float) -> Blame | None:
    found = [
        (float(value), name, int(step))
        for name, (steps, values) in run.curves.instruments.items()
        if name.endswith(".zero_bin")
        for step, value in zip(steps, values, strict=True)
        if step <= until and value > ZERO_BIN
    ]
    if not found:
        return None
    share, name, step = max(found)
    state = name.removeprefix("optim/").removesuffix(".zero_bin")
    return Blame(state, f"{share:.1%} of its second moments are stored as 0 at step {step}", step)


def worst_instruments(run: RunRecord) -> list[str]:
    """A note for each other instrument beyond its limit: the worst of its kind."""
    kinds = (
        ("/noise_floor", min, lambda v: v < NOISE_FLOOR, "{0} is {1:.2f} at step {2}, below 1: quantization noise hides the gradient"),
        (".zero_bin", max, lambda v: v > ZERO_BIN, "{0} is {1:.1%} at step {2}: those weights take steps of lr m / eps"),
        ("/max_logit", max, lambda v: v > MAX_LOGIT, "{0} is {1:.0f} at step {2}: attention saturates"),
        (".unchanged", max, lambda v: v > STALLED_SHARE, "{0} is {1:.3f} at step {2}: the state stalls"),
    )  # fmt: skip
    notes = []
    for suffix, worst, beyond, text in kinds:
        found = [
            (float(value), name, int(step))
            for name, (steps, values) in run.curves.instruments.items()
            if name.endswith(suffix)
            for step, value in zip(steps, values, strict=True)
            if beyond(value)
        ]
        if found:
            value, name, step = worst(found)
            notes.append(text.format(name, value, step))
    return notes
