"""qtrain compare on runs that really went wrong: trained here, and stopped, killed, poisoned or cut."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qtrain import cli
from qtrain.training.module import QuantizedTransformer

STEPS, BAD = 40, 24
DAMAGES: dict[str, Callable[[Path], object]] = {}


def damage(harm: Callable[[Path], object]) -> Callable[[Path], object]:
    DAMAGES[harm.__name__] = harm
    return harm


@damage
def cut_metrics(folder: Path) -> None:
    data = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(data[: len(data) // 2])


@damage
def cut_windows(folder: Path) -> None:
    data = (folder / "window_losses.npy").read_bytes()
    (folder / "window_losses.npy").write_bytes(data[:-7])


@damage
def cut_instruments(folder: Path) -> None:
    data = (folder / "instruments.jsonl").read_bytes()
    (folder / "instruments.jsonl").write_bytes(data[: len(data) // 2])


@damage
def cut_summary(folder: Path) -> None:
    (folder / "summary.json").write_bytes((folder / "summary.json").read_bytes()[:40])


@damage
def empty_config(folder: Path) -> None:
    (folder / "config.yaml").write_bytes(b"")


def _train(out: Path, name: str, *more: str) -> int:
    words = [
        "data=text", f"data.source.paths=[{out / 'corpus'}]", f"data.folder={out / 'shards'}", "data.val_fraction=0.3",
        "model=gpt_1m", "model.layers=1", "model.width=32", "model.heads=2", "sequence_tokens=32", "batch_sequences=2",
        f"steps={STEPS}", "eval_every_steps=10", "eval_windows=4", "schedule.warmup_steps=1", "logger=none", "compile=false",
        "device=cpu", "precision=fp32", "recipe=none", "m1=none", "m2=none", "sample.max_new_tokens=2", "checkpoint_every_steps=0",
        f"name={name}", "run=seed0", f"out={out / 'runs'}",
    ]  # fmt: skip
    return cli.main(["train", *words, *more])


def _at_bad_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[], float]) -> None:
    """act: what happens in the middle of step BAD; its result is a factor of the loss."""
    losses = QuantizedTransformer.token_losses

    def acting(self: QuantizedTransformer, batch: Any) -> Any:
        bad = self.training and self.trainer.global_step == BAD - 1
        return losses(self, batch) * (act() if bad else 1.0)

    monkeypatch.setattr(QuantizedTransformer, "token_losses", acting)


def _signalled(signum: int) -> Callable[[], float]:
    def act() -> float:
        os.kill(os.getpid(), signum)
        return 1.0

    return act


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """baseline, diverged, not_finite, interrupted, killed; and the baseline's folder damaged in the ways of DAMAGES."""
    out = tmp_path_factory.mktemp("broken")
    (out / "corpus").mkdir()
    for i in range(40):
        (out / "corpus" / f"{i}.txt").write_text(f"document {i}: " + f"dog {i} barks. " * 20)
    assert _train(out, "baseline") == 0
    assert _train(out, "diverged", "m2=int8_tensor", "optimizer.states.min_numel=1000") == 0
    with pytest.MonkeyPatch.context() as patch:
        _at_bad_step(patch, lambda: math.nan)
        assert _train(out, "not_finite") == 3
    with pytest.MonkeyPatch.context() as patch:
        _at_bad_step(patch, _signalled(signal.SIGTERM))
        assert _train(out, "interrupted") == 75
    child = os.fork()
    if child == 0:
        _at_bad_step(pytest.MonkeyPatch(), _signalled(signal.SIGKILL))
        _train(out, "killed")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for name, harm in DAMAGES.items():
        folder = out / "runs" / name / "seed0"
        shutil.copytree(out / "runs" / "baseline" / "seed0", folder)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("name: baseline", f"name: {name}"))
        harm(folder)
    return out


def compared(runs: Path, capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any], str]:
    """(exit code, comparison.json, what was printed in one line)."""
    capfd.readouterr()
    out = runs / "compared"
    words = [f"runs=[{runs / 'runs'}]", f"out={out}", "html=false", *(more or ["baseline=baseline"])]
    code = cli.main(["compare", *words])
    return code, json.loads((out / "comparison.json").read_text()), " ".join(capfd.readouterr().out.split())


LEFT_OUT = " seed 0 is in no average: "


@pytest.mark.parametrize(
    ("name", "verdict", "says"),
    [
        ("baseline", "healthy", f"{STEPS} steps without an alarm, validation loss 2."),
        ("diverged", "diverged", "did not come back; look at lm_head.weight/exp_avg_sq first: 9"),
        ("not_finite", "diverged", f"the loss of step {BAD} is nan; the first gradient that is not finite is that of token_emb"),
        ("interrupted", "incomplete", f"interrupted at step {BAD}: stopped by SIGTERM after step {BAD}"),
        ("killed", "incomplete", f"no verdict after step {BAD - 1} of {STEPS}: killed, or still running; until there nothing"),
        ("cut_metrics", "failed", f"it completed {STEPS} steps, and metrics.jsonl has 20 rows up to step 20"),
        ("cut_windows", "failed", "window_losses.npy was cut or altered"),
        ("cut_summary", "failed", "summary.json is no JSON: it was cut or altered"),
        ("cut_instruments", "healthy", f"{STEPS} steps without an alarm"),
    ],
)  # fmt: skip
def test_each_run_says_what_is_wrong_with_it(
    runs: Path, capfd: pytest.CaptureFixture[str], name: str, verdict: str, says: str
) -> None:
    code, found, said = compared(runs, capfd)
    assert code == 0
    (arm,) = [arm for arm in found["arms"] if arm["label"] == name]
    run = arm["runs"]["0"]
    assert run["verdict"] == verdict
    assert says in run["sentence"]
    assert f"{name} seed 0: {verdict}: " in said
    if verdict == "healthy":
        return
    assert arm["val_loss"] is None
    assert arm["gap_nats"]["by_seed"] == {}
    assert (f"{name}{LEFT_OUT}" in said) is (name not in ("cut_windows", "cut_summary"))


def test_what_became_of_the_others_is_noted(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, found, said = compared(runs, capfd)
    assert (
        f"empty_config{os.sep}seed0: its files are not those of a run (ValueError: config.yaml holds no"
        in said
    )
    (cut,) = [arm for arm in found["arms"] if arm["label"] == "cut_instruments"]
    assert "instruments.jsonl ends in the middle of a row" in " ".join(cut["runs"]["0"]["notes"])
    assert cut["gap_nats"]["mean"] == 0
    (bad,) = [arm for arm in found["arms"] if arm["label"] == "not_finite"]
    assert f"alert stability/non_finite while it trained, at step {BAD}" in " ".join(
        bad["runs"]["0"]["notes"]
    )


def test_a_gate_passes_none_of_them(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, found, _ = compared(runs, capfd, "baseline=baseline", "gate.verdicts=[healthy]")
    assert code == 1
    failures = "\n".join(found["gate_failures"])
    for name in (
        "diverged",
        "not_finite",
        "interrupted",
        "killed",
        "cut_metrics",
        "cut_windows",
        "cut_summary",
        "empty_config",
    ):
        assert name in failures
    assert "cut_instruments" not in failures


def test_a_diverged_baseline_leaves_no_gap(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, found, said = compared(runs, capfd, "baseline=diverged", "gate.max_loss_gap_fraction=0.01")
    assert code == 1
    assert all(arm["gap_nats"] is None or arm["gap_nats"]["mean"] is None for arm in found["arms"])
    assert "the baseline diverged has no run that completed without diverging: there are no gaps" in said
