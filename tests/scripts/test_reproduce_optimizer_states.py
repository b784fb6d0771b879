"""The study of optimizer states: what its arms are, how its runs go on, and the page that they become."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import reproduce_optimizer_states as study
import study_command
import study_runs as runs_module
from optimizer_states_arms import ARMS, EXPERIMENT
from optimizer_states_claims import CLAIMS
from optimizer_states_page import SCRIPT, read_results
from study_page import END, begin, check_alike, write_page
from study_runs import Arm, Run, RunFailed, run_all, runs_of

from .made_up_arm import WINDOWS, result

BEGIN = begin(SCRIPT)
ROOT = Path(__file__).parents[2]


# --- the arms are what they are called


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_run(arm: Arm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omegaconf import OmegaConf

    from qtrain import cli
    from qtrain.training.assembly import assemble

    words = Run(arm, 2, tmp_path, EXPERIMENT).command()[4:]
    assert cli.main(["train", "--cfg", *words]) == 0
    config = OmegaConf.to_container(OmegaConf.create(capsys.readouterr().out), resolve=True)
    parts = assemble(config)
    settings, model, optimizer = parts.settings, parts.model_config, config["optimizer"]
    assert (settings.steps, settings.batch_sequences, settings.sequence_tokens, settings.seed) == (
        200,
        16,
        128,
        2,
    )
    assert (model.width, model.layers, model.heads, model.tie_embeddings) == (128, 4, 4, False)
    assert (optimizer["lr"], optimizer["betas"], optimizer["weight_decay"], optimizer["clip_norm"]) == (
        3e-3,
        [0.9, 0.95],
        0.1,
        1.0,
    )
    assert [parts.schedule(step) for step in (50, 200)] == [1.0, 0.1]
    states, linear = optimizer["states"], parts.recipe.linear
    assert (states["exp_avg"] == "none") is not arm.name.startswith("m1")
    assert (states["exp_avg_sq"] == "none") is not arm.name.startswith("m2")
    quantized = linear is not None and linear.fprop.input is not None
    assert quantized is (arm.name in ("a4_tensor", "a4_token", "w8a8"))
    assert states["min_numel"] == (40000 if arm.name.endswith("_mlp") else 4096)
    if quantized:
        assert (linear.fprop.weight is not None) is (arm.name == "w8a8")
        assert linear.dgrad.grad_output is None
        assert linear.wgrad.grad_output is None


# --- running


def stub(run: Run, code: str) -> list[str]:
    """A process in the place of a run: ``code`` sees its folder as ``folder``."""
    prelude = f"import json, pathlib, sys, time\nfolder = pathlib.Path({str(run.folder)!r})\nfolder.mkdir(parents=True, exist_ok=True)\n"
    return [sys.executable, "-c", prelude + code]


COMPLETES = """
(folder / "attempts").open("a").write("x")
(folder / "summary.json").write_text(json.dumps({"val_loss": 2.5}))
(folder / "verdict.json").write_text(json.dumps({"outcome": "completed"}))
"""
TWO = (Arm("one", "the first"), Arm("two", "the second"))


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """run's name -> the code in its place; those that are not named complete."""
    codes: dict[str, str] = {}
    monkeypatch.setattr(Run, "command", lambda run, settings=(): stub(run, codes.get(run.name, COMPLETES)))
    return codes


@pytest.mark.usefixtures("stubs")
def test_what_has_ended_is_not_run_again(tmp_path: Path) -> None:
    runs, said = runs_of(TWO, (0, 1), tmp_path, EXPERIMENT), []
    assert [run.name for run in runs] == ["one/seed0", "two/seed0", "one/seed1", "two/seed1"]
    run_all(runs[:2], 2, say=said.append)
    run_all(runs, 2, say=said.append)
    assert [(run.folder / "attempts").read_text() for run in runs] == ["x"] * 4
    assert "2 of 4 runs have ended already" in said
    assert "0 runs left" in said[-1]
    assert all(run.cpu_seconds > 0 for run in runs)


def test_arms_without_a_claim_run_last(tmp_path: Path) -> None:
    arms = (Arm("extra", "", claimed=False), Arm("needed", ""))
    assert [run.name for run in runs_of(arms, (0, 1), tmp_path, EXPERIMENT)] == [
        "needed/seed0",
        "needed/seed1",
        "extra/seed0",
        "extra/seed1",
    ]


