"""The curves of one run, step by step and on the axis of tokens, from the rows that it logged.

Rows are those of metrics.jsonl ("train", "val"). Of the instruments' samples the series are kept that a verdict asks for: SQNR of operands, noise floor of weight gradients, stall of optimizer states, attention logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Series = tuple[Array, Array]
_SQNR = re.compile(r"quant/(?P<layer>.+)/(?P<gemm>\w+)\.(?P<operand>\w+)/sqnr_db")
_KEPT = ("/noise_floor", ".unchanged", ".zero_bin", "/max_logit")


@dataclass(frozen=True, order=True)
class Operand:
    """One operand of one GEMM of one layer: ``blocks.0.attn.o``, ``fprop``, ``input``."""

    layer: str
    gemm: str
    operand: str

    def __str__(self) -> str:
        return f"{self.layer} {self.gemm}.{self.operand}"


@dataclass(frozen=True)
class Curves:
    """[n] float64 each, over optimizer steps: step (from 1), tokens, loss (nats a token), grad_norm, clipped (0 or 1),
    lr, tokens_per_s; nan where a row lacks it. val_step, val_tokens, val_loss: [m]. sqnr: of each operand, (steps, dB).
    instruments: the other series, by their names, (steps, values)."""

    step: Array
    tokens: Array
    loss: Array
    grad_norm: Array
    clipped: Array
    lr: Array
    tokens_per_s: Array
    val_step: Array
    val_tokens: Array
    val_loss: Array
    sqnr: Mapping[Operand, Series] = field(default_factory=dict)
    instruments: Mapping[str, Series] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.step)

    @property
    def last_step(self) -> int:
        return int(self.step[-1]) if len(self.step) else 0

    @property
    def clip_share(self) -> float | None:
        return _of(np.mean, self.clipped)

    @property
    def median_tokens_per_s(self) -> float | None:
        return _of(np.median, self.tokens_per_s)


def _of(statistic: Any, values: Array) -> float | None:
    known = values[~np.isnan(values)]
    return float(statistic(known)) if len(known) else None


def _column(rows: list[Mapping[str, Any]], key: str) -> Array:
    return np.array([float(np.nan if row.get(key) is None else row[key]) for row in rows], dtype=np.float64)


def curves_of(
    rows: Iterable[Mapping[str, Any]],
    step_tokens: float,
    samples: Mapping[int, Mapping[str, float]] | None = None,
) -> Curves:
    """rows: in the order of their steps. step_tokens: of an optimizer step, for rows that do not say their tokens.
    samples: step -> name -> number, of the instruments.

    Raises KeyError, TypeError or ValueError for a row without kind or step, and for a number that is none."""
    rows = list(rows)
    train = [row for row in rows if row["kind"] == "train"]
    val = [row for row in rows if row["kind"] == "val"]
    if train:
        train[0]["loss"]  # a row of another program
    step, val_step = _column(train, "step"), _column(val, "step")
    tokens, val_tokens = _column(train, "tokens"), _column(val, "tokens")
    sqnr, instruments = _instruments(samples or {})
    return Curves(
        step=step,
        tokens=np.where(np.isnan(tokens), step * step_tokens, tokens),
        loss=_column(train, "loss"),
        grad_norm=_column(train, "grad_norm"),
        clipped=_column(train, "clipped"),
        lr=_column(train, "lr"),
        tokens_per_s=_column(train, "tokens_per_s"),
        val_step=val_step,
        val_tokens=np.where(np.isnan(val_tokens), val_step * step_tokens, val_tokens),
        val_loss=_column(val, "val_loss"),
        sqnr=sqnr,
        instruments=instruments,
    )


def _instruments(
    samples: Mapping[int, Mapping[str, float]],
) -> tuple[dict[Operand, Series], dict[str, Series]]:
    series: dict[str, tuple[list[float], list[float]]] = {}
    for step in sorted(samples):
        for key, value in samples[step].items():
            if key.endswith(("/sqnr_db", *_KEPT)):
                steps, values = series.setdefault(key, ([], []))
                steps.append(float(step))
                values.append(float(value))
    sqnr, others = {}, {}
    for key, (steps, values) in series.items():
        found = _SQNR.fullmatch(key)
        if found:
            sqnr[Operand(**found.groupdict())] = (np.array(steps), np.array(values))
        elif not key.endswith("/sqnr_db"):  # of y, dx, dW
            others[key] = (np.array(steps), np.array(values))
    return sqnr, others
