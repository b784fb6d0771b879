"""Reading checkpoints back: to resume a run, and to use its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .callbacks.checkpoint import FINAL

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
    final = path / "checkpoints" / FINAL
    if final.is_file():
        return final
    saved = sorted((path / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
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
