"""The verdict on a run, in one sentence, with the numbers that it rests on.

healthy      nothing below was seen
noisy        it trained, with spikes, with operands that lose much of what they carry, with weight gradients that the noise
             of quantization hides, or with saturated attention
unstable     the loss left its course and came back, or an operand is more noise than signal
diverged     a loss or gradient was not finite, or the loss ended far above what it had been
incomplete   killed, interrupted or running; no alarm until there
failed       it did not learn, or its files, disk, data or census say that it does not count

Where instruments were logged, the layer, GEMM and operand to blame are named; the census at step 0 serves where they
were not. All thresholds stand in ``limits.py``. (How a run *ended* is verdict.json, ``training/verdict.py``.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import curve_scores
from .blame import Blame, failing_operand, lasting_trouble, low_operands, worst_instruments
from .instrument_records import Alert
from .limits import (
    CLIP_SHARE,
    DIVERGED_NATS,
    JOINT_SCORE,
    LEARNED_NATS,
    LONE_SPIKES,
    SPIKE_SCORE,
    SPIKE_SHARE,
)
from .run_records import RunRecord
from .spikes import LEAST

HEALTHY, NOISY, UNSTABLE, DIVERGED = "healthy", "noisy", "unstable", "diverged"
INCOMPLETE, FAILED = "incomplete", "failed"
VERDICTS = (HEALTHY, NOISY, UNSTABLE, DIVERGED, INCOMPLETE, FAILED)
# Verdicts on what the run computed, as opposed to what became of it
NUMERICAL = (HEALTHY, NOISY, UNSTABLE, DIVERGED)


@dataclass(frozen=True)
class Health:
    """sentence: for people. evidence: the alarms behind the verdict. notes: what else to know. first_step: where it
    first went wrong (an optimizer step, from 1). blame: the operand or parameter."""

    verdict: str
    sentence: str
    evidence: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    first_step: int | None = None
    blame: Blame | None = None

    @property
    def numerical(self) -> bool:
        return self.verdict in NUMERICAL


@dataclass(frozen=True)
class _Alarm:
    verdict: str
    text: str
    step: int | None = None


def judge(run: RunRecord, reference: RunRecord | None = None) -> Health:
    """reference: the unquantized run of the same seed and data; spikes that it has in the same steps are the data's, and
    raise no alarm."""
    if run.state == "unreadable":
        return Health(FAILED, f"failed: {run.problem}", (str(run.problem),))
    shared = _spikes(reference) if reference is not None and reference is not run else frozenset()
    alarms = [*_not_finite(run), *_course(run), *_stall(run)]
    spiky, notes = _spike_alarms(run, shared)
    low, kept = low_operands(run), _notes(run)
    alarms += [*spiky, *(_Alarm(NOISY if db > 0 else UNSTABLE, text) for db, text in low)]
    alarms += [_Alarm(NOISY, text) for text in lasting_trouble(run)]
    of_course = [a for a in alarms if a.verdict in (DIVERGED, UNSTABLE, NOISY)]
    verdict = next(
        (v for v in (DIVERGED, FAILED, UNSTABLE, NOISY) if any(a.verdict == v for a in alarms)), None
    )
    outcome = run.verdict.get("outcome")
    if verdict != DIVERGED and run.state in ("unfinished", "stopped") and outcome != "non_finite":
        ended = INCOMPLETE if run.state == "unfinished" or outcome == "interrupted" else FAILED
        so_far = f"; until there it was {verdict}" if verdict else "; until there nothing raised an alarm"
        evidence = (str(run.problem), *(a.text for a in alarms))
        text = f"{ended}: {run.problem}{so_far}"
        return Health(ended, text, evidence, (*notes, *kept), _first(of_course), None)
    if verdict is None:
        return Health(HEALTHY, _healthy(run), (), (*notes, *kept))
    step = _first([a for a in alarms if a.verdict == verdict])
    blame = failing_operand(run, step) if verdict in (DIVERGED, UNSTABLE, NOISY) else None
    texts = [a.text for a in sorted(alarms, key=lambda a: -_RANK.index(a.verdict))]
    told = blame is None or str(blame.operand) in texts[0]
    sentence = f"{verdict}: {texts[0]}" + ("" if told else f"; {blame}")
    if run.state == "unfinished":
        notes = [*notes, str(run.problem)]
    return Health(verdict, sentence, tuple(texts), (*notes, *kept), step, blame)


_RANK = (NOISY, UNSTABLE, FAILED, DIVERGED)


def _first(alarms: Iterable[_Alarm]) -> int | None:
    return min((a.step for a in alarms if a.step is not None), default=None)


def _healthy(run: RunRecord) -> str:
    steps = run.curves.last_step
    loss = f", validation loss {run.val_loss:.4f}" if "val_loss" in run.summary else ""
    return f"healthy: {steps:,} steps without an alarm{loss}"


def _step(run: RunRecord, index: int) -> int:
    return int(run.curves.step[index])


def _spikes(run: RunRecord) -> frozenset[int]:
    """The steps of a run's loss spikes, and those next to them."""
    found = [_step(run, i) for i in run.spikes]
    return frozenset(s + d for s in found for d in (-1, 0, 1))