def test_a_failed_run_is_named_and_the_others_are_ended(tmp_path: Path, stubs: dict[str, str]) -> None:
    stubs["one/seed0"] = "print('the disk is full')\nsys.exit(1)"
    stubs["two/seed0"] = "(folder / 'pid').write_text(str(__import__('os').getpid()))\ntime.sleep(600)"
    first, second = runs_of(TWO, (0,), tmp_path, EXPERIMENT)
    with pytest.raises(RunFailed, match=r"(?s)the run one/seed0 ended with exit code 1.*the disk is full"):
        run_all([second, first], 2)
    path = second.folder / "pid"
    if path.is_file():  # else it was ended before it wrote that
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
    del stubs["one/seed0"], stubs["two/seed0"]
    run_all([second, first], 2)
    assert first.outcome == second.outcome == "completed"


def test_a_run_that_ends_well_without_a_result_has_failed(tmp_path: Path, stubs: dict[str, str]) -> None:
    stubs["one/seed0"] = "pass"
    with pytest.raises(RunFailed, match="one/seed0 ended with exit code 0"):
        run_all(runs_of(TWO, (0,), tmp_path, EXPERIMENT)[:1], 1)


def test_a_run_that_is_not_finite_is_a_result(tmp_path: Path, stubs: dict[str, str]) -> None:
    stubs["one/seed0"] = (
        "(folder / 'verdict.json').write_text(json.dumps({'outcome': 'non_finite'}))\nsys.exit(3)"
    )
    runs = runs_of(TWO, (0,), tmp_path, EXPERIMENT)
    run_all(runs, 1)
    assert runs[0].val_loss == math.inf
    assert runs[1].val_loss == 2.5


