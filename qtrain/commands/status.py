"""qtrain status: how far runs and sweeps are, what failed and why, and when they will be done.

    qtrain status                              every run below outputs, and the sweep that was submitted last
    qtrain status multirun=last watch=30          its arms, also those that wait in the queue, again every 30 seconds
    qtrain status 'runs=[outputs/w4*]' json=-  for programs

Exit codes: 0 where all is well: completed, or under way; 3 where a run diverged, stopped, failed or was lost, interrupted or
cancelled.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .train import VERDICT_EXIT, plain

CONFIG = "status"
POSITIONAL = "runs"
DEFAULT_RUNS, MULTIRUN = ["outputs"], Path("multirun")


def _names(config: dict[str, Any]) -> list[str]:
    runs = config["runs"]
    return [runs] if isinstance(runs, str) else [str(run) for run in runs]


def _sweep_folder(config: dict[str, Any]) -> Path | None:
    from qtrain.cluster.sweep_file import sweeps_below

    if config["multirun"] != "last":
        return None if config["multirun"] is None else Path(config["multirun"])
    found = sweeps_below(MULTIRUN)
    if not found:
        raise ValueError(
            f"multirun=last: no sweep was submitted from here (there is no {MULTIRUN}/DATE/TIME/sweep.json)"
        )
    return found[-1]


def check(cfg: DictConfig) -> None:
    """Raises ValueError for runs and sweeps that are not there, and for numbers that cannot be."""
    from qtrain.analysis.run_sources import places
    from qtrain.cluster.sweep_file import read_sweep, sweeps_below

    config = plain(cfg)
    for key, least in (("watch", 1), ("limit", 1), ("slurm_seconds", 1)):
        value = config[key]
        if value is None and key != "slurm_seconds":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise ValueError(f"{key}={value!r}: must be a number, {least} or more")
    sweep = _sweep_folder(config)
    if sweep is not None:
        read_sweep(sweep)
    online = [name for name in _names(config) if name.startswith("wandb:")]
    if online:
        raise ValueError(
            f"runs={online[0]}: status reads run folders, not W&B's server; qtrain compare reads that"
        )
    if _names(config) != DEFAULT_RUNS or (sweep is None and not sweeps_below(MULTIRUN)):
        places(_names(config))


def _look(config: dict[str, Any], read: Any = None) -> Any:
    """The survey of what the config names, now. read: a ``TailReader``, where this is asked again and again."""
    from qtrain.analysis.run_sources import run_folders
    from qtrain.analysis.run_states import LOST, SILENT
    from qtrain.analysis.run_tail import read_tail
    from qtrain.analysis.survey import survey
    from qtrain.cluster.queue import Queue, ask_slurm
    from qtrain.cluster.sweep_file import read_sweep, sweeps_below
    from qtrain.training.run_folder import is_trained

    read = read or read_tail

    def ask(jobs: Any) -> Queue:
        return ask_slurm(jobs, seconds=config["slurm_seconds"])

    named = _sweep_folder(config)
    # None has begun yet where only a sweep waits
    begun = _names(config) != DEFAULT_RUNS or Path(*DEFAULT_RUNS).is_dir()
    folders = run_folders(_names(config)) if begun else []
    arms, notes = _arms(folders) if named is None else (list(read_sweep(named).arms), [])
    found = survey(folders, arms, alive=is_trained, ask=ask, now=time.time(), read=read)
    if named is not None:
        # The folders served to find those of a local sweep, unless they were asked for
        return found if _names(config) != DEFAULT_RUNS else found.of_arms()
    # Arms of a sweep of which nothing is left are history, and not of interest every day
    rows = tuple(r for r in found.rows if r.tail is not None or r.state not in (LOST, SILENT))
    if len(rows) < len(found.rows):
        where = sweeps_below(MULTIRUN)[-1]
        gone = len(found.rows) - len(rows)
        notes.append(f"{gone} arms of {where} have left nothing: qtrain status multirun={where} shows them")
    return replace(found, rows=rows, notes=(*found.notes, *notes))


def _arms(folders: list[Path]) -> tuple[list[Any], list[str]]:
    """Of the sweeps that were started from here: the arms of these folders, whose logs they know, and all of the last one;
    and what could not be read."""
    from qtrain.cluster.sweep_file import read_sweep, sweeps_below

    here = {folder.absolute() for folder in folders}
    arms: list[Any] = []
    notes = []
    places = sweeps_below(MULTIRUN)
    for place in places:
        try:
            sweep = read_sweep(place)
        except ValueError as error:
            notes.append(str(error))
            continue
        last = place == places[-1]
        arms += [a for a in sweep.arms if last or (a.folder is not None and a.folder.absolute() in here)]
    return arms, notes


def _exit_code(found: Any) -> int:
    return VERDICT_EXIT if found.troubled else 0


def _report(found: Any, config: dict[str, Any]) -> None:
    """Writes the file for programs, whole or not at all."""
    from qtrain.analysis.survey import as_json

    if config["json"] is None:
        return
    text = (
        json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **as_json(found)}, indent=1)
        + "\n"
    )
    if config["json"] == "-":
        sys.stdout.write(text)
        return
    path = Path(config["json"])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def run(cfg: DictConfig) -> int:
    """0, or 3 where a run is in trouble."""
    from rich.console import Console

    from .status_table import drawing

    config = plain(cfg)
    if config["watch"] is not None:
        return _watch(config)
    found = _look(config)
    _report(found, config)
    if config["json"] != "-":
        console = Console()
        console.print(drawing(found, console, config["limit"]))
    return _exit_code(found)


def _watch(config: dict[str, Any]) -> int:
    """Looks again and again, until nothing is under way or Ctrl-C; the last table stays."""
    import signal

    from rich.console import Console
    from rich.live import Live

    from qtrain.analysis.run_tail import TailReader
    from qtrain.interrupts import Interrupted

    from .status_table import drawing

    console, read = Console(), TailReader()
    found = _look(config, read)
    try:
        # In a terminal on a screen of its own, which is given back at the end; elsewhere one table after the other
        with Live(console=console, screen=console.is_terminal, auto_refresh=False, transient=True) as live:
            while True:
                _report(found, config)
                if config["json"] != "-" and console.is_terminal:
                    live.update(drawing(found, console, config["limit"]), refresh=True)
                elif config["json"] != "-":
                    console.print(drawing(found, console, config["limit"]))
                if not found.under_way:
                    break
                time.sleep(config["watch"])
                found = _look(config, read)
    except Interrupted as stop:
        if stop.signum != signal.SIGINT:
            raise
    if config["json"] != "-" and console.is_terminal:
        console.print(drawing(found, console, config["limit"]))
    return _exit_code(found)
