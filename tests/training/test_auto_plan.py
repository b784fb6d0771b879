"""The measured plan of a run: measured once, kept in its folder and in the cache, the same on all ranks; what a run that
goes on elsewhere and an evaluation make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from qtrain_kernels.cpu_tier import tier

from qtrain.nn.measured_plan import Problem, Timing
from qtrain.quant import LinearRecipe
from qtrain.training import auto_plan, module
from qtrain.training.assembly import assemble
from qtrain.training.auto_plan import as_trained, faster_layers
from qtrain.training.evaluation import evaluate, trained_module
from qtrain.training.fit import train
from qtrain.training.saved import checkpoint_of, read_checkpoint, trained_run

FORWARD = LinearRecipe(fprop={"input": "int8_row", "weight": "int8_row"})  # type: ignore[arg-type]
LAYERS = {"up": ((64, 16), FORWARD), "down": ((16, 64), FORWARD), "again": ((64, 16), FORWARD)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Problem]:
    tier()  # built before the cache is another, and said before anything else is
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    return []


def chosen(
    folder: Path, asked: list[Problem], *, tokens: int = 100, native_ms: float = 1.0, compiled: bool = True
) -> set[str]:
    def measure(problem: Problem, device: str) -> Timing:
        asked.append(problem)
        ms = native_ms if problem.shape == (64, 16) else 3.0
        return Timing((ms, ms), (2.0, 2.0))

    folder.mkdir(exist_ok=True)
    decide = faster_layers(
        folder, device="cpu", tokens=tokens, dtype=torch.bfloat16, compiled=compiled, measure=measure
    )
    return decide(LAYERS)


def written(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "plan.json").read_text())  # type: ignore[no-any-return]


def test_each_kind_of_layer_is_measured_once_and_all_of_it_follow(
    tmp_path: Path, asked: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen(tmp_path / "run", asked) == {"up", "again"}
    assert [p.shape for p in asked] == [(64, 16), (16, 64)]
    assert {(p.dtype, p.compiled) for p in asked} == {("bfloat16", True)}
    (plan,) = written(tmp_path / "run")
    assert [row["native"] for row in plan["layers"].values()] == [True, False]
    assert set(plan["where"]) == {"device", "compiled", "qtrain", "torch", "triton"}
    assert capsys.readouterr().err == (
        f"compute=auto: timed 2 kinds of layers natively and simulated in 0 s ({tmp_path / 'run' / 'plan.json'})\n"
    )


def test_a_resumed_run_decides_as_before_and_another_run_reads_the_cache(
    tmp_path: Path, asked: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen(tmp_path / "run", asked)
    capsys.readouterr()
    assert chosen(tmp_path / "run", asked, native_ms=9.0) == {"up", "again"}
    assert chosen(tmp_path / "other", asked, native_ms=9.0) == {"up", "again"}
    assert len(asked) == 2
    assert capsys.readouterr().err == ""
    # The run's own decision outlives the cache
    path = tmp_path / "run" / "plan.json"
    path.write_text(path.read_text().replace("   1.0", "   9.0"))
    assert chosen(tmp_path / "run", asked) == set()
    assert chosen(tmp_path / "other", asked) == {"up", "again"}
    assert chosen(tmp_path / "other", asked, tokens=129, native_ms=9.0) == set()
    assert [p.tokens for p in asked[2:]] == [129, 129]
    assert len(written(tmp_path / "other")[0]["layers"]) == 4


def test_other_commits_measure_anew_and_a_run_goes_on_as_it_began(
    tmp_path: Path, asked: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(tmp_path / "run", asked)
    newer = {**auto_plan.versions(), "git_commit": "another"}
    monkeypatch.setattr(auto_plan, "versions", lambda: newer)
    assert chosen(tmp_path / "run", asked, native_ms=9.0) == {"up", "again"}
    assert len(asked) == 2
    assert chosen(tmp_path / "other", asked, native_ms=9.0) == set()
    assert len(asked) == 4


def test_a_run_that_moved_is_measured_anew_says_so_and_keeps_both(
    tmp_path: Path, asked: list[Problem], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen(tmp_path / "run", asked)
    capsys.readouterr()
    here = auto_plan.place
    monkeypatch.setattr(
        auto_plan, "place", lambda d, *, compiled: {**here(d, compiled=compiled), "device": "B"}
    )
    assert chosen(tmp_path / "run", asked, native_ms=9.0) == set()
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"compute=auto: {tmp_path / 'run' / 'plan.json'} was measured on ")
    assert "; here, on B (compiled, qtrain " in said[0]
    assert said[0].endswith("it is anew")
    first, second = written(tmp_path / "run")
    assert first["where"]["device"] != second["where"]["device"] == "B"
    assert [row["native"] for row in first["layers"].values()] == [True, False]
    # Back where it began it decides as it did, and that plan is in force
    monkeypatch.setattr(auto_plan, "place", here)
    assert chosen(tmp_path / "run", asked, native_ms=9.0) == {"up", "again"}
    assert [plan["where"]["device"] for plan in written(tmp_path / "run")] == [
        "B",
        first["where"]["device"],
    ]
    assert len(asked) == 4


def test_an_eager_run_is_another_measurement(
    tmp_path: Path, asked: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    chosen(tmp_path / "run", asked)
    assert chosen(tmp_path / "run", asked, native_ms=9.0, compiled=False) == set()
    assert [p.compiled for p in asked] == [True, True, False, False]
    assert "here, on " in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["[{", "[]x", '{"T=1": {"native_ms": 1.0, "plain_ms": 2.0}}', '[{"where": {}}]']
)
def test_a_cut_or_foreign_plan_is_measured_again_and_named(
    tmp_path: Path, asked: list[Problem], content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen(tmp_path / "run", asked)
    (cache,) = (tmp_path / "cache" / "plans").iterdir()
    for path in (tmp_path / "run" / "plan.json", cache):
        path.write_text(content)
    capsys.readouterr()
    assert chosen(tmp_path / "run", asked) == {"up", "again"}
    assert len(asked) == 4
    said = capsys.readouterr().err
    for path in (tmp_path / "run" / "plan.json", cache):
        assert f"{path} is no measured plan, cut or written by something else (" in said
        assert "up" not in path.read_text()
        assert json.loads(path.read_text())[0]["layers"]


def test_other_ranks_take_what_rank_zero_found(
    tmp_path: Path, asked: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Timing] = {}
    monkeypatch.setattr(auto_plan, "by_rank_zero", lambda action: found.update(action()) or found)
    chosen(tmp_path / "run", asked)
    monkeypatch.setattr(auto_plan, "by_rank_zero", lambda action: found)
    assert chosen(tmp_path / "elsewhere", asked, native_ms=9.0) == {"up", "again"}
    assert len(asked) == 2
    assert not (tmp_path / "elsewhere" / "plan.json").exists()


def test_only_layers_that_can_be_native_are_as_trained() -> None:
    assert as_trained(["up", "gone"])(LAYERS) == {"up"}


def test_an_evaluation_computes_as_the_run_did(
    tmp_path: Path,
    asked: list[Problem],
    configure: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(problem: Problem, device: str) -> Timing:
        out, inner = problem.shape
        return Timing((1.0, 1.0), (2.0, 2.0) if out > inner else (0.5, 0.5))

    def measured(folder: Path, **arguments: Any) -> Any:
        return faster_layers(folder, **arguments, measure=measure)

    monkeypatch.setattr(module, "faster_layers", measured)
    verdict, folder = train(assemble(configure(tmp_path, "compute=auto", "checkpoint_every_steps=4")))
    assert verdict.good
    path = checkpoint_of(folder)
    assert read_checkpoint(path)["qtrain"]["plan"]["native"] == ["blocks.0.mlp.up"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["compute"].startswith("native, int8 on ")
    # Nothing is timed, and the run's plan isn't needed: a checkpoint is enough
    monkeypatch.setattr(module, "faster_layers", None)
    (folder / "plan.json").unlink()
    run = trained_run(path, {})
    layers = trained_module(run).surgery.layers
    assert [layer.name for layer in layers if layer.native] == ["blocks.0.mlp.up"]
    found = evaluate(run)
    assert found.numbers["compute"] == summary["compute"]
    assert found.numbers["val_loss"] == summary["val_loss"]
    assert not (folder / "plan.json").exists()
    assert "does not say which layers were native" not in capsys.readouterr().err
    del run.checkpoint["qtrain"]["plan"]["native"]
    trained_module(run)
    assert "does not say which layers were native" in capsys.readouterr().err
