"""Runs under a real SLURM of two nodes (``slurm_daemons``), started as users start them: the command line and scripts/slurm.

Signals are SLURM's own. Where one has to meet a run in the middle, the run is halted (SIGSTOP) once it has trained some steps: SLURM
sends SIGCONT before SIGTERM, and the test sends it where SLURM does not.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from same_run import assert_same
from slurm_daemons import Slurm, until

from qtrain.training.callbacks.metrics_jsonl import METRICS
from qtrain.training.run_folder import read_lines

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
STEPS = 60
TINY = [
    "data=text", "data.source.paths=[corpus]", "data.folder=shards", "data.val_fraction=0.3", "model=gpt_1m", "model.layers=1",
    "model.width=32", "model.heads=2", "sequence_tokens=32", "batch_sequences=2", f"steps={STEPS}", "eval_every_steps=30",
    "checkpoint_every_steps=20", "eval_windows=2", "sample.max_new_tokens=1", "schedule=constant", "schedule.warmup_steps=1",
    "compile=false", "device=cpu",
]  # fmt: skip
ONE = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--time=10"]
# Both nodes whole: whatever runs in main has to go
URGENT = "#!/bin/bash\n#SBATCH -p high --nodes=2 --ntasks-per-node=1 --cpus-per-task=4 --time=2 -o urgent.log\nsleep 1\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, a batch script of high priority, and the undisturbed run ``calm``."""
    root = tmp_path_factory.mktemp("slurm")
    (root / "corpus").mkdir()
    for i in range(40):
        (root / "corpus" / f"{i}.txt").write_text(
            f"document {i}: " + f"the cat of number {i * 7919} sleeps. " * 20
        )
    (root / "urgent.sbatch").write_text(URGENT)
    done = qtrain(root, os.environ, "run=calm", "w=int4_row", "seed=1")
    assert done.returncode == 0, done.stdout
    return root


