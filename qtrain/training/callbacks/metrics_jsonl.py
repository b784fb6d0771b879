"""metrics.jsonl: a line of JSON for every step and every validation, on disk as soon as it is known.

    {"kind": "train", "step", "tokens", "loss", "grad_norm", "clipped", "lr", "seconds", "tokens_per_s"}
    {"kind": "val", "step", "tokens", "val_loss", "val_bits_per_byte", "seconds"}

Losses are nats per token, ``step`` counts optimizer steps from 1, ``seconds`` since training began, and
``tokens_per_s`` is that of the one step. Each line is flushed when it is written, so a killed run keeps all of
them but at most a part of the last; ``read_metrics`` leaves that part out. The rows go to the trainer's loggers too.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, Trainer

from ..module import QuantizedTransformer
from ..run_folder import jsonable

METRICS = "metrics.jsonl"


def bits_per_byte(nats_per_token: float, tokens_per_byte: float) -> float:
    """nats per token * tokens per byte / ln 2."""
    return nats_per_token * tokens_per_byte / math.log(2)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; nan and inf as floats. Raises ValueError for a broken line that is not the
    last."""
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break  # the process died while it wrote this one
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error.msg}); the file was altered") from error
        rows.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()})
    return rows


class MetricsJSONL(Callback):
    """Appends to ``metrics.jsonl`` in the run's folder."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._begun = self._previous = 0.0
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self._file = (Path(trainer.default_root_dir) / METRICS).open("a", encoding="utf-8")
        self._begun = self._previous = time.perf_counter()
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        reading = pl_module.reading
        if reading is None or trainer.global_step == self._step:
            return
        self._step, now = trainer.global_step, time.perf_counter()
        tokens = pl_module.settings.step_tokens
        rate = tokens / (now - self._previous)
        self._previous = now
        row = {
            "kind": "train",
            "step": reading.step,
            "tokens": reading.step * tokens,
            "loss": reading.loss,
            "grad_norm": reading.grad_norm,
            "clipped": reading.clipped,
            "lr": reading.lr,
            "seconds": now - self._begun,
            "tokens_per_s": rate,
        }
        self._write(trainer, row)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        if self._file is None or trainer.sanity_checking:
            return
        loss = pl_module.val_loss
        per_byte = trainer.datamodule.shards.val.tokens_per_byte  # type: ignore[attr-defined]
        row = {
            "kind": "val",
            "step": trainer.global_step,
            "tokens": trainer.global_step * pl_module.settings.step_tokens,
            "val_loss": loss,
            "val_bits_per_byte": bits_per_byte(loss, per_byte),
            "seconds": time.perf_counter() - self._begun,
        }
        self._write(trainer, row)
        self._previous = time.perf_counter()  # the time of an evaluation is no step's

    def _write(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(json.dumps(jsonable(row)) + "\n")
        self._file.flush()
        prefix = row["kind"]
        axes = {k: row[k] for k in ("step", "tokens")}
        # Floats: W&B draws no curve of booleans
        values = {
            f"{prefix}/{k.removeprefix('val_')}": float(v) for k, v in row.items() if k not in ("kind", *axes)
        }
        for logger in trainer.loggers:
            logger.log_metrics({**axes, **values}, step=row["step"])

    def close(self) -> None:
        """After the last validation."""
        if self._file is not None:
            self._file.close()
            self._file = None
