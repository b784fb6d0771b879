"""How a run ends: completed, or stopped for a reason that is a result of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """outcome: ``completed``, ``interrupted`` (by ``signal``; it can be resumed), ``non_finite``, ``census_failed``,
    ``storage_failed``, ``data_changed`` or ``data_unavailable``. step: the optimizer step (from 1) that it
    concerns, the last one of a completed run. message: a sentence for people. quantity, value: what was not
    finite. parameter: the first, in the model's order, whose gradient is not finite; parameters: how many."""

    outcome: str
    step: int
    message: str
    quantity: str | None = None
    value: float | None = None
    parameter: str | None = None
    parameters: int | None = None
    signal: int | None = None

    @property
    def good(self) -> bool:
        return self.outcome == "completed"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class RunStopped(Exception):
    """Ends a fit with a verdict; the trainer lets it through and the run reports it without a stack trace."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.message)
        self.verdict = verdict
