"""qtrain compare, by the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from qtrain import cli

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
from made_up_runs import healthy_losses, write_curve_run
from test_arms import QUANTIZED


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """base, and an arm that is 2 % worse with one run that was killed."""
    for seed in range(3):
        losses = healthy_losses(200, seed)
        write_curve_run(tmp_path / "runs", "base", seed, losses)
        write_curve_run(tmp_path / "runs", "arm", seed, losses * 1.02, **QUANTIZED)
    write_curve_run(tmp_path / "runs", "arm", 3, healthy_losses(200, 3)[:100], steps=200, **QUANTIZED)
    return tmp_path


def compare(runs: Path, *more: str) -> int:
    return cli.main(["compare", f"runs=[{runs / 'runs'}]", f"out={runs / 'out'}", "html=false", *more])


def test_table_verdicts_and_files(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert compare(runs) == 0
    out = capfd.readouterr().out
    assert "arm is worse, by +2.00%" in out
    assert "arm seed 3: incomplete: no verdict after step 100 of 200" in " ".join(out.split())
    assert {p.name for p in (runs / "out").iterdir()} == {
        "comparison.json",
        "comparison.png",
        "comparison.pdf",
    }
    found = json.loads((runs / "out" / "comparison.json").read_text())
    assert found["arms"][1]["gap_fraction"]["mean"] == pytest.approx(0.02)
    assert found["command"] == f"qtrain compare 'runs=[{runs / 'runs'}]'"


def test_a_bare_word_is_where_the_runs_are(runs: Path) -> None:
    assert cli.main(["compare", str(runs / "runs"), f"out={runs / 'out'}"]) == 0
    assert (runs / "out" / "comparison.html").stat().st_size < 10_000_000


@pytest.mark.parametrize("columns", [80, 200])
def test_a_narrow_terminal_has_few_columns(
    runs: Path, columns: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for i in range(5):
        write_curve_run(runs / "runs", f"other{i}", 0, healthy_losses(200, 0), **QUANTIZED, tag=i)
    assert compare(runs) == 0
    out = capfd.readouterr().out
    assert "│ other4 " in out
    assert ("tokens/s" in out.split("│ base")[0]) is (columns == 200)
    assert (
        "tokens/s, states, MB, lowest SQNR: on the page, in comparison.json" in " ".join(out.split())
    ) is (columns == 80)


def test_gates_set_the_exit_code(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert compare(runs, "gate.max_loss_gap_fraction=0.03") == 0
    assert compare(runs, "gate.max_loss_gap_fraction=0.01") == 1
    assert "gate: arm: its gap is +2.00% of the baseline's loss, the gate is +1.00%" in capfd.readouterr().out
    assert compare(runs, "gate.verdicts=[healthy,noisy]") == 1
    assert compare(runs, "gate.verdicts=[healthy,incomplete]", "gate.max_spikes=0") == 0
    found = json.loads((runs / "out" / "comparison.json").read_text())
    assert found["gate_failures"] == []
    assert "'gate.verdicts=[healthy,incomplete]'" in found["command"]


def test_what_cannot_be_compared_is_refused(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_curve_run(runs / "runs", "long", 0, healthy_losses(300, 0), **QUANTIZED)
    assert compare(runs) == 2
    assert "long cannot be compared with base: steps is 300, there 200" in capfd.readouterr().err
    assert not (runs / "out").exists()
    assert compare(runs, "allow=[steps,tokens]") == 2
    assert compare(runs, "allow=[steps]") == 0
    assert compare(runs, "baseline=nothing") == 2
    assert "name one with baseline=, of: " in capfd.readouterr().err
    for words, says in (
        ("runs=[nowhere]", "there is no nowhere"),
        ("gate.verdicts=[fine]", "fine is none of healthy"),
        ("confidence=2", "confidence=2"),
    ):
        assert compare(runs, words) == 2
        assert says in capfd.readouterr().err
