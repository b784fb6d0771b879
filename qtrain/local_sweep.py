"""What a sweep of this process leaves for ``qtrain status`` before its first run: ``sweep.json`` in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from qtrain import submission
from qtrain.cluster.sweep_file import write_local_sweep
from qtrain.overrides import Overrides


def announce(command: str, checks: Overrides, as_job: Callable[[DictConfig, int], None]) -> list[str]:
    """Says in the sweep's folder which runs this process will start. A launcher that submits them says it itself, and a
    sampler does not know. as_job: sets in a run's config what a launcher sets. Returns the override that keeps Hydra in that
    folder, whose name has the time in it."""
    runs = checks.combinations(multirun=True)
    config = checks.compose(runs[0])
    section = config.hydra
    if submission.submits(config) or "Basic" not in section.sweeper.get("_target_", ""):
        return []
    folders: list[str | None] = [None] * len(runs)  # named when they start
    if config.get("run") is not None:
        folders = []
        for number, run in enumerate(runs):
            one = checks.compose(run)
            as_job(one, number)
            folders.append(str(submission.run_folder({key: one[key] for key in ("out", "name", "run")})))
    arms = [[word for word in run if not word.startswith(("hydra.", "hydra/"))] for run in runs]
    write_local_sweep(Path(section.sweep.dir), command, arms, folders)
    quoted = str(section.sweep.dir).replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.sweep.dir='{quoted}'"]
