import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from qtrain.data.shards import ShardSplit, TokenShards, write_shards
from qtrain.data.stream import GlobalBatchSampler, Permutation, TokenWindows, ValidationWindows, mix_words
from qtrain.data.tokenizers import Tokenizer


class CountingTokenizer(Tokenizer):
    """Text "n" becomes the ids 0..n-1, so that a token is its own position."""

    kind = "counting"

    def __init__(self):
        super().__init__("counting", 1 << 20, (1 << 20) - 1)

    def encode_batch(self, texts):
        return [np.arange(int(text)) for text in texts]

    def _text(self, ids):
        return str(len(ids))

    def files(self):
        return {}

    @classmethod
    def from_files(cls, about, files):
        return cls()


def make_split(folder, tokens: int, shard_tokens: int = 100) -> ShardSplit:
    """Tokens 0, 1, ..., tokens - 2 and the end-of-document id."""
    with write_shards(folder / f"d{tokens}", CountingTokenizer(), shard_tokens=shard_tokens) as writer:
        writer.append("train", str(tokens - 1))
    return TokenShards.open(folder / f"d{tokens}").train


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(0, 1 << 64))
def test_permutation_is_a_bijection(size, key):
    permutation = Permutation(size, key)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65_537])
def test_permutation_at_powers_of_two(size):
    permutation = Permutation(size, 7)
    assert sorted(permutation[i] for i in range(size)) == list(range(size))


def test_permutation_of_huge_sizes_needs_no_table():
    size = 10**15
    values = [Permutation(size, 3)[i] for i in range(2000)]
    assert len(set(values)) == 2000
    assert all(0 <= v < size for v in values)
    # the mean of n uniform draws lies within 5 / sqrt(12 n) of 1/2
    assert abs(np.mean(values) / size - 0.5) < 5 / (12 * 2000) ** 0.5


def test_permutations_look_random():
    size = 2000
    tables = [np.array([Permutation(size, key)[i] for i in range(size)]) for key in range(4)]
    bound = 5 / size**0.5  # correlations of independent draws have standard deviation 1 / sqrt(size)
    for table in tables:
        assert abs(np.corrcoef(table, np.arange(size))[0, 1]) < bound
        assert abs(np.corrcoef(table[1:], table[:-1])[0, 1]) < bound
        steps = np.diff(table)
        assert np.unique(steps).size > size // 2
    for a in range(4):
        for b in range(a):
            assert abs(np.corrcoef(tables[a], tables[b])[0, 1]) < bound


@pytest.mark.parametrize("size", [3, 5, 12])
def test_small_permutations_reach_every_place(size):
    draws = 3000
    counts = np.zeros((size, size))
    for key in range(draws):
        permutation = Permutation(size, mix_words(key))
        for i in range(size):
            counts[i, permutation[i]] += 1
    share = counts / draws
    # binomial standard deviation, six of them: size^2 cells are looked at
    assert np.abs(share - 1 / size).max() < 6 * (1 / size * (1 - 1 / size) / draws) ** 0.5


def test_permutation_bounds():
    with pytest.raises(ValueError, match="size 0"):
        Permutation(0, 1)
    for index in (-1, 5):
        with pytest.raises(IndexError, match=rf"index {index} is outside \[0, 5\)"):
            Permutation(5, 1)[index]


def test_every_window_exactly_once_an_epoch(tmp_path):
    split, sequence = make_split(tmp_path, 1003), 10
    windows = TokenWindows(split, sequence, seed=5)
    n = windows.windows_per_epoch
    assert n == 99
    offsets, orders = [], []
    for epoch in range(12):
        items = [windows[i] for i in range(epoch * n, (epoch + 1) * n)]
        starts = [int(item["input"][0]) for item in items]
        offset = min(starts)
        assert sorted(starts) == [offset + sequence * k for k in range(n)]
        assert 0 <= offset < sequence
        targets = torch.cat([item["target"] for item in items])
        assert len(set(targets.tolist())) == n * sequence
        offsets.append(offset)
        orders.append(tuple(s - offset for s in starts))
    assert len(set(offsets)) > 3
    assert len(set(orders)) == 12


def test_items_are_shifted_int64(tmp_path):
    windows = TokenWindows(make_split(tmp_path, 1003), 10, seed=0)
    item = windows[17]
    assert item["input"].dtype == item["target"].dtype == torch.int64
    assert item["input"].shape == item["target"].shape == (10,)
    start = windows.start(17)
    assert item["input"].tolist() == list(range(start, start + 10))
    assert item["target"].tolist() == list(range(start + 1, start + 11))


