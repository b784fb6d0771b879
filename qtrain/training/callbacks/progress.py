"""Progress: a live bar on a terminal; elsewhere (a log file, a batch system) a line every so many seconds."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from ..module import QuantizedTransformer


class Progress(Callback):
    """every_seconds: between two lines where standard error is no terminal."""

    def __init__(self, every_seconds: float = 20.0) -> None:
        if not every_seconds > 0:
            raise ValueError(f"callbacks.progress.every_seconds={every_seconds!r}: must be positive")
        self.every_seconds = every_seconds
        self._bar: Any = None
        self._task: Any = None
        self._first_step = self._step = 0
        self._begun = self._printed = 0.0
        self._val = ""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._first_step = self._step = trainer.global_step
        self._begun = self._printed = time.perf_counter()
        self._val = ""
        if sys.stderr.isatty() and trainer.is_global_zero:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TextColumn("ETA"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(
                "compiling" if pl_module.settings.compile else "", total=trainer.max_steps
            )
            self._bar.start()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._val = f"  val {pl_module.val_loss:.4f}"

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        step, reading = trainer.global_step, pl_module.reading
        if step == self._step or reading is None or not trainer.is_global_zero:
            return
        self._step, now = step, time.perf_counter()
        per_step = (now - self._begun) / (step - self._first_step)
        rate = pl_module.settings.step_tokens / per_step
        text = f"loss {reading.loss:.4f}{self._val}  {rate:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._printed >= self.every_seconds or step in (self._first_step + 1, trainer.max_steps):
            self._printed = now
            left = per_step * (int(trainer.max_steps) - step)
            print(f"step {step}/{trainer.max_steps}  {text}  {left:.0f} s left", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
