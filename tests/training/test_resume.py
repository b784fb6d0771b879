"""A run goes on in its folder from what is whole, and is refused where that is another run's."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time

import pytest
import torch

from qtrain.training.assembly import assemble
from qtrain.training.callbacks.metrics_jsonl import read_metrics
from qtrain.training.checkpoints import WEIGHTS, checkpoints_in
from qtrain.training.fit import train
from qtrain.training.resume import StartRefused
from qtrain.training.run_folder import lock_run, read_lines
from qtrain.training.saved import read_checkpoint

from .same_run import assert_same, curve

SMALL = [
    "steps=6",
    "eval_every_steps=2",
    "checkpoint_every_steps=2",
    "callbacks.checkpoint.keep=null",
    "~callbacks.census",
]


@pytest.fixture(scope="module")
def whole(configure, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    verdict, folder = train(assemble(configure(out, *SMALL, "run=whole")))
    assert verdict.good
    return folder


def copied(whole, out, *, latest: int):
    """The run as it was when the checkpoint of step ``latest`` was its last, and it died one step on."""
    folder = out / "train" / "again"
    shutil.copytree(whole, folder)
    for path in checkpoints_in(folder / "checkpoints"):
        if int(path.name[5:]) > latest:
            shutil.rmtree(path)
    for name in ("verdict.json", "summary.json"):
        (folder / name).unlink()
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [r for r in rows if json.loads(r)["step"] <= latest + 1]
    (folder / "metrics.jsonl").write_text("".join(kept) + '{"kind": "train", "st')
    return folder


AGAIN = ["run=again", "resume=auto"]


@pytest.mark.parametrize("latest", [0, 2, 4, 6])
def test_a_run_goes_on_in_its_folder(whole, configure, tmp_path, latest):
    folder = copied(whole, tmp_path, latest=latest)
    before = len(read_lines(folder / "attempts.jsonl"))
    verdict, again = train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert verdict.good
    assert again == folder
    assert_same(whole, again)
    attempts = read_lines(folder / "attempts.jsonl")
    assert len(attempts) == before + 1
    assert attempts[-1]["step"] == latest
    assert json.loads((folder / "summary.json").read_text())["steps"] == 6
    seconds = [r["seconds"] for r in read_metrics(folder / "metrics.jsonl")]
    assert seconds == sorted(seconds)


def test_nothing_is_left_of_a_finished_run(whole, configure, tmp_path):
    folder = tmp_path / "train" / "again"
    shutil.copytree(whole, folder)
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    verdict, again = train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert verdict.good
    assert "before" in verdict.message
    assert files == {p: p.read_bytes() for p in again.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_finished_run_is_made_longer(whole, configure, tmp_path):
    shutil.copytree(whole, tmp_path / "train" / "again")
    verdict, again = train(assemble(configure(tmp_path, *SMALL, *AGAIN, "steps=8")))
    assert verdict.good
    _, longer = train(assemble(configure(tmp_path, *SMALL, "run=longer", "steps=8")))
    assert_same(longer, again)


def test_a_new_name_starts_anew(configure, tmp_path):
    verdict, folder = train(assemble(configure(tmp_path, *SMALL, *AGAIN, "steps=1")))
    assert verdict.good
    assert folder == tmp_path / "train" / "again"
    assert read_lines(folder / "attempts.jsonl")[0]["step"] == 0


def test_an_attempt_says_which_job_it_was(configure, tmp_path, monkeypatch):
    settings = [*SMALL, *AGAIN, "checkpoint_every_steps=1"]
    _, folder = train(assemble(configure(tmp_path, *settings, "steps=1")))
    job = {
        "JOB_ID": "123",
        "ARRAY_JOB_ID": "120",
        "ARRAY_TASK_ID": "3",
        "RESTART_COUNT": "1",
        "JOB_NODELIST": "n0",
    }
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    train(assemble(configure(tmp_path, *settings, "steps=2")))
    first, second = read_lines(folder / "attempts.jsonl")
    assert first["slurm"] is None
    assert second["slurm"] == {
        "job": "123", "array_job": "120", "array_task": 3, "restarts": 1, "nodes": "n0", "partition": None,
    }  # fmt: skip


def test_auto_needs_a_name(configure, tmp_path):
    with pytest.raises(ValueError, match=r"give it one, as in run=first"):
        assemble(configure(tmp_path, "resume=auto"))


def test_the_newest_whole_checkpoint_is_taken_and_the_others_named(whole, configure, tmp_path, capsys):
    folder = copied(whole, tmp_path, latest=6)
    place = folder / "checkpoints"
    with (place / "step-000006" / WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    (place / "step-000004" / "training.pt").unlink()
    verdict, again = train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert verdict.good
    assert_same(whole, again)
    said = capsys.readouterr().err
    assert "step-000006: weights.pt is 1000 bytes long" in said
    assert "step-000004: training.pt is missing" in said
    attempt = read_lines(folder / "attempts.jsonl")[-1]
    assert attempt["step"] == 2
    assert len(attempt["refused"]) == 2
    names = sorted(p.name for p in place.iterdir())
    assert names == ["refused-step-000004", "refused-step-000006", *(f"step-00000{n}" for n in (2, 4, 6))]


def test_a_checkpoint_of_another_run_is_refused_and_the_own_one_taken(whole, configure, tmp_path, capsys):
    folder = copied(whole, tmp_path, latest=2)
    _, other = train(assemble(configure(tmp_path, *SMALL, "run=other", "seed=5", "steps=4")))
    shutil.copytree(other / "checkpoints" / "step-000004", folder / "checkpoints" / "step-000004")
    verdict, again = train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert verdict.good
    assert_same(whole, again)
    assert "step-000004 is of another run (seed: 5 there, 0 here)" in capsys.readouterr().err
    assert (folder / "checkpoints" / "refused-step-000004").is_dir()


def test_with_no_whole_checkpoint_nothing_is_started_or_changed(whole, configure, tmp_path):
    folder = copied(whole, tmp_path, latest=4)
    for path in checkpoints_in(folder / "checkpoints"):
        (path / WEIGHTS).write_bytes(b"")
    files = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(StartRefused, match=r"no checkpoint to go on from: .*step-000004.*step-000002"):
        train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert files == {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def lines_of(folder):
    return (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows[0], b"\x00\xff\n", *rows[2:]], r"metrics.jsonl, line 2: no row of the metrics"),
        (lambda rows: [rows[0], b"[1]\n", *rows[2:]], r"metrics.jsonl, line 2: no row of the metrics"),
        (lambda rows: rows[1:], r"metrics.jsonl does not have one row for each of the steps 1 to 4"),
        (lambda rows: [rows[0], rows[0], *rows[1:]], r"does not have one row for each of the steps 1 to 4"),
        (lambda rows: rows[:3], r"does not have one row for each of the steps 1 to 4"),
    ],
    ids=["garbage", "no row", "first missing", "twice", "last missing"],
)
def test_altered_metrics_are_refused_before_anything_changes(whole, configure, tmp_path, change, message):
    folder = copied(whole, tmp_path, latest=6)
    (folder / "checkpoints" / "step-000006" / WEIGHTS).write_bytes(b"")  # would be set aside
    (folder / "metrics.jsonl").write_bytes(b"".join(change(lines_of(folder))))
    files = everything(folder)
    with pytest.raises(StartRefused, match=message):
        train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert files == everything(folder)


def test_lost_metrics_are_missed(whole, configure, tmp_path):
    folder = copied(whole, tmp_path, latest=4)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(StartRefused, match=r"metrics.jsonl, the curve of the steps until 4, is missing"):
        train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert len(read_lines(folder / "attempts.jsonl")) == 1


def test_a_finished_run_needs_no_metrics(whole, configure, tmp_path):
    folder = tmp_path / "train" / "again"
    shutil.copytree(whole, folder)
    (folder / "metrics.jsonl").unlink()
    verdict, _ = train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert "before" in verdict.message


def test_what_lost_power_left_at_the_end_of_the_metrics_is_dropped(whole, configure, tmp_path):
    """Blocks that were never written read as zeros."""
    folder = copied(whole, tmp_path, latest=4)
    text = (folder / "metrics.jsonl").read_bytes()
    kept = text.rfind(b"\n") + 1
    (folder / "metrics.jsonl").write_bytes(text[:kept] + b"\x00" * 300 + b"\n" + b"\xff" * 20)
    verdict, again = train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert verdict.good
    assert_same(whole, again)


def test_a_folder_that_began_later_needs_no_earlier_rows(whole, configure, tmp_path):
    """Continued from another run's checkpoint, then by resume=auto."""
    config = configure(
        tmp_path, *SMALL, "run=again", f"resume={whole / 'checkpoints' / 'step-000002'}", "steps=4"
    )
    assert train(assemble(config))[0].good
    verdict, again = train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert verdict.good
    assert_same(whole, again, after=2)
    assert curve(again)[0]["step"] == 3