def test_a_sample_depends_on_seed_and_index_alone(tmp_path):
    split = make_split(tmp_path, 1003)
    forward = TokenWindows(split, 10, seed=1)
    starts = [forward.start(i) for i in range(400)]
    backward = TokenWindows(split, 10, seed=1)
    assert [backward.start(i) for i in reversed(range(400))] == starts[::-1]
    copy = pickle.loads(pickle.dumps(forward))
    assert [copy.start(i) for i in range(400)] == starts
    assert [TokenWindows(split, 10, seed=2).start(i) for i in range(400)] != starts


def test_workers_and_batch_sizes_change_nothing(tmp_path):
    windows = TokenWindows(make_split(tmp_path, 1003), 10, seed=1)

    def samples(micro_batch, workers):
        sampler = GlobalBatchSampler(
            start_step=3, max_steps=6, global_batch=48, micro_batch=micro_batch, accumulate=48 // micro_batch
        )
        loader = DataLoader(windows, batch_sampler=sampler, num_workers=workers)
        return torch.cat([batch["input"] for batch in loader])

    one = samples(48, 0)
    assert torch.equal(one, torch.stack([windows[i]["input"] for i in range(3 * 48, 6 * 48)]))
    assert torch.equal(samples(8, 0), one)
    assert torch.equal(samples(16, 2), one)


def test_smallest_split(tmp_path):
    assert TokenWindows(make_split(tmp_path, 20), 10, seed=0).windows_per_epoch == 1
    assert all(0 <= TokenWindows(make_split(tmp_path, 20), 10, 0)[i]["input"][0] < 10 for i in range(30))
    with pytest.raises(ValueError, match=r"19 tokens, too few .* sequence_tokens 10 .* needs 20"):
        TokenWindows(make_split(tmp_path, 19), 10, seed=0)
    with pytest.raises(ValueError, match="sequence_tokens 0"):
        TokenWindows(make_split(tmp_path, 30), 0, seed=0)


def test_negative_index_raises(tmp_path):
    with pytest.raises(IndexError, match="-1"):
        TokenWindows(make_split(tmp_path, 1003), 10, seed=0)[-1]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 4), (2, 2), (4, 1), (4, 3)])
def test_sampler_covers_each_step_once(world, accumulate):
    micro = 3
    size = micro * world * accumulate
    ranks = [
        GlobalBatchSampler(
            start_step=2,
            max_steps=5,
            global_batch=size,
            micro_batch=micro,
            rank=rank,
            world_size=world,
            accumulate=accumulate,
        )
        for rank in range(world)
    ]
    batches = [list(sampler) for sampler in ranks]
    assert all(len(b) == len(s) == 3 * accumulate for b, s in zip(batches, ranks, strict=True))
    for step in range(2, 5):
        in_order = []
        for m in range(accumulate):
            for rank in range(world):
                batch = batches[rank][(step - 2) * accumulate + m]
                first = step * size + (m * world + rank) * micro
                assert batch == list(range(first, first + micro))
                in_order += batch
        assert in_order == list(range(step * size, (step + 1) * size))


def test_sampler_resumes_where_it_stopped():
    sizes = {"max_steps": 9, "global_batch": 8, "micro_batch": 2, "accumulate": 4}
    whole = list(GlobalBatchSampler(start_step=0, **sizes))
    resumed = GlobalBatchSampler(start_step=6, **sizes)
    assert list(resumed) == whole[24:]
    assert list(resumed) == whole[24:]  # a second pass begins again
    assert list(GlobalBatchSampler(start_step=9, **sizes)) == []


GLOBAL = 24


