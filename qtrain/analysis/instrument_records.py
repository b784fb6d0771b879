"""instruments.jsonl: what the instruments of a run found. Reads files alone: no Lightning.

    {"kind": "sample", "step", "tokens", "values": {"quant/blocks.0.mlp.up/fprop.input": {"sqnr_db": 31.2, ...}, ...}}
    {"kind": "alert", "step", "tokens", "name": "stability/loss_spike", "value", "limit", "message"}

A step has a sample row for each instrument that looked at it. Names are kept in two parts, since thousands of numbers
share their first; ``read_instruments`` joins them. Numbers have DIGITS significant digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTRUMENTS = "instruments.jsonl"
KINDS = ("sample", "alert")
DIGITS = 5
Values = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Alert:
    """A threshold that was crossed. name: of the metric; value, and the limit that it crossed at ``step``."""

    step: int
    tokens: int
    name: str
    value: float
    limit: float
    message: str


@dataclass(frozen=True)
class InstrumentRecord:
    """samples: step -> name -> number, as ``quant/blocks.0.mlp.up/fprop.input/sqnr_db``; alerts in their order. cut: whether the
    file ends in the middle of a row, as a kill leaves it."""

    samples: Mapping[int, Mapping[str, float]]
    alerts: tuple[Alert, ...]
    cut: bool = False

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, number) of one metric."""
        return [(step, values[name]) for step, values in self.samples.items() if name in values]


def flat(values: Values) -> dict[str, float]:
    """{"a/b": {"c": 1}} -> {"a/b/c": 1}."""
    return {f"{prefix}/{metric}": x for prefix, inner in values.items() for metric, x in inner.items()}


def rounded(x: float) -> float:
    """To DIGITS significant digits."""
    return float(f"{x:.{DIGITS}g}") if math.isfinite(x) else x


def row_of(line: str | bytes) -> dict[str, Any] | None:
    """A line's row; None where it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int) and row.get("kind") in KINDS
    return row if whole else None


def read_instruments(path: str | Path) -> InstrumentRecord:
    """What a run's instruments.jsonl holds; nothing where there is no file. A last line that a kill cut is left out.
    Raises ValueError for another line that is no row."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    samples: dict[int, dict[str, float]] = {}
    alerts = []
    for number, line in enumerate(lines, start=1):
        row = row_of(line)
        if row is None:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: no row of the instruments; the file was altered")
            continue
        if row["kind"] == "sample":
            found = {name: float(x) for name, x in flat(row["values"]).items()}
            samples.setdefault(row["step"], {}).update(found)
        else:
            value, limit = float(row["value"]), float(row["limit"])
            alerts.append(Alert(row["step"], row["tokens"], row["name"], value, limit, row["message"]))
    return InstrumentRecord(samples, tuple(alerts), cut=bool(lines) and lines[-1] != b"")


def rewound_instruments(path: Path, step: int) -> str | None:
    """The text of the file without the rows that a run resumed at ``step`` finds again; None where there is no file.
    Raises ValueError as ``read_instruments`` does."""
    if not path.is_file():
        return None
    read_instruments(path)
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [(line, row_of(line)) for line in lines]
    return "".join(f"{line}\n" for line, row in rows if row is not None and row["step"] <= step)
