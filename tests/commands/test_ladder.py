"""qtrain ladder, by the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qtrain import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
from made_up_runs import write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, loss in enumerate((2.0, 2.1, 2.2)):
        write_run(tmp_path, "base", seed, loss)
        write_run(tmp_path, "arm", seed, loss * (1.001 + 0.0001 * seed))
    return tmp_path


def test_one_page_and_its_summary(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ladder", str(runs), "rungs=[base,arm]"]) == 0
    out = capfd.readouterr().out
    assert "Go as far as **arm**: every rung is adopted." in out
    assert str(runs / "ladder" / "ladder.md") in out
    assert (runs / "ladder" / "ladder.md").is_file()
    # A second look replaces the page, and does not take it for a run
    assert cli.main(["ladder", str(runs), "rungs=[base,arm]", "thresholds.margin_percent=0.05"]) == 0
    assert "worse by" in (runs / "ladder" / "ladder.md").read_text()
    assert cli.main(["ladder", str(runs), "rungs=[base,arm]", f"out={runs / 'page'}"]) == 0
    assert (runs / "page" / "ladder.png").is_file()


def test_what_cannot_be_is_refused(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ladder", f"runs={runs}"]) == 2
    assert "none of ladder_bf16, " in capfd.readouterr().err
    assert cli.main(["ladder", f"runs={runs}", "rungs=[base,arm]", "thresholds.min_seeds=1"]) == 2
    assert "min_seeds=1" in capfd.readouterr().err
    assert cli.main(["ladder", f"runs={runs}", "rungs=[base]"]) == 2
    assert "two or more different" in capfd.readouterr().err
