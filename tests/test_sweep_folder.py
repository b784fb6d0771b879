"""Which folder a sweep has, of this process or submitted. What is in sweep.json: cluster/test_sweep_file.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import hydra.core.utils
import pytest

from qtrain import cli
from qtrain.overrides import Overrides, UserError
from qtrain.sweep_folder import announce


@pytest.fixture(autouse=True)
def one_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still."""
    then = SimpleNamespace(strftime=lambda pattern: "then")
    monkeypatch.setattr(hydra.core.utils, "datetime", SimpleNamespace(now=lambda: then))
    monkeypatch.chdir(tmp_path)


def announced(*words: str) -> list[str]:
    with cli._hydra("train", None) as found:
        checks = Overrides(found.config_loader, "train", cli._overrides(cli, "train", list(words)))
        return announce("train", checks, cli._as_job)


def test_two_sweeps_of_one_second_have_two_folders() -> None:
    for seed in (0, 1):
        place = f"multirun/then/{('then', 'then-2')[seed]}"
        assert announced(f"seed={seed},7") == [f"hydra.sweep.dir='{place}'"]
        first = json.loads((Path(place) / "sweep.json").read_text())["arms"][0]
        assert first["overrides"] == [f"seed={seed}"]
    assert announced("seed=2,7", "hydra/launcher=slurm") == ["hydra.sweep.dir='multirun/then/then-3'"]
    assert list(Path("multirun/then/then-3").iterdir()) == []  # the launcher's to fill


def test_a_submitted_sweep_shares_no_folder_that_was_named() -> None:
    words = ["seed=0,1", "hydra.sweep.dir=mine"]
    assert announced(*words, "hydra/launcher=slurm") == ["hydra.sweep.dir='mine'"]
    with pytest.raises(UserError, match=r"hydra.sweep.dir=mine exists.*choose another"):
        announced(*words, "hydra/launcher=slurm")
    assert announced(*words) == ["hydra.sweep.dir='mine'"]  # of this process: as Hydra has it
