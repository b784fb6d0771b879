"""Checkpoint files appear whole, and only so many of them."""

from __future__ import annotations

import pytest
import torch

from qtrain.training.callbacks.checkpoint import AtomicCheckpointIO, Checkpoints


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"x": torch.ones(3)}, path)
    save = torch.save

    def dies(value, file):
        save(value, file)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="disk full"):
        AtomicCheckpointIO().save_checkpoint({"x": torch.zeros(3)}, path)
    assert torch.load(path, weights_only=True)["x"].tolist() == [1, 1, 1]


def test_keep_is_checked():
    with pytest.raises(ValueError, match="1 or more"):
        Checkpoints(every_steps=5, keep=0)
