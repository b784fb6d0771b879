from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from qtrain.data.checked_file import CheckedFile
from qtrain.data.shard_windows import ShardWindows
from qtrain.data.shard_writer import write_shards
from qtrain.data.shards import TokenShards
from qtrain.data.stream import GlobalBatchSampler
from qtrain.data.tokenizers import ByteTokenizer

S = 8


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """1,037 tokens in shards of 100; the last has 37. Every token is the number of its place, modulo 256."""
    directory = tmp_path_factory.mktemp("shards") / "prepared"
    with write_shards(directory, ByteTokenizer(), shard_tokens=100) as writer:
        writer.append_tokens("train", np.arange(1036) % 256, 1036)
        writer.append_tokens("val", np.zeros(10, np.int64), 10)
    return TokenShards.open(directory).train


def test_an_epoch_has_each_window_of_each_shard_once_and_one_shard_after_the_other(split):
    windows = ShardWindows(split, S, seed=3)
    assert windows.windows_per_epoch == 10 * (100 // S - 1) + 37 // S - 1
    for epoch in range(3):
        first = epoch * windows.windows_per_epoch
        starts = [windows.start(first + i) for i in range(windows.windows_per_epoch)]
        shards = [start // 100 for start in starts]
        changes = [a for a, b in zip(shards, [None, *shards], strict=False) if a != b]
        assert sorted(changes) == list(range(11))
        for shard in range(11):
            inside = sorted(s - 100 * shard for s in starts if s // 100 == shard)
            size = 37 if shard == 10 else 100
            assert np.diff(inside).tolist() == [S] * (size // S - 2)
            assert 0 <= inside[0] < S
            assert inside[-1] + S + 1 <= size


def test_each_epoch_cuts_and_shuffles_a_shard_anew(split):
    windows = ShardWindows(split, S, seed=3)
    of_shard = []
    for epoch in range(4):
        first = epoch * windows.windows_per_epoch
        starts = [windows.start(first + i) for i in range(windows.windows_per_epoch)]
        of_shard.append([s for s in starts if s // 100 == 4])
    assert len({min(starts) for starts in of_shard}) > 1
    orders = {tuple(s - min(starts) for s in starts) for starts in of_shard}
    assert len(orders) == 4


def test_samples_depend_on_the_seed_and_the_number_alone(split):
    one, two = ShardWindows(split, S, 3), ShardWindows(split, S, 3)
    numbers = list(range(0, 400, 7))
    forwards = [one[i]["input"].tolist() for i in numbers]
    assert [two[i]["input"].tolist() for i in reversed(numbers)] == forwards[::-1]
    assert [ShardWindows(split, S, 4)[i]["input"].tolist() for i in numbers] != forwards
    for i in numbers:
        start = one.start(i)
        assert one[i]["input"].tolist() == split.read(start, start + S).tolist()
        assert one[i]["target"].tolist() == split.read(start + 1, start + S + 1).tolist()


def test_neither_windows_nor_shards_come_in_their_own_order(split):
    windows = ShardWindows(split, S, 3)
    starts = [windows.start(i) for i in range(windows.windows_per_epoch)]
    shards = list(dict.fromkeys(s // 100 for s in starts))
    assert shards != sorted(shards)
    first = [s for s in starts if s // 100 == shards[0]]
    assert first != sorted(first)
    second_epoch = [
        windows.start(windows.windows_per_epoch + i) // 100 for i in range(windows.windows_per_epoch)
    ]
    assert list(dict.fromkeys(second_epoch)) != shards


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_read_the_same_samples_from_any_step_on(split, world, workers):
    alone = ShardWindows(split, S, 3)
    expected = torch.stack([alone[i]["input"] for i in range(5 * 8, 20 * 8)])
    parts = []
    for rank in range(world):
        sampler = GlobalBatchSampler(
            start_step=5, max_steps=20, global_batch=8, micro_batch=8 // world, rank=rank, world_size=world
        )
        loader = DataLoader(ShardWindows(split, S, 3), batch_sampler=sampler, num_workers=workers)
        parts.append([batch["input"] for batch in loader])
    rows = [batch[rank] for batch in zip(*parts, strict=True) for rank in range(world)]
    assert torch.equal(torch.cat(rows), expected)


def test_the_next_shard_is_asked_for_and_those_that_are_over_are_given_back(split, monkeypatch):
    windows = ShardWindows(split, S, 3)
    order = list(dict.fromkeys(windows.start(i) // 100 for i in range(windows.windows_per_epoch)))
    following = windows.start(windows.windows_per_epoch) // 100
    asked, released = [], []
    number = {id(segment.file): k for k, segment in enumerate(split.segments)}
    monkeypatch.setattr(CheckedFile, "ahead", lambda self: asked.append(number[id(self)]))
    monkeypatch.setattr(CheckedFile, "release", lambda self: released.append(number[id(self)]))
    for i in range(windows.windows_per_epoch):
        windows[i]
        windows.release(i)
        if released:
            assert windows.start(i) // 100 not in released
            released.clear()
    assert asked == [*order[1:], following]


@pytest.mark.parametrize(
    ("sequence", "message"), [(51, r"no shard of 2 \* sequence_tokens = 102"), (0, "at least 1")]
)
def test_too_little_for_a_window_is_said(split, sequence, message):
    with pytest.raises(ValueError, match=message):
        ShardWindows(split, sequence, 3)
    with pytest.raises(IndexError, match="sample index -1"):
        ShardWindows(split, S, 3)[-1]
