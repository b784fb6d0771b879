"""A sweep's folder, which is its own, and what a sweep of this process leaves in it for ``qtrain status`` before its first run:
``sweep.json``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig

from qtrain import submission
from qtrain.cluster.sweep_file import take_folder, write_local_sweep
from qtrain.hydra_section import is_typed
from qtrain.overrides import Overrides, UserError


def announce(command: str, checks: Overrides, as_job: Callable[[DictConfig, int], None]) -> list[str]:
    """Takes the sweep's folder and says in it which runs this process will start. A launcher that submits them says it itself, and
    a sampler does not know. as_job: sets in a run's config what a launcher sets. Returns the override that keeps Hydra in
    that folder, whose name has the time in it. Raises UserError where a sweep that is submitted would lie in another's folder."""
    runs = checks.combinations(multirun=True)
    config = checks.compose(runs[0])
    section = config.hydra
    submits = submission.submits(config)
    if not submits and "Basic" not in section.sweeper.get("_target_", ""):
        return []
    folder, named = Path(section.sweep.dir), is_typed("hydra.sweep.dir", checks.overrides)
    if submits or not named:
        try:
            folder = take_folder(folder, named=named)
        except FileExistsError:
            raise UserError(
                f"hydra.sweep.dir={folder} exists, and a sweep that is submitted has a folder of its own: choose another, or leave "
                "hydra.sweep.dir out"
            ) from None
    if not submits:
        arms = [[word for word in run if not word.startswith(("hydra.", "hydra/"))] for run in runs]
        write_local_sweep(folder, command, arms, _run_folders(config, runs, checks, as_job))
    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.sweep.dir='{quoted}'"]


def _run_folders(
    config: DictConfig,
    runs: Sequence[list[str]],
    checks: Overrides,
    as_job: Callable[[DictConfig, int], None],
) -> list[str | None]:
    """Of the runs; None for those that are named when they start. config: of the first."""
    if config.get("run") is None:
        return [None] * len(runs)
    folders: list[str | None] = []
    for number, run in enumerate(runs):
        one = checks.compose(run)
        as_job(one, number)
        folders.append(str(submission.run_folder({key: one[key] for key in ("out", "name", "run")})))
    return folders