def qtrain(place: Path, environment: Mapping[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """``qtrain train`` here -> what it printed, standard error among it."""
    command = [sys.executable, "-m", "qtrain.cli", "train", *TINY, "logger=none", *words]
    env = {**environment, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{environment.get('PYTHONPATH', '')}"}
    return subprocess.run(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_folder(place: Path, run: str) -> Path:
    return place / "outputs" / "train" / run


def steps_of(folder: Path) -> int:
    path = folder / METRICS
    return max((int(row["step"]) for row in read_lines(path)), default=0) if path.is_file() else 0


def attempts(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "attempts.jsonl")


def verdict(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verdict.json").read_text())


def halt(*folders: Path, step: int = 5) -> list[int]:
    """Stops the processes of runs in the middle of their steps, each as soon as it is there, until they get SIGCONT; by their
    pids, since SLURM would remember that a job was stopped. Returns the pids."""
    pids: dict[Path, int] = {}

    def there() -> bool:
        for folder in folders:
            if folder not in pids and steps_of(folder) >= step:
                pids[folder] = attempts(folder)[-1]["pid"]
                os.kill(pids[folder], signal.SIGSTOP)
                assert steps_of(folder) < STEPS, "the run was over before it could be halted"
        return len(pids) == len(folders)

    until(there, f"step {step} of {', '.join(map(str, folders))}")
    return [pids[folder] for folder in folders]


def signalled(pid: int, signum: int) -> bool:
    """Whether a halted process has a signal waiting (proc(5), ShdPnd), or has ended."""
    try:
        mask = re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return True
    return mask is not None and bool(int(mask[1], 16) >> (signum - 1) & 1)


def submit(cluster: Slurm, place: Path, run: str, *options: str) -> str:
    """``calm`` again, as a job of its own. options: of sbatch."""
    words = [*TINY, f"run={run}", "w=int4_row", "seed=1", "logger=wandb", "logger.mode=offline"]
    return cluster.sbatch(
        f"--output={run}.log", *ONE, *options, str(SCRIPTS / "one_node.sbatch"), *words, cwd=place
    )


def test_a_run_over_two_nodes_is_that_of_one(cluster: Slurm, place: Path) -> None:
    shape = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--output=two.log"]
    job = cluster.sbatch(
        *shape, str(SCRIPTS / "many_nodes.sbatch"), "run=two_nodes", *TINY, "logger=none", cwd=place
    )
    here = qtrain(place, os.environ, "run=two_processes", "trainer=ddp", "trainer.devices=2")
    assert here.returncode == 0, here.stdout
    cluster.wait(job, "COMPLETED")
    assert [a["slurm"]["nodes"] for a in attempts(run_folder(place, "two_nodes"))] == ["n[0-1]"]
    assert_same(run_folder(place, "two_nodes"), run_folder(place, "two_processes"))


def test_a_preempted_sweep_ends_as_if_nothing_had_happened(cluster: Slurm, place: Path) -> None:
    """Two arms as an array, by the command line; both are halted, preempted, requeued and go on."""
    words = ["-m", "hydra/launcher=slurm", "w=int4_row,int8_row", "seed=1", "hydra.launcher.poll_seconds=0.5"]
    environment = dict(cluster.environment)
    command = [
        sys.executable,
        "-m",
        "qtrain.cli",
        "train",
        *TINY,
        "logger=none",
        *words,
        "hydra.launcher.partition=main",
    ]
    with (place / "sweep.log").open("w") as log:
        waiting = subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        until(lambda: bool(list(place.glob("multirun/*/*/sweep.json"))), "the submission")
        (path,) = place.glob("multirun/*/*/sweep.json")
        sweep = json.loads(path.read_text())
        assert [arm["job"] for arm in sweep["arms"]] == [f"{sweep['job']}_0", f"{sweep['job']}_1"]
        assert [arm["overrides"][-2:] for arm in sweep["arms"]] == [
            ["resume=auto", f"run={Path(arm['folder']).name}"] for arm in sweep["arms"]
        ]
        folders = [place / arm["folder"] for arm in sweep["arms"]]
        halt(*folders)
        cluster.wait(cluster.sbatch("urgent.sbatch", cwd=place), "COMPLETED")
        assert waiting.wait(600) == 0, (place / "sweep.log").read_text()
    finally:
        waiting.kill()
    for arm, folder in zip(sweep["arms"], folders, strict=True):
        job = cluster.job(arm["job"])
        assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "1", "0:0")
        first, second = attempts(folder)
        assert (first["step"], second["run_id"]) == (0, first["run_id"])
        assert 5 <= second["step"] < STEPS
        assert second["slurm"] == {**first["slurm"], "restarts": 1, "nodes": second["slurm"]["nodes"]}
        log = Path(arm["log"]).read_text()  # of both attempts
        assert re.search(r"SIGTERM: stopping after this step.*goes on after step", log, re.DOTALL), log
    assert_same(folders[0], run_folder(place, "calm"))
    shown = (place / "sweep.log").read_text()
    for word in ("RUNNING", "PENDING", "COMPLETED  w=int8_row"):
        assert word in shown
    assert [line for line in shown.splitlines() if "seed=" in line] == []  # what all arms share is not said


def test_near_its_time_limit_a_job_requeues_itself_and_completes(cluster: Slurm, place: Path) -> None:
    folder = run_folder(place, "limited")
    job = submit(cluster, place, "limited", "--signal=USR1@70")
    (pid,) = halt(folder)
    # Ninety seconds are left: SLURM's next look, within thirty, finds the last seventy near
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+90")
    until(lambda: signalled(pid, signal.SIGUSR1), "SLURM's signal", 90)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    until(lambda: cluster.job(job).get("Restarts") == "1", "the requeue")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    cluster.wait(job, "COMPLETED")
    assert [a["previous"] is None for a in attempts(folder)] == [True, False]
    assert "SIGUSR1" in attempts(folder)[1]["previous"]
    assert len({a["run_id"] for a in attempts(folder)}) == 1
    segments = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert [s.stem for s in segments] == [f"run-{attempts(folder)[0]['run_id']}"] * 2  # one curve for W&B
    assert "is requeued: attempt 1 was stopped by a signal" in (place / "limited.log").read_text()
    assert_same(folder, run_folder(place, "calm"))


def test_a_run_whose_node_fails_goes_on_from_its_checkpoint_on_another(cluster: Slurm, place: Path) -> None:
    folder = run_folder(place, "orphan")
    job = submit(cluster, place, "orphan")
    halt(folder, step=25)
    node = cluster.job(job)["NodeList"]
    cluster.lose_node(node, job)
    try:
        done = cluster.wait(job, "COMPLETED")
    finally:
        cluster.start_node(node)
        cluster.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert (done["Restarts"], done["NodeList"]) == ("1", {"n0": "n1", "n1": "n0"}[node])
    assert [(a["step"], a["previous"], a["slurm"]["nodes"]) for a in attempts(folder)] == [
        (0, None, node), (20, None, done["NodeList"])
    ]  # fmt: skip
    assert_same(folder, run_folder(place, "calm"))


def test_a_cancelled_job_has_saved_and_is_not_requeued(cluster: Slurm, place: Path) -> None:
    """Every process of it gets SIGTERM, W&B's as well, which dies of that while the run still has a step to write."""
    folder = run_folder(place, "cancelled")
    job = submit(cluster, place, "cancelled")
    halt(folder)
    cluster.run("scancel", job)
    until(lambda: (folder / "verdict.json").exists(), "the verdict")
    assert cluster.wait(job, "CANCELLED")["Restarts"] == "0"
    assert verdict(folder)["outcome"] == "interrupted"
    assert steps_of(folder) >= verdict(folder)["step"] >= 5
    again = qtrain(place, os.environ, "run=cancelled", "w=int4_row", "seed=1", "resume=auto")
    assert again.returncode == 0, again.stdout
    assert_same(folder, run_folder(place, "calm"))


def test_a_job_killed_by_its_time_limit_is_not_requeued(cluster: Slurm, place: Path) -> None:
    """Without a signal ahead of it: --signal of the script comes with the end."""
    folder = run_folder(place, "late")
    job = submit(cluster, place, "late", "--signal=USR1@1")
    halt(folder, step=25)
    cluster.run("scontrol", "update", f"JobId={job}", "EndTime=now+1")
    assert cluster.wait(job, "TIMEOUT")["Restarts"] == "0"
    assert attempts(folder)[0]["slurm"]["job"] == job
    assert sorted(p.name for p in (folder / "checkpoints").iterdir())[0] == "step-000020"
