"""The stability study: its arms are valid runs, and its page says what was foreseen and what was not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import reproduce_stability as study
import study_command
from stability_arms import ARMS, EXPERIMENT
from stability_page import SCRIPT
from study_page import END, begin
from study_runs import BASELINE, PLACEBO, Arm, Run

sys.path.insert(0, str(Path(__file__).parents[1] / "analysis"))
from made_up_runs import healthy_losses, write_curve_run

ROOT = Path(__file__).parents[2]
STEPS = 120


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_run(arm: Arm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    from qtrain import cli
    from qtrain.training.assembly import assemble

    words = Run(arm, 2, tmp_path, EXPERIMENT).command()[4:]
    assert cli.main(["train", "--cfg", *words]) == 0
    config = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out), resolve=True)
    assert isinstance(config, dict)
    parts = assemble(config)  # type: ignore[arg-type]
    settings, states, linear = parts.settings, config["optimizer"]["states"], parts.recipe.linear
    assert (settings.steps, settings.batch_sequences, settings.sequence_tokens, settings.seed) == (
        200,
        8,
        128,
        2,
    )
    quantized = linear is not None and any(linear.resolved(o) is not None for o in linear.operands())
    moments = [states["exp_avg"] != "none", states["exp_avg_sq"] != "none"]
    # What an arm changes is what its name says
    assert quantized is (not arm.name.startswith(("m1", "m2", "lr")) and arm.name not in (BASELINE, PLACEBO))
    assert moments == [arm.name in ("m1_int4_row", "w8a8g8_m8"), arm.name in ("m2_int8_tensor", "w8a8g8_m8")]
    assert config["optimizer"]["lr"] == {"lr_low": 3e-4, "lr_high": 3e-2}.get(arm.name, 3e-3)
    assert parts.model_config.layers == 2


def test_arms_are_named_once_and_each_says_what_was_foreseen() -> None:
    from qtrain.analysis.health import VERDICTS

    assert len({arm.name for arm in ARMS}) == len(ARMS) >= 12
    assert all(arm.expected and set(arm.expected) <= set(VERDICTS) for arm in ARMS)


def made_up(gaps: dict[str, float], broken: Sequence[str]) -> Callable[..., None]:
    """In the place of run_all: runs whose loss is their arm's gap away from the baseline's; those of ``broken`` rise."""

    def write(runs: list[Run], *_: object, **__: object) -> None:
        for run in runs:
            losses = healthy_losses(STEPS, run.seed)
            losses += gaps.get(run.arm.name, 0.0) * (1 + 0.1 * run.seed)
            if run.arm.name in broken:
                losses[30:] += 5.0
            more: dict[str, Any] = {} if run.arm.name in (BASELINE, PLACEBO) else {"tag": run.arm.name}
            write_curve_run(run.out, run.arm.name, run.seed, losses, **more)
            versions: dict[str, Any] = {
                "git_commit": "c" * 40,
                "git_modified": False,
                "platform": "a machine",
            }
            versions |= dict.fromkeys(("python", "torch", "lightning", "numpy"), "1.2.3")
            (run.folder / "versions.json").write_text(json.dumps(versions))
            (run.folder / "attempts.jsonl").write_text("{}\n")

    return write


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(f"# Before\n\n{begin(SCRIPT)}\nstale\n{END}\n\nafter\n")
    return path


BROKEN = ("m2_int8_tensor", "g4_tensor", "lr_high")


def test_what_was_foreseen_ends_with_0(
    tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_command, "run_all", made_up({"w4": 0.05}, BROKEN))
    assert study.main(["--out", str(tmp_path / "out"), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{begin(SCRIPT)}\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "stale" not in text
    assert f"{3 * len(ARMS)} of {3 * len(ARMS)} verdicts are ones that were foreseen." in text
    for arm in ARMS:
        (line,) = [row for row in text.splitlines() if row.startswith(f"| {arm.label} (`{arm.name}`) |")]
        assert ("3 diverged" in line) is (arm.name in BROKEN)
        assert f"| {' or '.join(arm.expected)} |" in line
    assert "- `m2_int8_tensor` seed 1: diverged: the loss rose from step 31 on" in text
    assert "bring the two-sided sign test to p = 0.25 at best" in text
    assert f"`bash scripts/reproduce_stability.sh`, commit {'c' * 40}" in text
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "out" / "comparison" / "comparison.html").is_file()
    assert "surprises: 0;" in capsys.readouterr().out


def test_a_placebo_that_is_told_apart_and_other_surprises_end_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_command, "run_all", made_up({PLACEBO: 0.05}, (*BROKEN, "w8a8g8")))
    assert study.main(["--out", str(tmp_path), "--seeds", "2"]) == 1
    said = capsys.readouterr().out
    assert "placebo: its interval over seeds leaves out a gap of 0" in said
    assert "w8a8g8 seed 1: diverged: the loss rose" in said
    assert "(foreseen: healthy)" in said
    assert f"{2 * len(ARMS) - 2} of {2 * len(ARMS)} verdicts are ones that were foreseen." in said


def test_a_failed_run_ends_the_study_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise study_command.RunFailed("baseline/seed0 ended with exit code 1")

    monkeypatch.setattr(study_command, "run_all", fail)
    assert study.main(["--out", str(tmp_path)]) == 2


def test_the_documents_page_holds_every_arm() -> None:
    page = ROOT / "docs" / "stability_study.md"
    text = page.read_text(encoding="utf-8")
    assert text.count(begin(SCRIPT)) == text.count(END) == 1
    between = text[text.index(begin(SCRIPT)) : text.index(END)]
    if "No results yet" in between:
        pytest.skip("the study has not been run to its end yet")
    for arm in ARMS:
        assert f"| {arm.label} (`{arm.name}`) |" in between
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
