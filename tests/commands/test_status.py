"""qtrain status on runs that were really trained here: done, diverged, interrupted, killed, crashed, and training right now."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qtrain import cli
from qtrain.cluster.sweep_file import write_local_sweep
from qtrain.training.module import QuantizedTransformer
from qtrain.training.run_folder import is_trained

STEPS, BAD = 40, 24


def words(out: Path, name: str, *more: str) -> list[str]:
    return [
        "data=text", f"data.source.paths=[{out / 'corpus'}]", f"data.folder={out / 'shards'}", "data.val_fraction=0.3",
        "model=gpt_1m", "model.layers=1", "model.width=32", "model.heads=2", "sequence_tokens=32", "batch_sequences=2",
        f"steps={STEPS}", "eval_every_steps=10", "eval_windows=4", "schedule.warmup_steps=1", "logger=none", "compile=false",
        "device=cpu", "precision=fp32", "recipe=none", "m1=none", "m2=none", "sample.max_new_tokens=2",
        "checkpoint_every_steps=10", "name=arms", f"run={name}", f"out={out / 'runs'}", *more,
    ]  # fmt: skip


def train(out: Path, name: str, *more: str) -> int:
    return cli.main(["train", *words(out, name, *more)])


def at_bad_step(patch: pytest.MonkeyPatch, act: Callable[[], float]) -> None:
    """act: what happens in the middle of step BAD; its result is a factor of the loss."""
    losses = QuantizedTransformer.token_losses

    def acting(self: QuantizedTransformer, batch: Any) -> Any:
        bad = self.training and self.trainer.global_step == BAD - 1
        return losses(self, batch) * (act() if bad else 1.0)

    patch.setattr(QuantizedTransformer, "token_losses", acting)


def signalled(signum: int) -> Callable[[], float]:
    def act() -> float:
        os.kill(os.getpid(), signum)
        return 1.0

    return act


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/arms/{done,diverged,not_finite,interrupted,killed}."""
    out = tmp_path_factory.mktemp("status")
    (out / "corpus").mkdir()
    for i in range(40):
        (out / "corpus" / f"{i}.txt").write_text(f"document {i}: " + f"dog {i} barks. " * 20)
    assert train(out, "done") == 0
    assert train(out, "diverged", "m2=int8_tensor", "optimizer.states.min_numel=1000", "seed=1") == 0
    with pytest.MonkeyPatch.context() as patch:
        at_bad_step(patch, lambda: math.nan)
        assert train(out, "not_finite", "seed=2") == 3
    with pytest.MonkeyPatch.context() as patch:
        at_bad_step(patch, signalled(signal.SIGTERM))
        assert train(out, "interrupted", "seed=3") == 75
    child = os.fork()
    if child == 0:
        at_bad_step(pytest.MonkeyPatch(), signalled(signal.SIGKILL))
        train(out, "killed", "seed=4")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return out


def status(capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    capfd.readouterr()
    code = cli.main(["status", *more])
    return code, capfd.readouterr().out


def by_run(capfd: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, dict[str, Any]]]:
    code, said = status(capfd, "json=-", *more)
    return code, {Path(run["folder"]).name: run for run in json.loads(said)["runs"]}


