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
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import curve_scores
from .curves import Curves, curves_of
from .instrument_records import INSTRUMENTS, Alert, read_instruments
from .limits import DIVERGED_NATS

_METRICS, _SUMMARY, _VERDICT, _CONFIG = "metrics.jsonl", "summary.json", "verdict.json", "config.yaml"
_WINDOWS, _CENSUS = "window_losses.npy", "census.json"


@dataclass(frozen=True, eq=False)
class RunRecord:
    """state: see above. problem: a sentence on why it is not ``completed``. config: the run's own; summary: its numbers
    (empty unless it completed). verdict: verdict.json. window_losses: [n] nats a token of the final validation's
    windows, where they were kept. observations: of the census, the quantized operands'. alerts: of the instruments, as it
    trained. instruments_cut: whether the file of the instruments ends in the middle of a row."""

    folder: Path
    name: str
    seed: int
    state: str
    problem: str | None
    config: Mapping[str, Any] = field(repr=False)
    summary: Mapping[str, Any] = field(repr=False)
    curves: Curves = field(repr=False)
    verdict: Mapping[str, Any] = field(repr=False, default_factory=dict)
    window_losses: NDArray[np.float64] | None = field(repr=False, default=None)
    observations: tuple[Mapping[str, Any], ...] = field(repr=False, default=())
    alerts: tuple[Alert, ...] = field(repr=False, default=())
    instruments_cut: bool = field(repr=False, default=False)

    @property
    def completed(self) -> bool:
        return self.state == "completed"

    @property
    def val_loss(self) -> float:
        return float(self.summary["val_loss"])

    @property
    def clip_share(self) -> float | None:
        """Of the steps."""
        return self.curves.clip_share

    @property
    def tokens_per_s(self) -> float | None:
        """The median step's."""
        return self.curves.median_tokens_per_s

    @cached_property
    def loss_scores(self) -> NDArray[np.float64]:
        """[n]: of every step (``curve_scores.robust_scores``)."""
        return curve_scores.robust_scores(self.curves.loss)

    @cached_property
    def spikes(self) -> tuple[int, ...]:
        """Indices of the steps whose loss is a spike (``curve_scores.py``)."""
        return tuple(curve_scores.spikes(self.loss_scores))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON: it was cut or altered ({error})") from error


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


def unreadable(folder: Path, error: Exception, config: Mapping[str, Any] | None = None) -> RunRecord:
    """The record of files that are not those of a run. config: where that at least could be read."""
    problem = f"its files are not those of a run ({type(error).__name__}: {error})"
    known = config if config and "seed" in config else {}
    name, seed = str(known.get("name", folder.parent.name)), int(known.get("seed", -1))
    return RunRecord(folder, name, seed, "unreadable", problem, known, {}, curves_of([], 0))


def read_run(folder: Path) -> RunRecord:
    """The record of one run; one that cannot be read is a record too, with the name and seed of its config, else with
    its folder's names and seed -1."""
    config = None
    try:
        config = read_config(folder / _CONFIG)
        return _read(folder, config)
    except (ValueError, KeyError, TypeError, OSError) as error:
        return unreadable(folder, error, config)


def read_config(path: Path) -> Mapping[str, Any]:
    """A run's config.yaml. Raises ValueError where it is none, FileNotFoundError without one."""
    import yaml

    try:
        # libyaml's loader, where it was built, reads the same ten times as fast
        config = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ValueError(f"{_CONFIG}: {error}") from error
    if not isinstance(config, Mapping):
        raise ValueError(f"{_CONFIG} holds no configuration")
    return config


def _windows(path: Path) -> NDArray[np.float64] | None:
    try:
        return np.load(path, allow_pickle=False).astype(np.float64).ravel() if path.is_file() else None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path.name} was cut or altered ({error})") from error


def _read(folder: Path, config: Mapping[str, Any]) -> RunRecord:
    verdict, rows = _json(folder / _VERDICT), _rows(folder / _METRICS)
    instruments = read_instruments(folder / INSTRUMENTS)
    step_tokens = float(config.get("batch_sequences", 0)) * float(config.get("sequence_tokens") or 0)
    curves = curves_of(rows, step_tokens, instruments.samples)
    summary = _json(folder / _SUMMARY) if verdict and verdict["outcome"] == "completed" else None
    state, problem = state_of(config, verdict, summary, curves)
    census = _json(folder / _CENSUS) or {"eager": {"observations": []}}
    return RunRecord(
        folder=folder,
        name=str(config["name"]),
        seed=int(config["seed"]),
        state=state,
        problem=problem,
        config=config,
        summary=summary or {},
        curves=curves,
        verdict=verdict or {},
        window_losses=_windows(folder / _WINDOWS) if state == "completed" else None,
        alerts=instruments.alerts,
        instruments_cut=instruments.cut,
        observations=tuple(o for o in census["eager"]["observations"] if o["levels"] is not None),
    )


def state_of(config: Mapping[str, Any], verdict: Any, summary: Any, curves: Curves) -> tuple[str, str | None]:
    """(state, problem), see above. verdict, summary: None where the run has none."""
    steps = curves.last_step
    if verdict is None:
        return "unfinished", f"no verdict after step {steps} of {config['steps']}: killed, or still running"
    if verdict["outcome"] != "completed":
        return "stopped", f"{verdict['outcome']} at step {verdict['step']}: {verdict['message']}"
    if summary is None:
        return "unreadable", f"it completed and has no {_SUMMARY}"
    if steps != verdict["step"] or len(curves) != steps - int(curves.step[0]) + 1:
        return "unreadable", (
            f"it completed {verdict['step']} steps, and {_METRICS} has {len(curves)} rows up to step {steps}: the "
            "file was cut or altered"
        )
    final, best = float(summary["val_loss"]), float(np.min(curves.val_loss, initial=math.inf))
    if not math.isfinite(final):
        return "diverged", f"its validation loss is {final}"
    if final > best + DIVERGED_NATS:
        return "diverged", f"its validation loss rose from {best:.3f} to {final:.3f}"
    return "completed", None


def read_runs(folder: Path, names: list[str]) -> list[RunRecord]:
    """The runs of these experiments, ``folder/NAME/RUN``, by experiment and name."""
    runs = [run for name in names for run in sorted((folder / name).glob("*")) if run.is_dir()]
    return [read_run(run) for run in runs if not run.name.startswith(".")]
