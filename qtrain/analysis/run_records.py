"""What a run's folder says of the run, whatever became of it. Reads files alone: no Lightning, no checkpoint.

completed    it ran to its last step
diverged     it did, and ended DIVERGED_NATS above its own best validation, or without a finite loss
stopped      it ended with another verdict: non_finite, census_failed, interrupted, ...
unfinished   it has no verdict: it was killed, or is running
unreadable   its files are not those of a run
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .spikes import DIVERGED_NATS, spike_steps

_METRICS, _SUMMARY, _VERDICT, _CONFIG = "metrics.jsonl", "summary.json", "verdict.json", "config.yaml"


@dataclass(frozen=True)
class RunRecord:
    """state: see above. problem: a sentence on why it is not ``completed``. config: the run's own; summary: its numbers
    (empty unless it completed). losses: of every step; validation: (step, nats per token). clip_share: of the steps.
    tokens_per_s: the median step's."""

    folder: Path
    name: str
    seed: int
    state: str
    problem: str | None
    config: Mapping[str, Any] = field(repr=False)
    summary: Mapping[str, Any] = field(repr=False)
    losses: tuple[float, ...] = field(repr=False)
    validation: tuple[tuple[int, float], ...] = field(repr=False)
    clip_share: float | None
    tokens_per_s: float | None
    spikes: tuple[int, ...]

    @property
    def completed(self) -> bool:
        return self.state == "completed"

    @property
    def val_loss(self) -> float:
        return float(self.summary["val_loss"])


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill cut is left out. Raises ValueError for another."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for i, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if i + 1 < len(lines):
                raise ValueError(f"line {i + 1} of {path.name} is no JSON") from None
    return rows


def read_run(folder: Path) -> RunRecord:
    """The record of one run; one that cannot be read is a record too, with its folder's names."""
    try:
        return _read(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        problem = f"its files are not those of a run ({type(error).__name__}: {error})"
        nothing: dict[str, Any] = {}
        return RunRecord(
            folder, folder.parent.name, -1, "unreadable", problem, nothing, nothing, (), (), None, None, ()
        )


def _read(folder: Path) -> RunRecord:
    import yaml

    try:
        config = yaml.safe_load((folder / _CONFIG).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{_CONFIG}: {error}") from error
    rows, verdict = _rows(folder / _METRICS), _json(folder / _VERDICT)
    train = [row for row in rows if row["kind"] == "train"]
    losses = tuple(float(row["loss"]) for row in train)
    validation = tuple((int(row["step"]), float(row["val_loss"])) for row in rows if row["kind"] == "val")
    summary = _json(folder / _SUMMARY) if verdict and verdict["outcome"] == "completed" else None
    state, problem = _state(config, verdict, summary, validation, len(losses))
    return RunRecord(
        folder=folder,
        name=str(config["name"]),
        seed=int(config["seed"]),
        state=state,
        problem=problem,
        config=config,
        summary=summary or {},
        losses=losses,
        validation=validation,
        clip_share=statistics.fmean(bool(row["clipped"]) for row in train) if train else None,
        tokens_per_s=statistics.median(row["tokens_per_s"] for row in train) if train else None,
        spikes=tuple(spike_steps(losses)),
    )


def _state(
    config: Mapping[str, Any],
    verdict: Any,
    summary: Any,
    validation: tuple[tuple[int, float], ...],
    steps: int,
) -> tuple[str, str | None]:
    if verdict is None:
        return "unfinished", f"no verdict after step {steps} of {config['steps']}: killed, or still running"
    if verdict["outcome"] != "completed":
        return "stopped", f"{verdict['outcome']} at step {verdict['step']}: {verdict['message']}"
    if summary is None:
        return "unreadable", f"it completed and has no {_SUMMARY}"
    final, best = float(summary["val_loss"]), min((loss for _, loss in validation), default=math.inf)
    if not math.isfinite(final):
        return "diverged", f"its validation loss is {final}"
    if final > best + DIVERGED_NATS:
        return "diverged", f"its validation loss rose from {best:.3f} to {final:.3f}"
    return "completed", None


def read_runs(folder: Path, names: list[str]) -> list[RunRecord]:
    """The runs of these experiments, ``folder/NAME/RUN``, by experiment and name."""
    runs = [run for name in names for run in sorted((folder / name).glob("*")) if run.is_dir()]
    return [read_run(run) for run in runs if not run.name.startswith(".")]
