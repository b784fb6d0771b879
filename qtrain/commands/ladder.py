"""qtrain ladder: read the runs of a ladder of precisions and write one page that says which rung to adopt."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .train import plain

CONFIG = "ladder"
POSITIONAL = "runs"


def _limits(config: dict[str, Any]) -> Any:
    from qtrain.analysis.ladder import Thresholds

    return Thresholds(**config["thresholds"])


def check(cfg: DictConfig) -> None:
    """Raises ValueError for thresholds out of range and where no rung has a run."""
    from qtrain.analysis.ladder import check_rungs

    config = plain(cfg)
    _limits(config)
    check_rungs(config["rungs"])
    folder = Path(config["runs"])
    if not any((folder / name).is_dir() for name in config["rungs"]):
        raise ValueError(
            f"runs={folder}: none of {', '.join(config['rungs'])} is a folder there; train them first (qtrain train -m "
            "sweep=ladder seed=0,1,2), or name your own experiments with rungs=[...]"
        )


def run(cfg: DictConfig) -> int:
    """Writes ladder.md, ladder.png and ladder.json, and prints the page's table and advice. 0, whatever it says."""
    from qtrain.analysis.ladder import climb
    from qtrain.analysis.ladder_page import PAGE, page, write_ladder
    from qtrain.analysis.run_records import read_runs

    config = plain(cfg)
    limits, names = _limits(config), list(config["rungs"])
    rungs = climb(read_runs(Path(config["runs"]), names), names, limits)
    out = Path(config["out"] or Path(config["runs"]) / "ladder")
    command = shlex.join(["qtrain", "ladder", f"runs={config['runs']}"])
    write_ladder(rungs, limits, out, command)
    print(page(rungs, limits, command).split("\n## How to read")[0])
    print(f"files: {out / PAGE}")
    return 0
