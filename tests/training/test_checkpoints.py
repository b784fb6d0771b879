"""Checkpoints on disk: whole or refused by name."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from qtrain.training.checkpoints import (
    MANIFEST,
    TRAINING,
    WEIGHTS,
    CheckpointError,
    checkpoints_in,
    load_checkpoint,
    read_manifest,
    remove_checkpoint,
    remove_leftovers,
    verified,
    verify,
    write_checkpoint,
)


def state(seed: int) -> dict:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 5, generator=draw)
    return {
        "state_dict": {"a": weight, "tied": weight, "half": weight.to(torch.bfloat16)},
        "optimizer_states": [
            {"state": {0: {"codes": (weight > 0).to(torch.uint8), "step": torch.tensor(3.0)}}}
        ],
        "qtrain": {"step": seed, "name": "x", "none": None, "list": [1, 2.5, float("nan")]},
    }


def write(folder, step: int):
    return write_checkpoint(folder, state(step), step=step, tokens=step * 10)


def newest_good(folder):
    refused = []
    for path, problem in verified(folder):
        if problem is None:
            return path, refused
        refused.append(problem)
    return None, refused


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, 12)
    assert path == tmp_path / "step-000012"
    assert sorted(p.name for p in path.iterdir()) == [MANIFEST, TRAINING, WEIGHTS]
    assert [p.name for p in tmp_path.iterdir()] == ["step-000012"]
    manifest = verify(path)
    assert (manifest.step, manifest.tokens) == (12, 120)
    loaded, wanted = load_checkpoint(path), state(12)
    for name, tensor in wanted["state_dict"].items():
        assert loaded["state_dict"][name].dtype == tensor.dtype
        assert torch.equal(loaded["state_dict"][name], tensor)
    assert loaded["state_dict"]["a"].data_ptr() == loaded["state_dict"]["tied"].data_ptr()
    codes = loaded["optimizer_states"][0]["state"][0]["codes"]
    assert codes.dtype == torch.uint8
    assert torch.equal(codes, wanted["optimizer_states"][0]["state"][0]["codes"])
    assert str(loaded["qtrain"]) == str(wanted["qtrain"])


def test_equal_states_give_equal_bytes(tmp_path):
    a, b = write(tmp_path / "a", 3), write(tmp_path / "b", 3)
    for name in (MANIFEST, TRAINING, WEIGHTS):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_every_changed_byte_is_noticed(tmp_path):
    """A bit of each file at 60 places; each is refused, and the file that holds it is named."""
    path, draw = write(tmp_path, 5), random.Random(0)
    for name in (MANIFEST, TRAINING, WEIGHTS):
        good = (path / name).read_bytes()
        for _ in range(60):
            place, bit = draw.randrange(len(good)), 1 << draw.randrange(8)
            (path / name).write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            with pytest.raises(CheckpointError, match=r"step-000005"):
                verify(path)
        (path / name).write_bytes(good)
    verify(path)


@pytest.mark.parametrize("name", [MANIFEST, TRAINING, WEIGHTS])
def test_cut_and_missing_files_are_refused_by_name(tmp_path, name):
    path = write(tmp_path, 5)
    good = (path / name).read_bytes()
    for length in (0, 1, len(good) // 2, len(good) - 1):
        (path / name).write_bytes(good[:length])
        if (name, length) == (MANIFEST, len(good) - 1):
            continue  # its last newline says nothing
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def test_longer_files_are_refused(tmp_path):
    path = write(tmp_path, 5)
    with (path / WEIGHTS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r"weights.pt is \d+ bytes long"):
        verify(path)


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "a.ckpt").write_bytes(b"PK")
    (tmp_path / "step-000001").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "step-000001" / "weights.pt")
    with pytest.raises(CheckpointError, match=r"a.ckpt is a file, and a checkpoint is a folder"):
        verify(tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"no checkpoint of qtrain: it holds no manifest.json"):
        verify(tmp_path / "step-000001")
    with pytest.raises(CheckpointError, match="does not exist"):
        verify(tmp_path / "nothing")
    for text in ("[]", "{}", '{"format_version": 1}', "null"):
        (tmp_path / "step-000001" / MANIFEST).write_text(text)
        with pytest.raises(CheckpointError, match="is cut or no manifest"):
            verify(tmp_path / "step-000001")


def test_parts_of_two_checkpoints_do_not_mix(tmp_path):
    a, b = write(tmp_path, 5), write(tmp_path, 6)
    shutil.copy(a / WEIGHTS, b / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"weights\.pt"):
        verify(b)


def test_other_versions_and_renamed_checkpoints_are_refused(tmp_path):
    path = write(tmp_path, 5)
    renamed = path.rename(tmp_path / "step-000009")
    with pytest.raises(CheckpointError, match="is that of step 5: it was renamed"):
        read_manifest(renamed)
    moved = renamed.rename(tmp_path / "mine")  # a name that claims nothing is the user's
    assert read_manifest(moved).step == 5
    raw = json.loads((moved / MANIFEST).read_text())
    (moved / MANIFEST).write_text(json.dumps({**raw, "format_version": 2}))
    with pytest.raises(CheckpointError, match="format version 2, this code reads 1"):
        read_manifest(moved)


class Malice:
    def __reduce__(self):
        return (os.mkdir, ("malice",))


def test_a_checkpoint_runs_no_code(tmp_path, monkeypatch):
    """One whose sums are right, from a stranger."""
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tmp_path, {**state(1), "callbacks": Malice()}, step=1, tokens=1)
    verify(path)
    with pytest.raises(CheckpointError, match=r"training\.pt holds more than plain containers"):
        load_checkpoint(path)
    assert not (tmp_path / "malice").exists()


def test_the_newest_whole_one_is_found_whatever_the_clock_says(tmp_path):
    for step in (5, 10, 100, 20):
        write(tmp_path, step)
    os.utime(tmp_path / "step-000005", (4e9, 4e9))
    os.utime(tmp_path / "step-000100", (0, 0))
    assert [p.name for p in checkpoints_in(tmp_path)] == [f"step-{n:06d}" for n in (100, 20, 10, 5)]
    assert newest_good(tmp_path) == (tmp_path / "step-000100", [])
    (tmp_path / "step-000100" / WEIGHTS).write_bytes(b"")
    (tmp_path / "step-000020" / MANIFEST).unlink()
    found, refused = newest_good(tmp_path)
    assert found == tmp_path / "step-000010"
    assert [("step-000100" in refused[0]), ("step-000020" in refused[1])] == [True, True]
    shutil.rmtree(tmp_path / "step-000010")
    shutil.rmtree(tmp_path / "step-000005")
    assert newest_good(tmp_path)[0] is None
    assert newest_good(tmp_path / "nowhere") == (None, [])


def test_a_step_is_replaced_whole(tmp_path):
    path = write(tmp_path, 5)
    (path / WEIGHTS).write_bytes(b"bad")
    write(tmp_path, 5)
    verify(path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    """The device fails at each of its writes in turn."""
    import errno

    from qtrain.training import checkpoints

    write(tmp_path, 5)
    before = (tmp_path / "step-000005" / WEIGHTS).read_bytes()
    failures = 0
    for allowed in range(1000):
        calls = [0]

        def maybe_full(file, data, calls=calls, allowed=allowed):
            calls[0] += 1
            if calls[0] > allowed:
                raise OSError(errno.ENOSPC, "No space left on device")
            return file.write(data)

        hashed = checkpoints._Hashed.__init__

        def over_disk(self, file, hashed=hashed, maybe_full=maybe_full):
            hashed(self, SimpleNamespace(write=lambda data: maybe_full(file, data), flush=file.flush))

        monkeypatch.setattr(checkpoints._Hashed, "__init__", over_disk)
        try:
            write_checkpoint(tmp_path, state(6), step=6, tokens=60)
        except OSError:
            failures += 1
            assert [p.name for p in tmp_path.iterdir()] == ["step-000005"]
            assert (tmp_path / "step-000005" / WEIGHTS).read_bytes() == before
            monkeypatch.undo()
        else:
            break
    assert failures >= 10
    verify(tmp_path / "step-000006")


def test_a_removal_that_is_killed_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    """After any number of the files that it removes."""
    for done in range(3):
        first, second = write(tmp_path, 3), write(tmp_path, 6)
        unlink, calls = os.unlink, []

        def killed(path, *args, unlink=unlink, calls=calls, done=done, **kwargs):
            calls.append(path)
            if len(calls) > done:
                raise KeyboardInterrupt
            unlink(path, *args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(os, "unlink", killed)
            with pytest.raises(KeyboardInterrupt):
                remove_checkpoint(first)
        assert checkpoints_in(tmp_path) == [second]
        assert remove_leftovers(tmp_path) == [".step-000003.removed"]
        assert [p.name for p in tmp_path.iterdir()] == ["step-000006"]


def test_killed_writers_leave_whole_checkpoints_only(tmp_path):
    """kill -9 of a process that replaces two checkpoints over and over, at 40 random moments."""
    draw = random.Random(1)
    big = {**state(1), "more": torch.zeros(200_000)}
    for step in (1, 2):
        write_checkpoint(tmp_path, big, step=step, tokens=1)
    left = 0
    for _ in range(40):
        child = os.fork()
        if child == 0:
            while True:
                for step in (1, 2):
                    write_checkpoint(tmp_path, big, step=step, tokens=1)
        time.sleep(draw.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left += len(remove_leftovers(tmp_path))
        assert newest_good(tmp_path) == (tmp_path / "step-000002", [])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000002"]
        verify(tmp_path / "step-000001")
    assert left >= 1  # else nothing was interrupted; how many depends on the disk