def _not_finite(run: RunRecord) -> list[_Alarm]:
    alarms = []
    if run.verdict.get("outcome") == "non_finite":
        named = run.verdict.get("parameter")
        where = f"; the first gradient that is not finite is that of {named}" if named else ""
        quantity, value = run.verdict.get("quantity") or "loss or gradient", run.verdict.get("value")
        step = int(run.verdict["step"])
        alarms.append(_Alarm(DIVERGED, f"the {quantity} of step {step} is {value}{where}", step))
    curves = run.curves
    for what, values in (("loss", curves.loss), ("gradient norm", curves.grad_norm)):
        # nan of a gradient norm may also be one that was not logged: a column of them says nothing
        bad = np.flatnonzero(~np.isfinite(values)) if np.isfinite(values).any() else np.array([], dtype=int)
        if len(bad) and not alarms:
            first = _step(run, bad[0])
            alarms.append(_Alarm(DIVERGED, f"the {what} of step {first} is {values[bad[0]]}", first))
    bad = np.flatnonzero(~np.isfinite(curves.val_loss))
    if len(bad) and not alarms:
        step = int(curves.val_step[bad[0]])
        alarms.append(
            _Alarm(DIVERGED, f"the validation loss at step {step} is {curves.val_loss[bad[0]]}", step)
        )
    return alarms


def _course(run: RunRecord) -> list[_Alarm]:
    """The loss far above what it had been: at the end, or in between."""
    finite = np.flatnonzero(np.isfinite(run.curves.loss))
    losses = run.curves.loss[finite]
    above = curve_scores.excess(losses)
    alarms: list[_Alarm] = []
    if len(above) and above.max() > DIVERGED_NATS:
        at_end = above[-1] > DIVERGED_NATS
        crossed = int(np.argmax(above > DIVERGED_NATS))
        start = max(0, crossed - LEAST + 1)
        floor = float(np.min(losses[: start + 1]))
        left = np.flatnonzero(losses[start : crossed + 1] > floor + DIVERGED_NATS)
        step = _step(run, finite[start + int(left[0]) if len(left) else crossed])
        how = "did not come back" if at_end else "came back"
        text = f"the loss rose from step {step} on, by up to {above.max():.2f} nats above its best, and {how}"
        alarms.append(_Alarm(DIVERGED if at_end else UNSTABLE, text, step))
    if run.state == "diverged" and math.isfinite(float(run.summary["val_loss"])) and not alarms:
        best_at = int(np.argmin(run.curves.val_loss))
        later = run.curves.val_step[best_at + 1 :]
        alarms.append(
            _Alarm(DIVERGED, str(run.problem), int(later[0]) if len(later) else run.curves.last_step)
        )
    return alarms