@st.composite
def schedules(draw):
    """(steps of a segment, world size, micro-batch, accumulate) of the segments of a run with a batch of GLOBAL."""
    cut = []
    for steps in draw(st.lists(st.integers(1, 5), min_size=1, max_size=6)):
        world = draw(st.sampled_from([w for w in range(1, GLOBAL + 1) if GLOBAL % w == 0]))
        micro = draw(st.sampled_from([m for m in range(1, GLOBAL + 1) if GLOBAL // world % m == 0]))
        cut.append((steps, world, micro, GLOBAL // world // micro))
    return cut


@settings(deadline=None, max_examples=60)
@given(schedule=schedules(), tokens=st.integers(60, 400), seed=st.integers(0, 2**32))
def test_no_sample_is_repeated_or_left_out_when_processes_and_micro_batches_change(
    tmp_path_factory, schedule, tokens, seed
):
    """Step by step the samples, their order and their tokens are those of one process with one micro-batch, whose
    epochs (of a few steps, or less than one) each take every window once."""
    windows = TokenWindows(counted(tmp_path_factory, tokens), 10, seed)
    taken, at = [], 0
    for steps, world, micro, accumulate in schedule:
        sizes = {"global_batch": GLOBAL, "micro_batch": micro, "world_size": world, "accumulate": accumulate}
        ranks = [
            iter(GlobalBatchSampler(start_step=at, max_steps=10**6, rank=rank, **sizes))
            for rank in range(world)
        ]
        for _ in range(steps * accumulate):
            for rank in ranks:
                taken += next(rank)
        at += steps
    assert taken == list(range(at * GLOBAL))
    n = windows.windows_per_epoch
    whole = TokenWindows(windows.split, 10, seed)
    starts = [windows.start(i) for i in taken]
    assert starts == [whole.start(i) for i in range(at * GLOBAL)]
    for first in range(0, len(starts) - n + 1, n):
        epoch = sorted(starts[first : first + n])
        assert epoch == list(range(epoch[0], epoch[0] + 10 * n, 10))
        assert [int(windows[taken[i]]["input"][0]) for i in range(first, first + n)] == starts[
            first : first + n
        ]


def counted(tmp_path_factory, tokens):
    """One folder of shards a length, for all examples."""
    folder = tmp_path_factory.getbasetemp() / "counted"
    folder.mkdir(exist_ok=True)
    if (folder / f"d{tokens}").is_dir():
        return TokenShards.open(folder / f"d{tokens}").train
    return make_split(folder, tokens, shard_tokens=97)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 1}, r"global_batch 64 .* micro_batch 4 \* world_size 2 .* set accumulate=8"),
        ({"global_batch": 60}, r"60 is not .* = 64; set global_batch to a multiple of 8 \(such as 56\)"),
        ({"global_batch": 4}, r"multiple of 8 \(such as 8\)"),
        ({"micro_batch": 0}, "micro_batch 0 must be at least 1"),
        ({"rank": 2}, r"rank 2 must lie in \[0, world_size\) with world_size 2"),
        ({"start_step": 11}, r"start_step 11 must lie in \[0, max_steps\]"),
    ],
)
def test_sampler_refuses_sizes_that_do_not_fit(change, message):
    sizes = {
        "start_step": 0,
        "max_steps": 10,
        "global_batch": 64,
        "micro_batch": 4,
        "rank": 0,
        "world_size": 2,
        "accumulate": 8,
    }
    GlobalBatchSampler(**sizes)
    with pytest.raises(ValueError, match=message):
        GlobalBatchSampler(**{**sizes, **change})


def test_validation_windows_take_all(tmp_path):
    windows = ValidationWindows(make_split(tmp_path, 1003), 10)
    assert len(windows) == 100
    tokens = windows.tokens()
    assert tokens.shape == (100, 11)
    assert tokens[:, 0].tolist() == list(range(0, 1000, 10))
    assert np.array_equal(tokens[:, 1:].reshape(-1)[:-1], np.arange(1, 1000))
    assert windows[3]["input"].tolist() == tokens[3, :-1].tolist()
    assert windows[3]["target"].tolist() == tokens[3, 1:].tolist()


def test_validation_windows_spread_evenly(tmp_path):
    split = make_split(tmp_path, 1003)
    windows = ValidationWindows(split, 10, max_windows=7)
    starts = windows.tokens()[:, 0]
    assert len(windows) == 7
    assert starts[0] == 0
    assert set(np.diff(starts)) <= {140, 150}
    assert np.array_equal(windows.tokens(), ValidationWindows(split, 10, max_windows=7).tokens())
    assert len(ValidationWindows(split, 10, max_windows=5000)) == 100
    assert len(ValidationWindows(make_split(tmp_path, 11), 10)) == 1
    for index in (7, -1):
        with pytest.raises(IndexError, match=rf"window {index} is outside \[0, 7\)"):
            windows[index]


def test_validation_windows_iterate_to_their_end(tmp_path):
    assert len(list(ValidationWindows(make_split(tmp_path, 1003), 10, max_windows=7))) == 7


def test_validation_windows_errors(tmp_path):
    with pytest.raises(ValueError, match="max_windows 0"):
        ValidationWindows(make_split(tmp_path, 1003), 10, max_windows=0)
    with pytest.raises(ValueError, match=r"10 tokens, too few .* needs 11"):
        ValidationWindows(make_split(tmp_path, 10), 10)
