"""metrics.jsonl: a line of JSON for every step and every validation, on disk as soon as it is known.

    {"kind": "train", "step", "tokens", "loss", "grad_norm", "clipped", "lr", "seconds", "tokens_per_s"}
    {"kind": "val", "step", "tokens", "val_loss", "val_bits_per_byte", "seconds"}, of a mixture with "val_loss/PART";
                                          without bits per byte where the data name no tokenizer

Where something travels in low bits, a step also has "communication/bytes_sent" and its kin (``communication.exchange``).

Losses are nats per token, ``step`` counts optimizer steps from 1, ``seconds`` of training (of earlier attempts too), and
``tokens_per_s`` is that of the one step. Each line is flushed when it is written, so a killed run keeps all of
them but at most a part of the last; ``read_metrics`` leaves that part out. The rows go to the trainer's loggers too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, Trainer

from ..module import QuantizedTransformer
from ..run_folder import jsonable, read_lines
from ..verdict import RunStopped
from .checkpoint import storage_verdict

METRICS = "metrics.jsonl"


def bits_per_byte(nats_per_token: float, tokens_per_byte: float | None) -> float | None:
    """nats per token * tokens per byte / ln 2; None where the tokens per byte are not known."""
    return None if tokens_per_byte is None else nats_per_token * tokens_per_byte / math.log(2)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; nan and inf as floats. Raises ValueError for a broken line that is not the
    last."""
    return [
        {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()}
        for row in read_lines(Path(path))
    ]


def rewound_metrics(path: Path, step: int, *, begun: int = 0, last: bool) -> str | None:
    """The text of a metrics file without the rows that a run resumed at ``step`` computes again, and without what a
    killed process, or a machine without power, left of the last lines. None where there is no file. begun: the
    step that the run's folder began with. last: nothing but the final validation is left to do.

    Raises ValueError where a line before others is broken, and where rows of the steps until ``step`` are missing.
    """
    if not path.is_file():
        return None
    kept: list[dict[str, Any]] = []
    broken = None
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        row = _row(line)
        if row is None:
            broken = broken or (number if line else None)
            continue
        if broken is not None:
            raise ValueError(f"{path}, line {broken}: no row of the metrics; the file was altered: {_REMEDY}")
        if row["step"] <= step and not (last and row["kind"] == "val" and row["step"] == step):
            kept.append(row)
    trained = [row["step"] for row in kept if row["kind"] == "train"]
    if trained != list(range(begun + 1, step + 1)):
        raise ValueError(
            f"{path} does not have one row for each of the steps {begun + 1} to {step}, which the checkpoint holds; "
            f"the file was altered: {_REMEDY}"
        )
    return "".join(json.dumps(row) + "\n" for row in kept)


_REMEDY = "bring the file back, or go on in another folder with resume=CHECKPOINT run=ANOTHER"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int) and row.get("kind") in ("train", "val")
    return row if whole else None


class MetricsJSONL(Callback):
    """Appends to ``metrics.jsonl`` in the run's folder."""

    def __init__(self) -> None:
        self._file: TextIO | None = None
        self._begun = self._previous = 0.0
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        before = 0.0
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / METRICS
            rows = read_metrics(path) if path.is_file() else []
            before = rows[-1]["seconds"] if rows else 0.0  # a resumed run's time goes on
            self._file = path.open("a", encoding="utf-8")
        self._previous = time.perf_counter()
        self._begun = self._previous - before
        self._step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._step, self._previous = trainer.global_step, time.perf_counter()

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
            **({} if pl_module.communication is None else pl_module.communication.traffic.row()),
        }
        self._write(trainer, row)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        if self._file is None or trainer.sanity_checking:
            return
        loss, val = pl_module.val_loss, trainer.datamodule.val  # type: ignore[attr-defined]
        bits = bits_per_byte(loss, val.tokens_per_byte)
        parts = val.losses(pl_module.window_losses) if len(val.parts) > 1 else {}
        row = {
            "kind": "val",
            "step": trainer.global_step,
            "tokens": trainer.global_step * pl_module.settings.step_tokens,
            "val_loss": loss,
            **({} if bits is None else {"val_bits_per_byte": bits}),
            **{f"val_loss/{name}": mean for name, mean in parts.items()},
            "seconds": time.perf_counter() - self._begun,
        }
        self._write(trainer, row)
        self._previous = time.perf_counter()  # the time of an evaluation is no step's

    def _write(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(jsonable(row)) + "\n")
            self._file.flush()
        except OSError as error:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # closing tries to write what is left
                file.close()
            raise RunStopped(storage_verdict(trainer, f"{METRICS}: {error}")) from error
        prefix = row["kind"]
        axes = {k: row[k] for k in ("step", "tokens")}
        # Floats: W&B draws no curve of booleans
        values = {
            f"{prefix}/{k.removeprefix('val_')}": float(v) for k, v in row.items() if k not in ("kind", *axes)
        }
        for logger in trainer.loggers:
            # With a step of its own: the segments of a resumed run then stay one curve
            logger.experiment.log({**axes, **values}, step=row["step"])  # type: ignore[attr-defined]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What a checkpoint says was done is on the disk before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """After the last validation."""
        if self._file is not None:
            self._file.close()
            self._file = None
