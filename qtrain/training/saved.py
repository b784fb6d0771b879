"""Reading checkpoints back: to resume a run, and to use its model. Without Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .assembly import Assembly, assemble
from .run_folder import CHECKPOINTS, FINAL

# What may differ between a run and its continuation: where it writes, how long it is and how it is watched.
_FREE = frozenset(
    {
        "name", "run", "out", "baseline", "resume", "steps", "compile", "device", "trainer", "logger", "callbacks",
        "eval_every_steps", "eval_windows", "checkpoint_every_steps", "micro_batch_sequences",
        "activation_checkpointing", "sample",
    }
)  # fmt: skip


def checkpoint_of(path: str | Path) -> Path:
    """The file that ``path`` means: itself, or of a run's folder the final or else the latest checkpoint.

    Raises ValueError where there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    final = path / CHECKPOINTS / FINAL
    if final.is_file():
        return final
    saved = sorted((path / CHECKPOINTS).glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not saved:
        raise ValueError(f"{path} is no checkpoint, and no run's folder with checkpoints/*.ckpt in it")
    return saved[-1]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The plain containers and tensors of a checkpoint, on the CPU. Raises ValueError for another kind of file."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict) or "qtrain" not in saved:
        raise ValueError(f"{path} is no checkpoint of a qtrain run")
    return saved


def saved_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The plain configuration of the run that wrote it."""
    return checkpoint["hyper_parameters"]["config"]


def check_same_run(path: Path, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raises ValueError where ``config`` and ``data`` describe another training run than the checkpoint's."""
    saved = read_checkpoint(path)
    theirs = saved_config(saved)
    keys = (set(config) | set(theirs)) - _FREE - {"data"}
    different = [
        f"{key}: {theirs.get(key)} there, {config.get(key)} here"
        for key in sorted(keys)
        if key not in ("w", "a", "g") and config.get(key) != theirs.get(key)
    ]
    for key in ("shards", "sequence_tokens"):
        if saved["qtrain"]["data"][key] != data[key]:
            different.append(f"data {key}: {saved['qtrain']['data'][key]} there, {data[key]} here")
    if different:
        raise ValueError(
            f"resume={path} continues another run ({'; '.join(different)}); give the same settings, or start anew"
        )
    if saved["qtrain"]["step"] >= config["steps"]:
        raise ValueError(
            f"resume={path} stands at step {saved['qtrain']['step']} of steps={config['steps']}: nothing is left to do; "
            "raise steps"
        )


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint with what is needed to use it. ``path``: the file. ``parts``: the run's, or with what the
    caller changed."""

    path: Path
    parts: Assembly
    checkpoint: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run's folder; where the checkpoint was moved, the folder that it lies in."""
        parent = self.path.parent
        return parent.parent if parent.name == CHECKPOINTS else parent

    @property
    def step(self) -> int:
        return int(self.checkpoint["qtrain"]["step"])


def chosen_checkpoint(run: str | None, checkpoint: str | None) -> Path:
    """The file that one of the two names; raises ValueError unless exactly one is given and exists."""
    if (run is None) == (checkpoint is None):
        raise ValueError("give either run=<a run's folder> or checkpoint=<a file>")
    return checkpoint_of(run if run is not None else str(checkpoint))


def trained_run(path: Path, changes: Mapping[str, Any]) -> TrainedRun:
    """The run that wrote ``path``, its configuration changed in ``changes`` (top-level keys) and never compiled.
    Raises ValueError as ``read_checkpoint`` and ``assemble`` do."""
    checkpoint = read_checkpoint(path)
    config = {**saved_config(checkpoint), **changes, "compile": False}
    return TrainedRun(path, assemble(config), checkpoint)
