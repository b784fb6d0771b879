"""A run as it is right now, from the ends of its files: for hundreds of runs at once, while they are being written.

Short files are read whole, and then the verdict is that of ``qtrain compare``. Of longer ones are read the first part, the
last part, and a few places in between, so that a verdict knows where the loss started, how low it has been, and its last
steps in a row (``whole`` says which). A last line that is half-written, rows of older versions and files that vanish
meanwhile are no errors.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .curves import curves_of
from .health import FAILED, Health, judge
from .instrument_records import INSTRUMENTS, Alert, flat, row_of
from .limits import DIVERGED_NATS
from .run_records import RunRecord, read_config

# A row of metrics.jsonl is some 200 bytes. The head holds the first 80 steps, the tail the last 240: twice the window of a
# spike's score; a place in between 20 steps, of which the median is one of ``curve_scores.excess``
WHOLE, HEAD, TAIL, PLACES, PLACE = 128 << 10, 16 << 10, 48 << 10, 8, 4096
# Samples of a hundred operands are 10 KiB a row, and alerts stand among them
INSTRUMENTS_TAIL = 128 << 10
# Validations may lie thousands of rows apart: how far back the last one is looked for
_VAL_BACK, _BLOCK = 4 << 20, 256 << 10
# Steps of which the pace is taken
PACE_STEPS = 50


@dataclass(frozen=True, eq=False)
class RunTail:
    """record: of what was read, with a state of ``run_records`` (but ``unreadable`` only where the config is none). whole:
    whether everything was read. step: the last one done; steps: of all, None where the config does not say. loss,
    val_loss: the last ones, nats a token. pace: seconds a step, of the last steps and whatever stood between them.
    attempts: attempts.jsonl. written: when the run last wrote, seconds since the epoch. broken: lines that are no rows,
    though others follow them."""

    folder: Path
    record: RunRecord = field(repr=False)
    whole: bool
    step: int
    steps: int | None
    loss: float | None
    val_loss: float | None
    pace: float | None
    tokens_per_s: float | None
    attempts: tuple[Mapping[str, Any], ...]
    written: float
    broken: int = 0

    @property
    def config(self) -> Mapping[str, Any]:
        return self.record.config

    @property
    def verdict(self) -> Mapping[str, Any]:
        """verdict.json: how the last attempt ended; empty where it left no word."""
        return self.record.verdict

    @cached_property
    def health(self) -> Health:
        """The verdict on what was read: of a run that is not done, on its steps until now."""
        record = self.record
        if record.state in ("unfinished", "stopped"):
            record = replace(record, state="completed", problem=None)
        try:
            return judge(record)
        except (KeyError, TypeError, ValueError) as error:
            return Health(
                FAILED, f"failed: its files are not those of a run ({type(error).__name__}: {error})"
            )


def read_tail(folder: Path) -> RunTail | None:
    """None where the folder is gone. Raises nothing for what stands in the files."""
    if not folder.is_dir():
        return None
    config, problem = _config(folder)
    rows, whole, broken = _metrics(folder / "metrics.jsonl")
    samples, alerts, all_samples = _instruments(folder / INSTRUMENTS)
    verdict, summary = _mapping(folder / "verdict.json"), _mapping(folder / "summary.json")
    attempts, _ = _rows(_read(folder / "attempts.jsonl"))
    step_tokens = _number(config.get("batch_sequences")) * _number(config.get("sequence_tokens"))
    try:
        curves = curves_of(rows, step_tokens, samples)
    except (KeyError, TypeError, ValueError) as error:  # rows of another program
        problem = problem or f"metrics.jsonl holds other rows than those of a run ({error})"
        curves, rows = curves_of([], 0), []
    completed = bool(verdict) and verdict.get("outcome") == "completed"
    val_loss = _last_val(folder / "metrics.jsonl", rows, whole, summary if completed else {})
    best = float(np.min(curves.val_loss, initial=math.inf))
    state, why = _state(config, verdict, val_loss, best, curves.last_step)
    if problem is not None:
        state, why = "unreadable", problem
    record = RunRecord(
        folder=folder,
        name=str(config.get("name", folder.parent.name)),
        seed=_seed(config),
        state=state,
        problem=why,
        config=config,
        summary={"val_loss": val_loss} if completed and val_loss is not None else {},
        curves=curves,
        verdict=verdict or {},
        alerts=tuple(alerts),
        observations=() if samples else _census(folder / "census.json"),
    )
    trained = [row for row in rows if row["kind"] == "train"]
    pace, rate = _pace(trained)
    return RunTail(
        folder=folder,
        record=record,
        whole=whole and all_samples,
        step=max(curves.last_step, int(_number((verdict or {}).get("step")) if completed else 0)),
        steps=_whole_number(config.get("steps")),
        loss=float(curves.loss[-1]) if len(curves) else None,
        val_loss=val_loss,
        pace=pace,
        tokens_per_s=rate,
        attempts=tuple(attempts),
        written=_written(folder),
        broken=broken,
    )


class TailReader:
    """``read_tail`` for those who look again and again: a run that has not written since is not read again."""

    def __init__(self) -> None:
        self._known: dict[Path, RunTail] = {}

    def __call__(self, folder: Path) -> RunTail | None:
        known = self._known.get(folder)
        # A file may be written twice within one tick of the clock of a file system, of some a second
        if known is not None and known.written == _written(folder) < time.time() - 5:
            return known
        tail = read_tail(folder)
        if tail is not None:
            self._known[folder] = tail
        return tail


def _state(
    config: Mapping[str, Any],
    verdict: Mapping[str, Any] | None,
    val_loss: float | None,
    best: float,
    step: int,
) -> tuple[str, str | None]:
    if not verdict:
        return "unfinished", f"no verdict after step {step} of {config.get('steps')}"
    if verdict.get("outcome") != "completed":
        return "stopped", f"{verdict.get('outcome')} at step {verdict.get('step')}: {verdict.get('message')}"
    if val_loss is not None and not math.isfinite(val_loss):
        return "diverged", f"its validation loss is {val_loss}"
    if val_loss is not None and val_loss > best + DIVERGED_NATS:
        return "diverged", f"its validation loss rose from {best:.3f} to {val_loss:.3f}"
    return "completed", None


def _read(path: Path, start: int = 0, length: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError:  # not there yet, or no longer
        return b""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _written(folder: Path) -> float:
    times = []
    for name in (".", "metrics.jsonl", INSTRUMENTS, "verdict.json", "attempts.jsonl"):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=0.0)


def _rows(text: bytes) -> tuple[list[dict[str, Any]], int]:
    """(rows, lines that are none though others follow)."""
    *lines, last = text.split(b"\n")
    try:
        rows = json.loads(b"[" + b",".join(lines) + b"]")  # at once, where all are whole
    except ValueError:
        rows = [_row(line) for line in lines]
    rows.append(_row(last))  # a line that is being written, unless it is whole
    good = [row for row in rows if isinstance(row, dict)]
    while rows and not isinstance(rows[-1], dict):
        rows.pop()
    return good, len(rows) - len(good)


def _row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # UnicodeDecodeError is one too
        return None


def _whole_lines(text: bytes) -> bytes:
    """Without the part of a line at either end."""
    return text[text.find(b"\n") + 1 : text.rfind(b"\n") + 1]


def _of_metrics(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in rows if r.get("kind") in ("train", "val") and isinstance(r.get("step"), int)]


def _metrics(path: Path) -> tuple[list[dict[str, Any]], bool, int]:
    """(rows in the order of the file, whether they are all, broken lines)."""
    size = _size(path)
    if size <= WHOLE:
        rows, broken = _rows(_read(path, 0, WHOLE))
        return _of_metrics(rows), True, broken
    head = _read(path, 0, HEAD)
    parts = [head[: head.rfind(b"\n") + 1]]
    between = size - HEAD - TAIL
    # Places of equal distance, none overlapping its neighbours: WHOLE - HEAD - TAIL is more than PLACES * PLACE
    for i in range(PLACES):
        start = HEAD + (2 * i + 1) * between // (2 * PLACES) - PLACE // 2
        parts.append(_whole_lines(_read(path, start, PLACE)))
    tail = _read(path, size - TAIL, TAIL)
    parts.append(tail[tail.find(b"\n") + 1 :])
    rows, broken = _rows(b"".join(parts))
    return _of_metrics(rows), False, broken


def _instruments(path: Path) -> tuple[dict[int, dict[str, float]], list[Alert], bool]:
    """(samples, alerts, whether they are all)."""
    size = _size(path)
    text = _read(path, max(0, size - INSTRUMENTS_TAIL), INSTRUMENTS_TAIL)
    if size > INSTRUMENTS_TAIL:
        text = text[text.find(b"\n") + 1 :]
    samples: dict[int, dict[str, float]] = {}
    alerts = []
    for line in text.split(b"\n"):
        row = row_of(line)
        try:
            if row is not None and row["kind"] == "sample":
                values = {name: float(x) for name, x in flat(row["values"]).items()}
                samples.setdefault(row["step"], {}).update(values)
            elif row is not None:
                value, limit = float(row["value"]), float(row["limit"])
                alerts.append(
                    Alert(row["step"], int(row["tokens"]), row["name"], value, limit, row["message"])
                )
        except (KeyError, TypeError, ValueError, AttributeError):  # a row of another version
            continue
    return samples, alerts, size <= INSTRUMENTS_TAIL


def _last_val(
    path: Path, rows: list[dict[str, Any]], whole: bool, summary: Mapping[str, Any] | None
) -> float | None:
    """The last validation loss: the summary's, that of the rows, or of a row further back."""
    final = (summary or {}).get("val_loss")
    found = final if final is not None else _val_of(rows)
    end = _size(path)
    limit = max(0, end - _VAL_BACK)
    rest = b""
    while found is None and not whole and end > limit:
        start = max(limit, end - _BLOCK)
        block = _read(path, start, end - start) + rest
        lines = block.split(b"\n")
        found = _val_of(_of_metrics(_rows(b"\n".join(line for line in lines[1:] if b'"val' in line))[0]))
        rest, end = lines[0], start
    try:
        return None if found is None else float(found)
    except (TypeError, ValueError):
        return None


