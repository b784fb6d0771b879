"""When a run saves, and what stays: every so many steps, at the end, and before it stops for a signal.

    every_steps         a checkpoint at each multiple, after that step's validation, so that a resumed curve lacks none
    keep                how many stay (the latest); keep_every_steps: multiples of it stay for good
    SIGTERM, SIGUSR1,   the step in progress is finished and saved, and the run ends with the verdict ``interrupted``;
    Ctrl-C              of several processes, one that was signalled stops all at the same step

A checkpoint that cannot be written ends the run with the verdict ``storage_failed``: what would be computed after it
could be lost. The tokens that were read are checked before each one, so that none holds steps on altered data.
"""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from qtrain import interrupts
from qtrain.data.shards import ShardError

from ..checkpoints import (
    checkpoint_name,
    checkpoints_in,
    load_checkpoint,
    remove_checkpoint,
    step_of,
    write_checkpoint,
)
from ..run_folder import CHECKPOINTS
from ..verdict import RunStopped, Verdict


class CheckpointWriter(CheckpointIO):
    """Lightning's way to the files of ``qtrain.training.checkpoints``.

    asynchronous: a thread writes a copy of the state while training goes on; the next save, and ``wait``, wait for it.
    written: called with a folder of checkpoints after each one that is there. An OSError of the disk is kept in
    ``failure`` rather than raised, since other processes must hear of it; nothing is written after one.
    """

    def __init__(self) -> None:
        self.asynchronous = False
        self.written: Callable[[Path], None] = lambda folder: None
        self.failure: OSError | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """path: ``FOLDER/step-NNNNNN``."""
        if storage_options is not None:
            raise TypeError(f"storage_options {storage_options!r}: checkpoints are local files here")
        self.wait()
        if self.failure is not None:
            return
        folder = Path(path).parent
        if not self.asynchronous:
            self._write(folder, checkpoint)
            return
        # One memo: tensors that share memory (tied weights) share it in the copy too
        snapshot = copy.deepcopy(_on_cpu(checkpoint))
        self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = self._pool.submit(self._write, folder, snapshot)

    def _write(self, folder: Path, checkpoint: Mapping[str, Any]) -> None:
        facts = checkpoint["qtrain"]
        try:
            write_checkpoint(folder, checkpoint, step=facts["step"], tokens=facts["tokens"])
            self.written(folder)
        except OSError as error:
            self.failure = error

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        remove_checkpoint(Path(path))

    def teardown(self) -> None:
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _on_cpu(value: Any) -> Any:
    """``value`` with plain tensors on the CPU, which ``deepcopy`` copies; parameters lose their graph."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {k: _on_cpu(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(v) for v in value]
    return value


def checkpoint_writer(trainer: Trainer) -> CheckpointWriter:
    """The trainer's; every trainer of qtrain has one."""
    writer = trainer.strategy.checkpoint_io
    assert isinstance(writer, CheckpointWriter)
    return writer


def folder(trainer: Trainer) -> Path:
    """Where the checkpoints of a run lie."""
    return Path(trainer.default_root_dir) / CHECKPOINTS


def save(trainer: Trainer) -> Path:
    """Saves the state after the last applied step and returns the checkpoint's path, on all processes.

    Raises RunStopped, on all processes, where the tokens on disk are not those that were read or the disk refuses.
    """
    path = folder(trainer) / checkpoint_name(trainer.global_step)
    altered = None
    if trainer.is_global_zero:
        try:
            trainer.datamodule.corpus.check_unchanged()  # type: ignore[attr-defined]
        except ShardError as error:
            altered = str(error)
    altered = trainer.strategy.broadcast(altered)
    if altered is not None:
        raise RunStopped(Verdict(outcome="data_changed", step=trainer.global_step, message=altered))
    trainer.save_checkpoint(path)
    check_storage(trainer)
    return path


def check_storage(trainer: Trainer) -> None:
    """Raises RunStopped, on all processes, where a checkpoint could not be written."""
    writer = checkpoint_writer(trainer)
    failure = trainer.strategy.broadcast(None if writer.failure is None else str(writer.failure))
    if failure is not None:
        raise RunStopped(storage_verdict(trainer, failure))


