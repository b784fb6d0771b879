"""The measured plan of a run: measured once, kept in its folder and in the cache, the same on all ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qtrain.nn.measured_plan import Problem, Timing
from qtrain.quant import LinearRecipe
from qtrain.training import auto_plan
from qtrain.training.auto_plan import faster_layers

FORWARD = LinearRecipe(fprop={"input": "int8_row", "weight": "int8_row"})  # type: ignore[arg-type]
LAYERS = {"up": ((64, 16), FORWARD), "down": ((16, 64), FORWARD), "again": ((64, 16), FORWARD)}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Problem]:
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    return []


def chosen(folder: Path, asked: list[Problem], *, tokens: int = 100, native_ms: float = 1.0) -> set[str]:
    def measure(problem: Problem, device: str) -> Timing:
        asked.append(problem)
        return Timing(native_ms if problem.shape == (64, 16) else 3.0, 2.0)

    folder.mkdir(exist_ok=True)
    decide = faster_layers(folder, device="cpu", tokens=tokens, dtype=torch.bfloat16, measure=measure)
    return decide(LAYERS)


def test_each_kind_of_layer_is_measured_once_and_all_of_it_follow(
    tmp_path: Path, asked: list[Problem]
) -> None:
    assert chosen(tmp_path / "run", asked) == {"up", "again"}
    assert [p.shape for p in asked] == [(64, 16), (16, 64)]
    assert {p.dtype for p in asked} == {"bfloat16"}
    written = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [row["native"] for row in written.values()] == [True, False]


def test_a_resumed_run_decides_as_before_and_another_run_reads_the_cache(
    tmp_path: Path, asked: list[Problem]
) -> None:
    chosen(tmp_path / "run", asked)
    assert chosen(tmp_path / "run", asked, native_ms=9.0) == {"up", "again"}
    assert chosen(tmp_path / "other", asked, native_ms=9.0) == {"up", "again"}
    assert len(asked) == 2
    # The run's own decision outlives the cache
    path = tmp_path / "run" / "plan.json"
    path.write_text(path.read_text().replace('"native_ms": 1.0', '"native_ms": 9.0'))
    assert chosen(tmp_path / "run", asked) == set()
    assert chosen(tmp_path / "other", asked) == {"up", "again"}
    assert chosen(tmp_path / "other", asked, tokens=129, native_ms=9.0) == set()
    assert [p.tokens for p in asked[2:]] == [129, 129]


def test_other_devices_and_versions_measure_anew(
    tmp_path: Path, asked: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(tmp_path / "run", asked)
    here = auto_plan.device_of_plans("cpu")
    assert {"device", "torch", "triton", "qtrain", "git_commit"} == set(json.loads(here))
    monkeypatch.setattr(auto_plan, "device_of_plans", lambda device: f"{here} of a newer torch")
    chosen(tmp_path / "other", asked)
    assert len(asked) == 4


def test_a_run_that_moved_keeps_its_plan_and_gives_it_to_nobody(
    tmp_path: Path, asked: list[Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen(tmp_path / "run", asked)
    monkeypatch.setattr(auto_plan, "device_of_plans", lambda device: "another machine")
    assert chosen(tmp_path / "run", asked, native_ms=9.0) == {"up", "again"}
    assert chosen(tmp_path / "other", asked, native_ms=9.0) == set()
    assert len(asked) == 4
    # Other tokens are measured beside what the folder has, which stays
    assert chosen(tmp_path / "run", asked, tokens=129, native_ms=9.0) == set()
    assert chosen(tmp_path / "run", asked, native_ms=9.0) == {"up", "again"}
    assert len(asked) == 6


def test_a_plan_that_was_cut_is_measured_again(tmp_path: Path, asked: list[Problem]) -> None:
    chosen(tmp_path / "run", asked)
    for path in (tmp_path / "run" / "plan.json", *(tmp_path / "cache" / "plans").iterdir()):
        path.write_text(path.read_text()[:40])
    chosen(tmp_path / "run", asked)
    assert len(asked) == 4


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
