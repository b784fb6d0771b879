"""Checkpoints: every so many steps and at the end, complete files or none.

    checkpoints/step-000500.ckpt    the last ``keep`` of the periodic ones
    checkpoints/final.ckpt

Lightning's own layout (``state_dict``, ``optimizer_states``, ``lr_schedulers``, ``loops``) holding plain
containers and tensors only, so that ``torch.load(path, weights_only=True)`` reads it: a checkpoint from a stranger
then runs no code.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from ..run_folder import CHECKPOINTS, FINAL


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the place, syncs, and renames: a kill leaves the old file or the new one."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"storage_options {storage_options!r}: checkpoints are local files here")
        final = Path(path)
        final.parent.mkdir(parents=True, exist_ok=True)
        partial = final.with_name(f".{final.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(final)
        folder = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class Checkpoints(Callback):
    """every_steps: 0 saves at the end only. keep: how many periodic ones stay; None keeps all."""

    def __init__(self, every_steps: int, keep: int | None = 2) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"callbacks.checkpoint.keep={keep!r}: must be 1 or more, or null for all")
        self.every_steps, self.keep = every_steps, keep
        self._saved: list[Path] = []
        self._last = -1

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        step = trainer.global_step
        applied = (
            step != self._last and (trainer.fit_loop.epoch_loop.batch_idx + 1) % _accumulate(trainer) == 0
        )
        due = self.every_steps and step % self.every_steps == 0 and step < trainer.max_steps
        if not (applied and due):
            return
        self._last = step
        path = folder(trainer) / f"step-{step:06d}.ckpt"
        trainer.save_checkpoint(path)
        self._saved.append(path)
        while self.keep is not None and len(self._saved) > self.keep:
            trainer.strategy.remove_checkpoint(self._saved.pop(0))

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(folder(trainer) / FINAL)


def _accumulate(trainer: Trainer) -> int:
    return trainer.accumulate_grad_batches


def folder(trainer: Trainer) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(trainer.default_root_dir) / CHECKPOINTS