def storage_verdict(trainer: Trainer, failure: str) -> Verdict:
    """What a full or lost disk means: what is on it, and what to do."""
    place = folder(trainer)
    kept = checkpoints_in(place)
    left = f"{kept[0]} is the latest checkpoint" if kept else "there is no checkpoint yet"
    try:
        free = f"{shutil.disk_usage(place.parent).free / 1e6:,.0f} MB are free there"
    except OSError as error:
        free = str(error)
    return Verdict(
        outcome="storage_failed",
        step=trainer.global_step,
        message=f"the run could not be saved after step {trainer.global_step}: {failure} ({free}). {left}; make room and "
        "resume",
    )


# What a disk says, rather than a path that was never there
_OF_DISKS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE})


def of_storage(trainer: Trainer, error: OSError) -> bool:
    """Whether a disk refused: by its kind, or by the file, where that lies in the run's folder."""
    root = Path(trainer.default_root_dir).resolve()
    named = [
        Path(os.fsdecode(f)).resolve()
        for f in (error.filename, error.filename2)
        if isinstance(f, str | bytes)
    ]
    return error.errno in _OF_DISKS or any(root == path or root in path.parents for path in named)


class Checkpoints(Callback):
    """every_steps: 0 saves at the end (and for signals) only. keep: how many stay; None keeps all. keep_every_steps:
    multiples of it stay beside them. asynchronous: write in the background; a kill then loses up to the steps since
    the checkpoint before the one in writing.

    Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        every_steps: int,
        keep: int | None = 2,
        keep_every_steps: int | None = None,
        asynchronous: bool = False,
    ) -> None:
        for name, value in (("keep", keep), ("keep_every_steps", keep_every_steps)):
            if value is not None and value < 1:
                raise ValueError(f"callbacks.checkpoint.{name}={value!r}: must be 1 or more, or null")
        self.every_steps, self.keep, self.keep_every_steps = every_steps, keep, keep_every_steps
        self.asynchronous = asynchronous
        self._last = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = checkpoint_writer(trainer)
        writer.asynchronous, writer.written = self.asynchronous, self._prune
        self._last = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if interrupts.listening():
            interrupts.install()  # again: Lightning puts a handler of its own before them
            interrupts.defer()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        whole = step != self._last and (batch_idx + 1) % pl_module.accumulate == 0
        if whole and step % pl_module.settings.eval_every_steps:
            self._after_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._after_step(trainer)

    def _after_step(self, trainer: Trainer) -> None:
        """Once a step, when everything that belongs to it is in the run's folder."""
        step = self._last = trainer.global_step
        signum = self._signal(trainer)
        if signum is not None:
            path = save(trainer)
            raise RunStopped(_interrupted(signum, step, path))
        if self.every_steps and step % self.every_steps == 0 and step < trainer.max_steps:
            save(trainer)

    def _signal(self, trainer: Trainer) -> int | None:
        """The signal that any process has noted."""
        mine = interrupts.pending() if interrupts.listening() else None
        if trainer.world_size == 1:
            return mine
        worst = trainer.strategy.reduce(
            torch.tensor(float(mine or 0), device=trainer.strategy.root_device), reduce_op="max"
        )
        return int(worst) or None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        save(trainer)
        checkpoint_writer(trainer).wait()
        check_storage(trainer)
        interrupts.settle(raising=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        checkpoint_writer(trainer).wait()
        interrupts.settle(raising=False)

    def _prune(self, place: Path) -> None:
        if self.keep is None:
            return
        for path in checkpoints_in(place)[self.keep :]:
            step = step_of(path)
            if self.keep_every_steps is None or step is None or step % self.keep_every_steps:
                remove_checkpoint(path)


def _interrupted(signum: int, step: int, path: Path) -> Verdict:
    name = signal.Signals(signum).name
    return Verdict(
        outcome="interrupted",
        step=step,
        message=f"stopped by {name} after step {step}, which {path} holds; go on with resume=auto run={path.parents[1].name}",
        signal=signum,
    )