def test_a_file_where_the_checkpoints_belong_is_refused(whole, configure, tmp_path):
    folder = copied(whole, tmp_path, latest=4)
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").touch()
    files = everything(folder)
    with pytest.raises(StartRefused, match=r"checkpoints is a file, where the folder of checkpoints belongs"):
        train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert files == everything(folder)


def test_an_attempt_says_by_which_words_it_was_started(configure, tmp_path, monkeypatch):
    monkeypatch.setenv("QTRAIN_STARTED_WITH", '["w=int8_row", "seed=0"]')
    _, folder = train(assemble(configure(tmp_path, *SMALL, *AGAIN, "steps=1")))
    monkeypatch.delenv("QTRAIN_STARTED_WITH")
    train(assemble(configure(tmp_path, *SMALL, *AGAIN, "steps=2")))
    assert [a["overrides"] for a in read_lines(folder / "attempts.jsonl")] == [["w=int8_row", "seed=0"], None]


@pytest.mark.parametrize("name", ["attempts.jsonl", "config.yaml"])
def test_a_full_disk_at_the_start_is_named(whole, configure, tmp_path, monkeypatch, name):
    from qtrain.training import resume

    folder = copied(whole, tmp_path, latest=4)

    def full(path, *_):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return written(path, *_)

    function = "append_line" if name == "attempts.jsonl" else "write_text"
    written = getattr(resume, function)
    with monkeypatch.context() as patch:
        patch.setattr(resume, function, full)
        with pytest.raises(StartRefused, match=rf"cannot be written: .*No space left.*{name}"):
            train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert train(assemble(configure(tmp_path, *SMALL, *AGAIN)))[0].good
    assert_same(whole, folder)


