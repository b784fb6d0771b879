from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.data.mixture import Interleaving, MixedCorpus, MixedWindows, Mixture, check_weights
from qtrain.data.stream import Windows
from qtrain.data.tokenizers import ByteTokenizer


class Numbered(Windows):
    """Sample j of part ``mark`` is [mark, j]; with a state, if asked."""

    def __init__(self, mark: int, stateful: bool = False):
        self.mark, self.stateful, self.loaded, self.released = mark, stateful, None, 0

    def __getitem__(self, index):
        return {"input": torch.tensor([self.mark, index])}

    def state_dict(self, sample):
        return {"at": sample} if self.stateful else None

    def load_state_dict(self, state, sample):
        self.loaded = (state, sample)

    def release(self, sample):
        self.released = sample


def shares(draw: list[float]) -> dict[str, float]:
    return {f"p{i}": w / sum(draw) for i, w in enumerate(draw)}


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=7), st.integers(0, 2**63))
def test_counts_stay_by_the_weights_and_every_sample_is_taken_once(draw, seed):
    """Against counting by hand: the i-th sample of a part is its i-th, and no prefix is off by K - 1 or more."""
    weights = shares(draw)
    interleaving, seen = Interleaving(weights, seed), Counter()
    for i in range(400):
        name, sample = interleaving[i]
        assert sample == seen[name]
        seen[name] += 1
        assert interleaving.counts(i + 1) == {n: seen[n] for n in interleaving.names}
        for n, w in weights.items():
            assert abs(seen[n] - w * (i + 1)) < max(1, len(weights) - 1)


def test_proportions_are_exact_in_the_long_run():
    weights = {"a": 0.7, "b": 0.2, "c": 0.07, "d": 0.03}
    n = 10**12 + 7
    counts = Interleaving(weights, 3).counts(n)
    assert sum(counts.values()) == n
    for name, weight in weights.items():
        assert abs(counts[name] - weight * n) < 3 + n * 2**-48 * 4


def test_the_seed_moves_the_places():
    orders = {
        "".join(Interleaving({"a": 0.6171, "b": 0.3829}, seed)[i][0] for i in range(40)) for seed in range(9)
    }
    assert len(orders) > 4


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "empty"),
        ({"a": 0.7, "b": 0.4}, "add to 1.1, not to 1; in these proportions: a: 0.6364, b: 0.3636"),
        ({"a": 1.0, "b": 0.0}, r"parts\.b\.weight=0\.0"),
        ({"a": 1.5, "b": -0.5}, r"parts\.b\.weight=-0\.5"),
        ({"a": "much"}, "weight='much'"),
        ({"a": True}, "weight=True"),
        ({"a": float("nan")}, "weight=nan"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights)


def test_weights_may_be_rounded():
    assert check_weights({"a": 0.333, "b": 0.333, "c": 0.333}) == pytest.approx(dict.fromkeys("abc", 1 / 3))


def test_each_part_keeps_its_order_and_states_belong_to_parts():
    parts = {"a": Numbered(0), "b": Numbered(1, stateful=True)}
    windows = MixedWindows(parts, Interleaving({"a": 0.25, "b": 0.75}, 1))
    rows = np.array([windows[i]["input"].tolist() for i in range(1000)])
    for mark in (0, 1):
        assert rows[rows[:, 0] == mark, 1].tolist() == list(range((rows[:, 0] == mark).sum()))
    taken = int((rows[:777, 0] == 1).sum())
    assert windows.state_dict(777) == {"b": {"at": taken}}
    windows.release(777)
    assert (parts["a"].released, parts["b"].released) == (777 - taken, taken)
    windows.load_state_dict(windows.state_dict(777), 777)
    assert parts["a"].loaded == (None, 777 - taken)
    assert parts["b"].loaded == ({"at": taken}, taken)
    with pytest.raises(ValueError, match=r"states of the parts \['z'\]"):
        windows.load_state_dict({"z": {}}, 777)
    assert MixedWindows({"a": parts["a"]}, Interleaving({"a": 1.0}, 1)).state_dict(3) is None


@dataclass
class Plan:
    tokenizer: Any
    vocab_size: int = 257


class OtherTokenizer(ByteTokenizer):
    def __init__(self):
        super().__init__()
        self.name = "other"
        self.vocab_size = 300


@pytest.mark.parametrize(
    ("other", "message"), [(OtherTokenizer(), "tokenizers differ"), (None, r"parts\.b names no tokenizer")]
)
def test_parts_with_other_tokenizers_are_refused(other, message):
    with pytest.raises(ValueError, match=message):
        Mixture({"a": (0.5, Plan(ByteTokenizer())), "b": (0.5, Plan(other))})


class Known:
    def __init__(self, name):
        self.name = name

    def identity(self):
        return {"shards": self.name, "fingerprint": "f", "tokenizer": "byte"}


def test_the_identity_is_of_parts_and_weights():
    one = MixedCorpus({"a": Known("x"), "b": Known("y")}, {"a": 0.5, "b": 0.5}).identity()
    assert one["parts"]["b"] == {"shards": "y", "fingerprint": "f", "tokenizer": "byte", "weight": 0.5}
    assert one["tokenizer"] == "byte"
    for corpora, weights in (
        ({"a": Known("x"), "b": Known("z")}, {"a": 0.5, "b": 0.5}),
        ({"a": Known("x"), "b": Known("y")}, {"a": 0.4, "b": 0.6}),
    ):
        assert MixedCorpus(corpora, weights).identity()["shards"] != one["shards"]
