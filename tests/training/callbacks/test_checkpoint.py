"""When checkpoints are written, which stay, and what a signal, a full disk or altered data do to a run."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import forked_run as forked
import pytest
import torch
from lightning.pytorch import Trainer

from qtrain.data.shards import ShardError, TokenShards
from qtrain.training import checkpoints, fit
from qtrain.training.assembly import assemble
from qtrain.training.callbacks.checkpoint import Checkpoints, CheckpointWriter
from qtrain.training.checkpoints import checkpoints_in, load_checkpoint, verify
from qtrain.training.fit import train
from qtrain.training.run_folder import create_run_folder

from ..same_run import assert_same, curve

TINY = ["steps=9", "eval_every_steps=4", "~callbacks.census"]


@pytest.fixture(scope="module")
def whole(configure, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    verdict, folder = train(assemble(configure(out, *TINY, "run=whole", "checkpoint_every_steps=2")))
    assert verdict.good
    return folder


def steps(folder):
    return [int(p.name[5:]) for p in checkpoints_in(folder / "checkpoints")]


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        (["checkpoint_every_steps=2"], [9, 8]),
        (["checkpoint_every_steps=2", "callbacks.checkpoint.keep=null"], [9, 8, 6, 4, 2]),
        (["checkpoint_every_steps=1", "callbacks.checkpoint.keep=1", "callbacks.checkpoint.keep_every_steps=3"], [9, 6, 3]),
        (["checkpoint_every_steps=0"], [9]),
    ],
)  # fmt: skip
def test_which_checkpoints_stay(configure, tmp_path, more, kept):
    verdict, folder = train(assemble(configure(tmp_path, *TINY, *more)))
    assert verdict.good
    assert steps(folder) == kept
    assert len(list((folder / "checkpoints").iterdir())) == len(kept)


@pytest.mark.parametrize("number", ["keep", "keep_every_steps"])
def test_numbers_are_checked(number):
    with pytest.raises(ValueError, match=rf"callbacks.checkpoint.{number}=0: must be 1 or more"):
        Checkpoints(every_steps=5, **{number: 0})


def test_writing_in_the_background_writes_the_same(whole, configure, tmp_path, monkeypatch):
    """Each write is held back until the next step has changed the weights in place."""
    write, threads = checkpoints.write_checkpoint, set()

    def late(*arguments, **named):
        threads.add(threading.current_thread().name)
        threading.Event().wait(0.1)
        return write(*arguments, **named)

    monkeypatch.setattr("qtrain.training.callbacks.checkpoint.write_checkpoint", late)
    more = ["run=background", "checkpoint_every_steps=2", "callbacks.checkpoint.asynchronous=true"]
    verdict, folder = train(assemble(configure(tmp_path, *TINY, *more)))
    assert verdict.good
    assert all(name.startswith("checkpoint") for name in threads)
    assert_same(whole, folder)
    assert steps(folder) == steps(whole)
    for step in steps(whole):
        a, b = (load_checkpoint(f / "checkpoints" / f"step-{step:06d}") for f in (whole, folder))
        assert all(torch.equal(t, b["state_dict"][name]) for name, t in a["state_dict"].items())
        for i, state in a["optimizer_states"][0]["state"].items():
            assert all(torch.equal(t, b["optimizer_states"][0]["state"][i][k]) for k, t in state.items())


def test_a_snapshot_shares_what_the_state_shares(tmp_path):
    writer = CheckpointWriter()
    writer.asynchronous = True
    weight = torch.ones(3, requires_grad=True)
    facts = {"step": 1, "tokens": 1}
    writer.save_checkpoint(
        {"state_dict": {"a": weight, "b": weight.detach()}, "qtrain": facts}, tmp_path / "step-000001"
    )
    with torch.no_grad():
        weight.zero_()
    writer.teardown()
    loaded = load_checkpoint(tmp_path / "step-000001")["state_dict"]
    assert loaded["a"].tolist() == [1, 1, 1]
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_by_name_and_it_goes_on(
    whole, configure, tmp_path, monkeypatch, asynchronous
):
    config = configure(tmp_path, *TINY, "run=full", "resume=auto", "checkpoint_every_steps=2",
                       f"callbacks.checkpoint.asynchronous={asynchronous}")  # fmt: skip
    write = checkpoints.write_checkpoint

    def fails_at_six(folder, checkpoint, *, step, tokens):
        return full() if step == 6 else write(folder, checkpoint, step=step, tokens=tokens)

    with monkeypatch.context() as patch:
        patch.setattr("qtrain.training.callbacks.checkpoint.write_checkpoint", fails_at_six)
        verdict, folder = train(assemble(config))
    assert verdict.outcome == "storage_failed"
    assert "No space left on device" in verdict.message
    assert "step-000004 is the latest checkpoint" in verdict.message
    assert "MB are free there" in verdict.message
    assert json.loads((folder / "verdict.json").read_text())["outcome"] == "storage_failed"
    assert steps(folder) == [4, 2]
    assert train(assemble(config))[0].good
    assert_same(whole, folder)


def test_metrics_on_a_full_disk(configure, tmp_path, monkeypatch):
    from qtrain.training.callbacks import metrics_jsonl

    config = configure(tmp_path, *TINY, "checkpoint_every_steps=2")
    rows = [0]

    def fifth_fails(row):
        rows[0] += 1
        return full() if rows[0] == 5 else row

    monkeypatch.setattr(metrics_jsonl, "jsonable", fifth_fails)
    verdict, folder = train(assemble(config))
    monkeypatch.undo()
    assert verdict.outcome == "storage_failed"
    assert "metrics.jsonl" in verdict.message
    assert len(curve(folder)) == 4


@pytest.mark.parametrize("name", ["sample.txt", "loss.png", "verdict.json"])
def test_a_full_disk_after_the_last_step(whole, configure, tmp_path, monkeypatch, capsys, name):
    """The report cannot be written: no completed run, and the next start writes it."""
    config = configure(tmp_path, *TINY, "run=late", "resume=auto", "checkpoint_every_steps=2")
    refused = (
        fit.write_json
        if name == "verdict.json"
        else fit.plot_losses
        if name == "loss.png"
        else fit.write_text
    )

    def unwilling(*arguments):
        if any(isinstance(a, Path) and a.name == name for a in arguments):
            return full()
        return refused(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fit, refused.__name__, unwilling)
        verdict, folder = train(assemble(config))
    assert verdict.outcome == "storage_failed"
    assert "No space left on device" in verdict.message
    assert "step-000009 is the latest checkpoint" in verdict.message
    assert ("verdict.json could not be written" in capsys.readouterr().err) == (name == "verdict.json")
    assert train(assemble(config))[0].good
    assert json.loads((folder / "verdict.json").read_text())["outcome"] == "completed"
    assert_same(whole, folder)


def test_an_error_of_the_program_is_no_full_disk(configure, tmp_path, monkeypatch):
    def mistaken(*_):
        raise FileNotFoundError(errno.ENOENT, "no such program", "g++")

    monkeypatch.setattr(fit, "sample_text", mistaken)
    with pytest.raises(FileNotFoundError):
        train(assemble(configure(tmp_path, *TINY, "steps=1")))


def test_tokens_altered_after_the_last_checkpoint(whole, configure, tmp_path, monkeypatch):
    """The last validation reads them; a run that it would complete is none."""
    config = configure(tmp_path, *TINY, "run=late", "resume=auto", "checkpoint_every_steps=2")
    validate = Trainer.validate

    def altered(self, module, data, **named):
        done = validate(self, module, data, **named)
        data.corpus.shards.val.files[0]._stamp = None
        data.corpus.shards.val.files[0].info = dataclasses.replace(
            data.corpus.shards.val.files[0].info, sha256="0" * 64
        )
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "validate", altered)
        verdict, folder = train(assemble(config))
    assert verdict.outcome == "data_changed"
    assert "val-00000.bin was altered" in verdict.message
    assert train(assemble(config))[0].good
    assert_same(whole, folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_that_the_kernel_refuses(whole, configure, tmp_path):
    """What stays in the file's buffer is refused once more when it is closed."""
    config = configure(tmp_path, *TINY, "run=full", "resume=auto", "checkpoint_every_steps=2")
    metrics = tmp_path / "train" / "full" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.symlink_to("/dev/full")
    verdict, folder = train(assemble(config))
    assert (verdict.outcome, verdict.step) == ("storage_failed", 1)
    assert "metrics.jsonl: [Errno 28] No space left on device" in verdict.message
    metrics.unlink()
    assert train(assemble(config))[0].good
    assert_same(whole, folder)