@pytest.mark.slow
def test_an_interrupted_study_goes_on_with_real_runs(tmp_path: Path) -> None:
    """SIGTERM in the middle of a run: it saves, and goes on from there to the loss that it would have had."""
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i}.txt").write_text(
            f"document {i}: " + f"the cat of number {i} sleeps. " * 20
        )
    settings = [
        "data=text", f"data.source.paths=[{tmp_path / 'corpus'}]", f"data.folder={tmp_path / 'shards'}", "data.val_fraction=0.3",
        "schedule.warmup_steps=1", "model.layers=1", "sequence_tokens=32", "batch_sequences=2", "eval_windows=2",
        "sample.max_new_tokens=2", "checkpoint_every_steps=4", "steps=40",
    ]  # fmt: skip
    arm = next(arm for arm in ARMS if arm.name == "m2_dynamic8")
    cut, whole = Run(arm, 0, tmp_path / "cut", EXPERIMENT), Run(arm, 0, tmp_path / "whole", EXPERIMENT)
    program = (
        "import sys, reproduce_optimizer_states as s; s.ARMS = (s.ARMS[3],); sys.exit(s.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "--seeds", "1", "--out", str(tmp_path / "cut"), *settings]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), *sys.path])}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while not list(cut.folder.glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in said
    assert cut.outcome is None
    assert list(cut.folder.glob("checkpoints/step-*"))
    run_all([cut, whole], 2, settings)
    assert len((cut.folder / "attempts.jsonl").read_text().splitlines()) == 2
    assert cut.val_loss == whole.val_loss
    assert len((cut.folder / runs_module.CPU_TIME).read_text().splitlines()) == 2


# --- the page


def made_up(out: Path, gaps: dict[str, float]) -> Callable[..., None]:
    """In the place of run_all: runs with a loss of 2.4 and their arm's gap."""

    def write(runs: list[Run], *_: object, **__: object) -> None:
        for run in runs:
            run.folder.mkdir(parents=True)
            one = result([2.4 + run.seed / 100 + gaps.get(run.arm.name, 0.0)], seed=run.seed, noise=0.001)
            data, held = (
                {"shards": "s", "val_windows": WINDOWS},
                {"total": 2_500_000, "as_float32": 7_000_000},
            )
            summary = {"val_loss": float(one.val_losses[0]), "data": data, "optimizer_state_bytes": held}
            versions = {"git_commit": "c" * 40, "git_modified": False, "platform": "a machine"}
            versions |= dict.fromkeys(("python", "torch", "lightning", "numpy"), "1.2.3")
            for name, value in (
                ("summary", summary),
                ("verdict", {"outcome": "completed"}),
                ("versions", versions),
            ):
                (run.folder / f"{name}.json").write_text(json.dumps(value))
            np.save(run.folder / "window_losses.npy", one.windows[0].astype(np.float32))
            (run.folder / "attempts.jsonl").write_text("{}\n")
            (run.folder / runs_module.CPU_TIME).write_text("90\n")
            rows = [{"kind": "train", "step": i + 1, "loss": 5.5 - i / 10} for i in range(20)]
            (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


AS_EXPECTED = {
    "m2_int8_tensor": 0.5,
    "m2_int8_row": 0.4,
    "m2_uint4": 0.5,
    "m2_linear4_nozero": 0.01,
    "a4_tensor": 0.06,
}


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(f"# Before\n\n{BEGIN}\nstale\n{END}\n\nafter\n")
    return path


def test_a_study_that_bears_everything_out_ends_with_0(
    tmp_path: Path, page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_command, "run_all", made_up(tmp_path / "out", AS_EXPECTED))
    assert study.main(["--out", str(tmp_path / "out"), "--page", str(page), "steps=200"]) == 0
    text = page.read_text()
    assert text.startswith(f"# Before\n\n{BEGIN}\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "stale" not in text
    assert text.count("**holds**") == len(CLAIMS)
    assert "| m2 in linear int8 with one scale a tensor breaks | > 0.2 | +0.500 |" in text
    assert "3 of 3, p = 0.125" in text
    assert "p = 0.125 at best (two-sided 0.250)" in text
    assert "reproduce_optimizer_states.sh steps=200`, commit " + "c" * 40 in text
    assert (
        f"{len(ARMS) * 3} runs (3 seeds) in {len(ARMS) * 3} attempts, {len(ARMS) * 3 * 90 / 60:.0f} minutes"
        in text
    )
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert f"{len(CLAIMS)} of {len(CLAIMS)} claims hold" in capsys.readouterr().out


def test_a_study_that_does_not_says_so_and_ends_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_command, "run_all", made_up(tmp_path, {**AS_EXPECTED, "m2_dynamic8": 0.1}))
    assert study.main(["--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "does not hold: m2 in dynamic 8 bits" in text
    assert "6 of 7 claims hold" in text


def test_a_failed_run_ends_the_study_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RunFailed("the run one/seed0 ended with exit code 1")

    monkeypatch.setattr(study_command, "run_all", fail)
    assert study.main(["--out", str(tmp_path)]) == 2
    assert "one/seed0" in capsys.readouterr().err


def test_runs_on_other_windows_are_refused(tmp_path: Path) -> None:
    runs = runs_of(TWO, (0,), tmp_path, EXPERIMENT)
    made_up(tmp_path, {})(runs)
    check_alike(runs)
    summary = json.loads((runs[1].folder / "summary.json").read_text())
    summary["data"]["shards"] = "other"
    (runs[1].folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="one/seed0 and two/seed0 were validated on other data"):
        check_alike(runs)


def test_a_run_that_was_not_finite_has_no_windows(tmp_path: Path) -> None:
    runs = runs_of(TWO[:1], (0, 1), tmp_path, EXPERIMENT)
    made_up(tmp_path, {})(runs)
    (runs[1].folder / "verdict.json").write_text(json.dumps({"outcome": "non_finite"}))
    found = read_results(runs)["one"]
    assert found.val_losses[1] == math.inf
    assert np.isnan(found.windows[1]).all()
    assert np.isfinite(found.windows[0]).all()


def test_a_page_without_markers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="the results go between"):
        write_page(path, SCRIPT, "text")
    assert path.read_text() == "nothing"


def test_the_documents_page_holds_every_claim_and_arm() -> None:
    page = ROOT / "docs" / "optimizer_states.md"
    text = page.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    between = text[text.index(BEGIN) : text.index(END)]
    if "No results yet" in between:
        pytest.skip("the study has not been run to its end yet")
    for claim in CLAIMS:
        assert f"| {claim.text} | {claim.expected()} |" in between
    for arm in ARMS:
        assert f"| {arm.label} |" in between
    assert page.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
