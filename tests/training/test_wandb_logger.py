"""W&B: offline unless somebody is logged in, the right axes, and no key in any file."""

from __future__ import annotations

import os
import shutil
import signal

import pytest

from qtrain import interrupts
from qtrain.training.assembly import assemble
from qtrain.training.callbacks.metrics_jsonl import read_metrics
from qtrain.training.fit import train
from qtrain.training.run_folder import read_lines
from qtrain.training.wandb_logger import Segment, check_logger, logged_in, resolved_mode

from .wandb_records import read_run, records


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No key, no netrc, no mode in the environment."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def test_offline_without_a_login():
    assert not logged_in()
    assert resolved_mode("auto") == "offline"
    assert resolved_mode("online") == "online"


def test_a_key_or_an_entry_in_netrc_is_a_login(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine other.example login a password b\n")
    assert not logged_in()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    assert resolved_mode("auto") == "online"
    assert resolved_mode("offline") == "offline"
    (tmp_path / "netrc").write_text("machine api.forge.coreweave.com login user password 0123456789\n")
    assert resolved_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine.example")
    assert resolved_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine wandb.mine.example login user password 0123456789\n")
    assert resolved_mode("auto") == "online"
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    assert resolved_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolved_mode("auto") == "disabled"


def test_a_broken_netrc_is_named(tmp_path):
    (tmp_path / "netrc").write_text("nonsense here\n")
    with pytest.raises(ValueError, match=r"logger\.mode=offline"):
        logged_in()


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="wandb, none"):
        check_logger({"kind": "tensorboard"})


def test_an_offline_run(configure, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    config = configure(tmp_path, "logger=wandb", "logger.mode=offline", "steps=3", "run=one")
    verdict, folder = train(assemble(config))
    assert verdict.good
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert records(log)
    # The records are protobuf, in which strings stand as they are
    text = log.read_bytes()
    for expected in (b"train/loss", b"train/grad_norm", b"val/bits_per_byte", b"tokens", b"final/val_loss"):
        assert expected in text, expected
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    assert not [p for p in files if b"0123456789abcdef0123456789abcdef01234567" in p.read_bytes()]


def test_it_says_nothing_of_itself_unless_told_to(configure, tmp_path, monkeypatch):
    """Its reports go over the network, whatever the mode."""
    for said, kept in ((None, "false"), ("true", "true")):
        monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
        if said is not None:
            monkeypatch.setenv("WANDB_ERROR_REPORTING", said)
        config = configure(tmp_path, "logger=wandb", "logger.mode=offline", "steps=1", f"run={kept}")
        assert train(assemble(config))[0].good
        assert os.environ["WANDB_ERROR_REPORTING"] == kept


def test_a_resumed_run_is_one_curve(configure, tmp_path):
    """Its segments have one id, steps of their own, and the same values where they overlap."""
    more = [
        "logger=wandb",
        "logger.mode=offline",
        "run=one",
        "resume=auto",
        "checkpoint_every_steps=2",
        "~callbacks.census",
    ]
    _, folder = train(assemble(configure(tmp_path, *more, "steps=5")))
    shutil.rmtree(folder / "checkpoints" / "step-000005")  # as if it had died after the step
    (folder / "verdict.json").unlink()
    verdict, _ = train(assemble(configure(tmp_path, *more, "steps=7")))
    assert verdict.good
    first, second = (
        read_run(log) for log in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=os.path.getmtime)
    )
    assert first[0] == second[0] == read_lines(folder / "attempts.jsonl")[0]["run_id"]
    losses = [{r["_step"]: r["train/loss"] for r in rows if "train/loss" in r} for _, rows in (first, second)]
    assert [sorted(found) for found in losses] == [[1, 2, 3, 4, 5], [5, 6, 7]]
    assert losses[0][5] == losses[1][5]
    curve = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert {r["step"]: r["loss"] for r in curve} == {**losses[0], **losses[1]}
    tokens = {r["_step"]: r["tokens"] for r in second[1] if "train/loss" in r}
    assert tokens == {step: step * 4 * 32 for step in (5, 6, 7)}


class Gone:
    """A run whose process has died."""

    def __init__(self):
        self.logged = 0

    def log(self, values, step):
        self.logged += 1
        raise ConnectionResetError("Connection lost")

    def finish(self):
        raise ConnectionResetError("Connection lost")


def test_w_b_may_die_of_the_job_s_signal_and_of_nothing_else(capsys):
    segment = Segment(Gone())
    with pytest.raises(ConnectionResetError):
        segment.log({"a": 1}, step=1)
    interrupts.defer()
    try:
        interrupts._receive(signal.SIGTERM, None)
        segment.log({"a": 1}, step=1)
        segment.log({"a": 1}, step=1)
    finally:
        interrupts.settle(raising=False)
    segment.finish()
    assert capsys.readouterr().err.count("metrics.jsonl alone") == 1
    assert segment.logged == 3