def _val_of(rows: list[dict[str, Any]]) -> Any:
    return next((row.get("val_loss") for row in reversed(rows) if row["kind"] == "val"), None)


def _pace(trained: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """(seconds a step, tokens a second) of the last PACE_STEPS steps in a row, as ``seconds`` of training have it."""
    rows = [r for r in trained[-PACE_STEPS - 1 :] if isinstance(r.get("seconds"), int | float)]
    rates = [float(r["tokens_per_s"]) for r in rows if isinstance(r.get("tokens_per_s"), int | float)]
    rate = float(np.median(rates)) if rates else None
    if len(rows) < 2 or rows[-1]["step"] <= rows[0]["step"]:
        return None, rate
    pace = (rows[-1]["seconds"] - rows[0]["seconds"]) / (rows[-1]["step"] - rows[0]["step"])
    return (pace if pace > 0 else None), rate


def _mapping(path: Path) -> dict[str, Any]:
    """Of a JSON file; empty where it is missing or cut."""
    try:
        value = json.loads(_read(path) or b"{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _config(folder: Path) -> tuple[Mapping[str, Any], str | None]:
    """(config, what is wrong with it). A run that has just started has none yet, and that is nothing wrong."""
    path = folder / "config.yaml"
    try:
        return read_config(path), None
    except FileNotFoundError:
        begun = _size(folder / "metrics.jsonl") or _size(folder / "verdict.json")
        return {}, f"{path.name} is missing" if begun else None
    except (OSError, ValueError) as error:
        return {}, str(error)


def _census(path: Path) -> tuple[Mapping[str, Any], ...]:
    try:
        rows = _mapping(path)["eager"]["observations"]
        return tuple(row for row in rows if row["levels"] is not None)
    except (KeyError, TypeError):
        return ()


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


def _whole_number(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _seed(config: Mapping[str, Any]) -> int:
    seed = config.get("seed")
    return seed if isinstance(seed, int) else -1
