"""Reading checkpoints back: to resume a run, and to use its model. Without Lightning."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtrain.data.tokenizers import Tokenizer, is_training, tokenizer_from_state

from .assembly import Assembly, assemble
from .checkpoints import MANIFEST, CheckpointError, checkpoints_in, load_checkpoint, verified
from .run_folder import CHECKPOINTS
from .settings import RunSettings


def check_exists(path: str | Path) -> None:
    """Raises ValueError unless ``path`` is a checkpoint or a run's folder with checkpoints; reads none."""
    path = Path(path)
    if not ((path / MANIFEST).is_file() or checkpoints_in(path / CHECKPOINTS)):
        raise ValueError(
            f"{path} is no checkpoint (a folder with {MANIFEST}), and no run's folder with {CHECKPOINTS}/step-* in it"
        )


def check_resume(settings: RunSettings) -> None:
    """Raises ValueError where ``resume`` names nothing; reads no checkpoint."""
    if settings.resume is not None and settings.resume != "auto":
        check_exists(settings.resume)


def checkpoint_of(path: str | Path) -> Path:
    """The checkpoint that ``path`` means: itself, or of a run's folder the latest that is whole. Later ones that are
    not are named on standard error.

    Raises ValueError where there is none, CheckpointError where none is whole.
    """
    path = Path(path)
    check_exists(path)
    if (path / MANIFEST).is_file():
        return path
    refused: list[str] = []
    for found, problem in verified(path / CHECKPOINTS):
        if problem is None:
            for sentence in refused:
                print(f"refused: {sentence}; taking {found.name}", file=sys.stderr)
            return found
        refused.append(problem)
    raise CheckpointError(f"none of the checkpoints of {path} is whole: {'; '.join(refused)}")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The plain containers and tensors of a checkpoint, on the CPU. Raises CheckpointError unless it is whole."""
    return load_checkpoint(Path(path))


def saved_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The plain configuration of the run that wrote it."""
    return checkpoint["hyper_parameters"]["config"]


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint with what is needed to use it. ``path``: its folder. ``parts``: the run's, or with what the
    caller changed. ``tokenizer``: the run's own, from the checkpoint; None where its data named none."""

    path: Path
    parts: Assembly
    checkpoint: dict[str, Any]
    tokenizer: Tokenizer | None

    @property
    def folder(self) -> Path:
        """The run's folder; where the checkpoint was moved, the folder that it lies in."""
        parent = self.path.parent
        return parent.parent if parent.name == CHECKPOINTS else parent

    @property
    def step(self) -> int:
        return int(self.checkpoint["qtrain"]["step"])


def chosen_checkpoint(run: str | None, checkpoint: str | None) -> Path:
    """The checkpoint that one of the two names; raises ValueError unless exactly one is given and exists."""
    if (run is None) == (checkpoint is None):
        raise ValueError("give either run=<a run's folder> or checkpoint=<a file>")
    return checkpoint_of(run if run is not None else str(checkpoint))


def trained_run(path: Path, changes: Mapping[str, Any]) -> TrainedRun:
    """The run that wrote ``path``, its configuration changed in ``changes`` (top-level keys) and never compiled.
    Raises ValueError as ``read_checkpoint`` and ``assemble`` do."""
    checkpoint = read_checkpoint(path)
    config = {**saved_config(checkpoint), **changes, "compile": False}
    state, spec = checkpoint["qtrain"]["tokenizer"], config["data"].get("tokenizer")
    tokenizer = None if state is None else tokenizer_from_state(state)
    # What the configuration names may not be here. A training is all there in its numbers, and prepared data are found by it
    named = None if spec is not None and is_training(spec) else tokenizer
    return TrainedRun(path, assemble(config, named), checkpoint, tokenizer)