def test_each_run_stands_where_it_is(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, found = by_run(capfd, f"runs=[{out / 'runs'}]")
    assert code == 3
    assert {name: run["state"] for name, run in found.items()} == {
        "done": "completed", "diverged": "diverged", "not_finite": "diverged", "interrupted": "interrupted", "killed": "lost",
    }  # fmt: skip
    assert {name: run["step"] for name, run in found.items()} == {
        "done": STEPS, "diverged": STEPS, "not_finite": BAD - 1, "interrupted": BAD, "killed": BAD - 1,
    }  # fmt: skip
    assert {run["steps"] for run in found.values()} == {STEPS}
    assert (
        found["done"]["verdict"] == found["killed"]["verdict"] == found["interrupted"]["verdict"] == "healthy"
    )
    assert found["not_finite"]["verdict"] == "diverged"
    assert "lm_head.weight/exp_avg_sq" in found["diverged"]["sentence"]
    assert f"loss of step {BAD} is nan" in found["not_finite"]["sentence"]
    assert "stability/non_finite" in found["not_finite"]["alarms"]
    last = json.loads((out / "runs/arms/killed/metrics.jsonl").read_text().splitlines()[-1])
    assert found["killed"]["loss"] == last["loss"]
    summary = json.loads((out / "runs/arms/done/summary.json").read_text())
    assert found["done"]["val_loss"] == summary["val_loss"]


def test_the_next_command_is_the_one_that_goes_on(
    out: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is run, and completes the run."""
    place = tmp_path / "runs" / "arms"
    place.mkdir(parents=True)
    shutil.copytree(out / "runs/arms/killed", place / "killed")
    _, found = by_run(capfd, f"runs=[{tmp_path / 'runs'}]")
    command = found["killed"]["next"]
    assert command.startswith("qtrain train data=text ")
    assert command.endswith("name=arms run=killed resume=auto")
    command = command.replace(f"out={out / 'runs'}", f"out={tmp_path / 'runs'}")
    assert cli.main(shlex.split(command)[1:]) == 0
    code, found = by_run(capfd, f"runs=[{tmp_path / 'runs'}]")
    assert (code, found["killed"]["state"], found["killed"]["attempts"]) == (0, "completed", 2)
    assert found["killed"]["next"] is None


@pytest.fixture(scope="module")
def training(
    out: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A run that trains in a process of its own, beyond its first steps."""
    place = tmp_path_factory.mktemp("training")
    command = [sys.executable, "-m", "qtrain.cli", "train"]
    command += words(out, "now", "steps=1000000", f"out={place / 'runs'}", "checkpoint_every_steps=0")
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = place / "runs/arms/now/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.stat().st_size > 3000):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    yield place / "runs", process
    process.kill()
    process.wait()


def test_ctrl_c_ends_a_watch_cleanly(training: tuple[Path, subprocess.Popen[bytes]]) -> None:
    runs, _ = training
    command = [sys.executable, "-m", "qtrain.cli", "status", f"runs=[{runs}]", "watch=1"]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert watch.stdout is not None
    assert b"1 running" in watch.stdout.readline()
    watch.send_signal(signal.SIGINT)
    _, err = watch.communicate(timeout=60)
    assert (watch.returncode, err) == (0, b"")


def test_a_run_that_trains_right_now(
    training: tuple[Path, subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    runs, process = training
    assert is_trained(runs / "arms/now") is True
    code, found = by_run(capfd, f"runs=[{runs}]")
    now = found["now"]
    assert (code, now["state"], now["verdict"]) == (0, "running", "healthy")
    assert now["step"] >= 10
    # 10^6 steps of a millisecond or more, at the pace that it says itself
    assert now["seconds_left"] > 500
    assert now["seconds_left"] <= (1_000_000 - now["step"]) * now["seconds_a_step"]
    code, said = status(capfd, f"runs=[{runs}]")
    assert "1 run: 1 running; about" in said
    process.kill()
    process.wait()
    assert is_trained(runs / "arms/now") is False
    code, found = by_run(capfd, f"runs=[{runs}]")
    assert (code, found["now"]["state"], found["now"]["seconds_left"]) == (3, "lost", None)


def test_watch_ends_when_nothing_is_under_way(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, said = status(capfd, f"runs=[{out / 'runs/arms/done'}]", "watch=1")
    assert code == 0
    assert said.count("1 run: 1 completed") == 1


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_cuts_no_number(
    out: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, said = status(capfd, f"runs=[{out / 'runs'}]")
    lines = said.splitlines()
    assert lines[0] == "5 runs: 1 completed, 2 diverged, 1 interrupted, 1 lost"
    assert max(map(len, lines)) <= width
    table = lines[2:8]
    for cells in (f"{STEPS}/{STEPS}", f"{BAD}/{STEPS}", f"{BAD - 1}/{STEPS}", "completed", "interrupted"):
        assert any(cells in line for line in table), cells
    assert ("tokens/s" in table[0], "folder" in table[0]) == (width >= 118, width >= 150)
    assert any(line.startswith("m2=none seed=0") for line in table)
    assert any(line.startswith("m2=int8_tensor") for line in table)
    whole = " ".join(said.split())
    assert "lost after step 23: its process is gone without a word" in whole
    assert f"interrupted after step {BAD}: stopped by SIGTERM after step {BAD}" in whole
    assert "run=interrupted resume=auto" in whole


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["watch=0"], "watch=0: must be a number, 1 or more"),
        (["limit=0"], "limit=0: must be"),
        (["slurm_seconds=null"], "slurm_seconds=None: must be"),
        (["runs=[wandb:me/project]"], "status reads run folders, not W&B's server; qtrain compare"),
        (["multirun=last"], "no sweep was submitted from here"),
        (["multirun=nowhere"], "there is no sweep.json"),
        (["runs=[nowhere]"], "there is no nowhere"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    more: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/train/a").mkdir(parents=True)
    (tmp_path / "outputs/train/a/config.yaml").write_text("name: train\nseed: 0\nsteps: 2\n")
    assert cli.main(["status", *more]) == 2
    assert says in capfd.readouterr().err


def test_a_submitted_sweep_by_the_queue(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Arms that wait are rows; squeue's answer is one that it gave."""
    monkeypatch.chdir(tmp_path)
    answers = Path(__file__).parents[1] / "cluster/slurm_answers/accounts"
    (tmp_path / "bin").mkdir()
    for name in ("squeue", "sacct"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ncat {answers}/{name}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    shutil.copytree(out / "runs/arms/done", tmp_path / "outputs/arms/done")
    jobs = {"done": "21_0", "trains": "21_1", "waits": "21_3", "held": "8", "too_long": "18"}
    arms = [
        {"number": i, "job": job, "overrides": [f"w={name}"], "folder": f"outputs/arms/{name}", "log": str(tmp_path / f"{job}.out")}
        for i, (name, job) in enumerate(jobs.items())
    ]  # fmt: skip
    (tmp_path / "18.out").write_text(
        "slurmstepd-n0: error: *** JOB 18 ON n0 CANCELLED AT 2026-11-26T18:23:38 DUE TO TIME LIMIT ***\n"
    )
    folder = tmp_path / "multirun/2026-11-26/19-02-11"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(json.dumps({"command": "train", "arms": arms, "cwd": str(tmp_path)}))
    code, found = by_run(capfd, "multirun=last")
    assert code == 3
    assert {name: (run["state"], run["why"]) for name, run in found.items()} == {
        "done": ("completed", None), "trains": ("starting", None), "waits": ("queued", "JobArrayTaskLimit"),
        "held": ("queued", "JobHeldUser"), "too_long": ("failed", "its time limit of 1:00 was over"),
    }  # fmt: skip
    assert found["too_long"]["cause"]["kind"] == "time limit"
    assert found["too_long"]["next"].endswith("w=too_long name=arms run=too_long resume=auto")
    # Without multirun= the arms of the last sweep are shown too, but for those that left nothing
    broken = tmp_path / "multirun/2026-11-25/08-00-00"
    broken.mkdir(parents=True)
    (broken / "sweep.json").write_text("{")
    arms.append(
        {"number": 5, "job": "999", "overrides": ["w=gone"], "folder": "outputs/arms/gone", "log": None}
    )
    (folder / "sweep.json").write_text(json.dumps({"command": "train", "arms": arms, "cwd": str(tmp_path)}))
    code, said = status(capfd)
    assert code == 3
    assert "5 runs: 2 queued, 1 starting, 1 completed, 1 failed; no pace is known yet" in said
    said = " ".join(said.split())
    assert "1 arms of multirun/2026-11-26/19-02-11 have left nothing" in said
    assert "08-00-00/sweep.json does not hold a sweep" in said
    assert "JobHeldUser" in said


def test_a_local_sweep(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its arms are known before they begin, by their words; here the second is killed, and the third never begins."""
    monkeypatch.chdir(tmp_path)
    given = [
        w
        for w in words(out, "x", f"out={tmp_path / 'outputs'}", "steps=5")
        if not w.startswith(("run=", "steps=40"))
    ]
    child = os.fork()
    if child == 0:
        patch, losses = pytest.MonkeyPatch(), QuantizedTransformer.token_losses

        def acting(self: QuantizedTransformer, batch: Any) -> Any:
            if self.training and self.settings.seed == 7 and self.trainer.global_step == 3:
                cli.main(["status", f"json={tmp_path / 'meanwhile.json'}"])
                os.kill(os.getpid(), signal.SIGKILL)
            return losses(self, batch)

        patch.setattr(QuantizedTransformer, "token_losses", acting)
        patch.setattr("qtrain.cluster.sweep_file._named_so", lambda process: True)  # this process is pytest's
        cli.main(["train", "-m", *given, "seed=5,7,9"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (folder,) = (tmp_path / "multirun").glob("*/*")
    assert sorted(path.name for path in folder.iterdir()) == ["multirun.yaml", "sweep.json"]
    meanwhile = json.loads((tmp_path / "meanwhile.json").read_text())["runs"]
    assert [(run["label"], run["state"]) for run in meanwhile] == [
        ("seed=5", "completed"), ("seed=7", "running"), ("seed=9", "queued"),
    ]  # fmt: skip
    code, said = status(capfd, "multirun=last", "json=-")
    assert code == 3
    after = json.loads(said)["runs"]
    assert [run["state"] for run in after] == ["completed", "lost", "lost"]
    assert after[1]["next"].endswith(f"name=arms run={Path(after[1]['folder']).name} resume=auto")
    assert after[2]["next"].startswith("qtrain train data=text")
    assert "-m" not in after[1]["next"].split()


def test_a_sweep_of_which_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    place = Path("multirun/2026-11-26/19-00-35")
    write_local_sweep(place, "train", [["w=int8_row"], ["w=int4_row"]], [None, None])
    monkeypatch.setattr("qtrain.cluster.sweep_file._named_so", lambda process: False)
    assert cli.main(["status"]) == 0
    text = capfd.readouterr().out
    assert text.startswith("0 runs")
    assert "2 arms of" in text


def test_rows_beyond_the_limit_are_counted(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, said = status(capfd, f"runs=[{out / 'runs'}]", "limit=3")
    table = said[: said.index("and 1 ")]
    assert "and 1 completed, 1 lost (limit=null shows all)" in said
    assert "completed" not in table.split("\n", 2)[2]


def test_json_in_a_file_beside_the_table(
    out: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, said = status(capfd, f"runs=[{out / 'runs'}]", f"json={tmp_path / 'new' / 'status.json'}")
    assert "5 runs" in said
    assert json.loads((tmp_path / "new/status.json").read_text())["counts"]["diverged"] == 2
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["status.json"]