def test_the_kernel_refuses_the_file(whole, configure, tmp_path):
    """A real limit (RLIMIT_FSIZE) in a child that really trains; without the limit it goes on."""
    config = configure(tmp_path, *TINY, "run=limited", "resume=auto", "checkpoint_every_steps=2")
    folder, log = tmp_path / "train" / "limited", tmp_path / "log"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    assert forked.wait(forked.start(config, log, limit)) == 3, log.read_text()
    assert json.loads((folder / "verdict.json").read_text())["outcome"] == "storage_failed"
    assert "File too large" in log.read_text()
    assert steps(folder) == []
    assert not list((folder / "checkpoints").iterdir())
    assert forked.wait(forked.start(config, log)) == 0, log.read_text()
    assert_same(whole, folder)


def test_a_folder_that_cannot_be_written(configure, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out=.*file cannot be written: Not a directory"):
        train(assemble(configure(tmp_path / "file", *TINY)))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody without rights")
def test_a_folder_without_rights(tmp_path):
    """As a user to whom the folder does not belong."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            create_run_folder(tmp_path / "out", "name", None)
        except ValueError as error:
            os.write(writer, str(error).encode())
        os._exit(0)
    assert forked.wait(pid) == 0
    assert "cannot be written: Permission denied; choose another out=" in os.read(reader, 1000).decode()
    assert list(tmp_path.iterdir()) == []


SIGNALS = [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]


@pytest.mark.parametrize(("signum", "code"), SIGNALS, ids=[s.name for s, _ in SIGNALS])
def test_a_signal_saves_stops_and_the_run_goes_on(whole, configure, tmp_path, signum, code):
    config = configure(tmp_path, *TINY, "run=signalled", "resume=auto")
    folder, log = tmp_path / "train" / "signalled", tmp_path / "log"
    pid = forked.start(config, log)
    forked.wait_for(lambda: forked.rows(folder) >= 2, pid)
    os.kill(pid, signum)
    assert forked.wait(pid) == code, log.read_text()
    verdict = json.loads((folder / "verdict.json").read_text())
    assert (verdict["outcome"], verdict["signal"]) == ("interrupted", signum)
    assert steps(folder) == [verdict["step"]]
    assert curve(folder)[-1]["step"] == verdict["step"] < 9
    assert f"stopped by {signum.name} after step {verdict['step']}" in log.read_text()
    assert forked.wait(forked.start(config, log)) == 0, log.read_text()
    assert_same(whole, folder)


def test_a_second_ctrl_c_stops_at_once(whole, configure, tmp_path):
    config = configure(tmp_path, *TINY, "run=twice", "resume=auto", "checkpoint_every_steps=2")
    folder, log = tmp_path / "train" / "twice", tmp_path / "log"

    def slow():
        from qtrain.training.module import QuantizedTransformer

        losses = QuantizedTransformer.token_losses

        def slowly(self, batch):
            if self.training and self.trainer.global_step == 3:
                (tmp_path / "there").touch()
                threading.Event().wait(60)
            return losses(self, batch)

        QuantizedTransformer.token_losses = slowly

    pid = forked.start(config, log, slow)
    forked.wait_for((tmp_path / "there").exists, pid)
    os.kill(pid, signal.SIGINT)
    forked.wait_for(lambda: "once more stops at once" in log.read_text(), pid)
    os.kill(pid, signal.SIGINT)
    assert forked.wait(pid) == 130, log.read_text()
    assert steps(folder) == [2]
    assert "Traceback" not in log.read_text()
    assert forked.wait(forked.start(config, log)) == 0, log.read_text()
    assert_same(whole, folder)


def test_a_signal_before_the_first_step_saves_nothing(configure, tmp_path):
    config = configure(tmp_path, *TINY, "run=early", "resume=auto")

    def early():
        os.kill(os.getpid(), signal.SIGTERM)

    assert forked.wait(forked.start(config, tmp_path / "log", early)) == 75
    assert not (tmp_path / "train").exists()


def test_altered_data_end_the_run_before_a_checkpoint_says_otherwise(whole, configure, tmp_path, monkeypatch):
    looks = [0]

    def third(self):
        looks[0] += 1
        if looks[0] == 3:
            raise ShardError("shard x was altered")

    monkeypatch.setattr(TokenShards, "check_unchanged", third)
    verdict, folder = train(assemble(configure(tmp_path, *TINY, "checkpoint_every_steps=2")))
    assert (verdict.outcome, verdict.step) == ("data_changed", 6)
    assert steps(folder) == [4, 2]
    verify(folder / "checkpoints" / "step-000004")


def test_many_kills_lose_no_more_than_the_steps_since_the_last_checkpoint(whole, configure, tmp_path):
    """kill -9 at 50 random moments, restarts included; the run ends as the undisturbed one."""
    import random

    draw = random.Random(7)
    more = ["resume=auto", "checkpoint_every_steps=2"]
    log, kills, run, resumed = tmp_path / "log", 0, 0, 0
    begun = time.monotonic()
    assert forked.wait(forked.start(configure(tmp_path, *TINY, "run=undisturbed", *more), log)) == 0
    whole_run = time.monotonic() - begun  # on this machine, now
    while kills < 50:
        config = configure(tmp_path, *TINY, f"run={run}", *more)
        folder = tmp_path / "train" / str(run)
        pid = forked.start(config, log)
        threading.Event().wait(draw.uniform(0.0, whole_run))
        before = steps(folder) if folder.is_dir() else []
        os.kill(pid, signal.SIGKILL)
        if forked.wait(pid) == 0:
            assert_same(whole, folder)
            run += 1
            continue
        kills += 1
        resumed += bool(before)
        # What was complete before the kill is complete after it
        assert set(before[:1]) <= set(steps(folder)) if folder.is_dir() else not before
    assert forked.wait(forked.start(configure(tmp_path, *TINY, f"run={run}", *more), log)) == 0
    for number in range(run + 1):
        folder = tmp_path / "train" / str(number)
        assert_same(whole, folder)
        attempts = checkpoints_of_attempts(folder)
        assert all(b - a <= 9 for a, b in itertools.pairwise(attempts))
        shutil.rmtree(folder)
    assert resumed >= 5  # else nothing was there to lose


def checkpoints_of_attempts(folder) -> list[int]:
    """From which step each start of the run went on; never back."""
    steps = [json.loads(line)["step"] for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    return steps