def test_one_process_a_run(whole, configure, tmp_path):
    folder = copied(whole, tmp_path, latest=4)
    with lock_run(folder), pytest.raises(ValueError, match=r"is being trained by process \d+ on "):
        train(assemble(configure(tmp_path, *SMALL, *AGAIN)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr: 0.003 there, 0.0001 here"),
        ("seed=3", "seed: 0 there, 3 here"),
        ("w=int4_row", r"recipe: .*allow_changed=\[recipe\]"),
        ("m2=dynamic4", "m2: dynamic8 there, dynamic4 here"),
        ("batch_sequences=8", "batch_sequences: 4 there, 8 here"),
        ("model.layers=2", "model.layers: 1 there, 2 here"),
        ("precision=fp32", "precision: bf16 there, fp32 here"),
    ],
)
def test_another_run_is_refused_in_place_too(whole, configure, tmp_path, change, message):
    folder = copied(whole, tmp_path, latest=4)
    with pytest.raises(ValueError, match=message):
        train(assemble(configure(tmp_path, *SMALL, *AGAIN, change)))
    assert len(read_lines(folder / "attempts.jsonl")) == 1
    assert curve(folder, 0)[-1]["step"] == 5


def test_another_spelling_is_the_same_recipe(whole, configure, tmp_path):
    copied(whole, tmp_path, latest=4)
    verdict, again = train(assemble(configure(tmp_path, *SMALL, *AGAIN, "w={format: int8}", "a=int8")))
    assert verdict.good
    assert_same(whole, again)