def _stall(run: RunRecord) -> list[_Alarm]:
    """Weights that stand still, and a loss that never fell."""
    curves = run.curves
    same = np.flatnonzero((np.diff(curves.val_loss) == 0) & (np.diff(curves.val_step) > 0))
    if len(same):
        a, b = int(curves.val_step[same[0]]), int(curves.val_step[same[0] + 1])
        loss = curves.val_loss[same[0]]
        text = f"it does not learn: the validation loss is the same, {loss:.6f}, at steps {a} and {b}, so no weight moved"
        return [_Alarm(FAILED, text, a)]
    from_scratch = (
        (run.config.get("model") or {}).get("init_from") is None and len(curves) and curves.step[0] == 1
    )
    finite = curves.loss[np.isfinite(curves.loss)]
    if not from_scratch or len(finite) < 2 * LEAST:
        return []
    start, end = float(np.median(finite[:3])), float(np.median(finite[-LEAST:]))
    if abs(start - end) < LEARNED_NATS:
        return [_Alarm(FAILED, f"it does not learn: the loss is {end:.3f} after {start:.3f} at the start", 1)]
    return []


def _spike_alarms(run: RunRecord, shared: frozenset[int]) -> tuple[list[_Alarm], list[str]]:
    """Alarms and notes. Non-finite losses are ``_not_finite``'s, a loss that leaves its course for good ``_course``'s."""
    losses = run.curves.loss
    if len(losses) == 0:
        return [], []
    mine = [i for i in run.spikes if math.isfinite(losses[i])]
    own = [_step(run, i) for i in mine if _step(run, i) not in shared]
    together = [_step(run, i) for i in curve_scores.joint_spikes(run.loss_scores, run.curves.grad_norm)]
    joint = [s for s in together if s not in shared]
    notes = []
    if len(own) < len(mine):
        notes.append(
            f"{len(mine) - len(own)} loss spikes in steps where the baseline has them too: the data's"
        )
    if joint or (len(own) > LONE_SPIKES and len(own) / len(losses) > SPIKE_SHARE):
        gradient = f", {len(joint)} of loss and gradient norm together" if joint else ""
        first = min([*own, *joint])
        text = f"{len(own)} loss spikes{gradient}, the first at step {first} (score above {SPIKE_SCORE:g}, together {JOINT_SCORE:g})"
        return [_Alarm(NOISY, text, first)], notes
    if own:
        notes.append(
            f"{len(own)} loss spike{'s' * (len(own) > 1)} without one of the gradient, at step {own[0]}"
        )
    return [], notes


def _alerts(run: RunRecord) -> list[str]:
    """A note on what the instruments cried while it trained: each name once."""
    by_name: dict[str, list[Alert]] = {}
    for alert in run.alerts:
        by_name.setdefault(alert.name, []).append(alert)
    return [
        f"alert {name} while it trained, at step {', '.join(str(a.step) for a in found[:3])}"
        f"{f' and {len(found) - 3} more' if len(found) > 3 else ''}: {found[0].message}"
        for name, found in by_name.items()
    ]


def _notes(run: RunRecord) -> Sequence[str]:
    notes = [*worst_instruments(run), *_alerts(run)]
    if run.instruments_cut and run.state == "completed":
        notes.append(
            "instruments.jsonl ends in the middle of a row: what the instruments found later is lost"
        )
    curves = run.curves
    late = max(int((run.config.get("schedule") or {}).get("warmup_steps") or 0), len(curves) // 5)
    clipped = curves.clipped[late:]
    clipped = clipped[~np.isnan(clipped)]
    if len(clipped) >= LEAST and clipped.mean() > CLIP_SHARE:
        notes.append(
            f"{clipped.mean():.0%} of the gradients after step {late} are clipped: the clip norm sets those steps"
        )
    if run.state == "completed" and run.window_losses is None:
        notes.append("no losses of validation windows were kept: no interval over windows")
    return notes
