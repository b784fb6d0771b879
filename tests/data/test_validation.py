from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qtrain.data.validation import ValidationPart, ValidationSet


class Fixed:
    sequence_tokens = 2

    def __init__(self, first, count):
        self.rows = np.arange(first, first + 3 * count).reshape(count, 3)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return torch.from_numpy(self.rows[i])

    def tokens(self):
        return self.rows


def test_the_loss_is_by_weight_however_many_windows_a_part_has():
    parts = [ValidationPart("a", 0.7, Fixed(0, 2), 0.5), ValidationPart("b", 0.3, Fixed(100, 5), 0.25)]
    both = ValidationSet(parts)
    assert len(both) == 7
    assert torch.equal(both[2], torch.tensor([100, 101, 102]))
    assert both.tokens().tolist()[1:3] == [[3, 4, 5], [100, 101, 102]]
    losses = torch.tensor([1.0, 2.0, 4.0, 4.0, 4.0, 4.0, 6.5])
    assert both.losses(losses) == pytest.approx({"a": 1.5, "b": 4.5})
    assert both.loss(losses) == pytest.approx(0.7 * 1.5 + 0.3 * 4.5)
    # 1000 tokens are 700 of 2 bytes and 300 of 4 bytes
    assert both.tokens_per_byte == pytest.approx(1000 / (700 * 2 + 300 * 4))
    with pytest.raises(ValueError, match="6 losses for 7"):
        both.loss(losses[:6])
    with pytest.raises(IndexError):
        both[7]


def test_bits_per_byte_are_unknown_where_one_part_has_no_tokenizer():
    parts = [ValidationPart("a", 0.7, Fixed(0, 2), 0.5), ValidationPart("b", 0.3, Fixed(100, 5), None)]
    assert ValidationSet(parts).tokens_per_byte is None


def test_one_part_is_its_mean():
    single = ValidationSet.single(Fixed(0, 3), 0.5)
    assert single.loss(torch.tensor([1.0, 2.0, 9.0])) == 4.0
    assert math.isclose(single.tokens_per_byte, 0.5)