def test_a_changed_recipe_goes_on_when_asked_for(whole, configure, tmp_path):
    folder = copied(whole, tmp_path, latest=4)
    changed = ["w=int4_row", "allow_changed=[recipe]"]
    verdict, _ = train(assemble(configure(tmp_path, *SMALL, *AGAIN, *changed)))
    assert verdict.good
    plan = read_checkpoint(folder / "checkpoints" / "step-000006")["qtrain"]["plan"]
    assert {layer["fprop.weight"] for layer in plan["layers"].values()} == {"int4 row"}
    rows, old = curve(folder), curve(whole)
    assert [r["loss"] for r in rows if r["kind"] == "train"][:4] == [
        r["loss"] for r in old if r["kind"] == "train"
    ][:4]
    assert rows[-1] != old[-1]


def test_only_the_recipe_can_be_changed(configure, tmp_path):
    with pytest.raises(ValueError, match=r"allow_changed=\['optimizer'\]: a resumed run can change recipe"):
        assemble(configure(tmp_path, "allow_changed=[optimizer]"))


def test_a_checkpoint_says_what_the_run_was(whole):
    facts = read_checkpoint(whole / "checkpoints" / "step-000004")["qtrain"]
    assert (facts["step"], facts["tokens"], facts["next_sample"]) == (4, 4 * 4 * 32, 16)
    assert facts["random"] == {"seed": 0, "step": 4}
    assert facts["plan"]["compute"] == "simulated"
    assert facts["plan"]["layers"]["blocks.0.attn.o"]["fprop.weight"] == "int8 row"
    assert facts["versions"]["torch"] == torch.__version__
    assert len(facts["recipe_sha256"]) == 64


@pytest.mark.parametrize("micro", [1, 2])
def test_a_step_may_be_made_of_other_micro_batches(whole, configure, tmp_path, micro):
    """Saved when a step was one micro-batch; validations come at the same steps, and losses agree to the rounding of
    their sums."""
    folder = copied(whole, tmp_path, latest=4)
    verdict, _ = train(assemble(configure(tmp_path, *SMALL, *AGAIN, f"micro_batch_sequences={micro}")))
    assert verdict.good
    mine, theirs = curve(folder), curve(whole)
    assert [(r["kind"], r["step"]) for r in mine] == [(r["kind"], r["step"]) for r in theirs]
    for a, b in zip(mine, theirs, strict=True):
        key = "loss" if a["kind"] == "train" else "val_loss"
        assert a[key] == pytest.approx(b[key], rel=5e-3)  # bfloat16, and codes near a threshold


def test_clocks_that_jump_change_nothing(whole, configure, tmp_path, monkeypatch):
    """The time of day goes back and forth by years between any two looks at it."""
    now, looks = time.time, [0]

    def jumping():
        looks[0] += 1
        return now() + (-1) ** looks[0] * 1e8

    monkeypatch.setattr(time, "time", jumping)
    folder = copied(whole, tmp_path, latest=4)
    verdict, _ = train(assemble(configure(tmp_path, *SMALL, *AGAIN)))
    assert verdict.good
    assert_same(whole, folder)
    seconds = [r["seconds"] for r in read_metrics(folder / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert seconds[-1] < 1000
