"""Stalled codes and zeroed second moments, on an optimizer whose step is known."""

from __future__ import annotations

import math

import pytest
import torch

from qtrain.analysis.state_statistics import state_counts
from qtrain.optim import AdamW


def stepped(p: torch.Tensor, optimizer: AdamW, grad: torch.Tensor):
    """(counts, least) of one step with that gradient."""
    before = {k: t.clone() for k, t in optimizer.state[p].items()}
    p.grad = grad
    optimizer.step()
    return state_counts(optimizer.state_layouts(p), before, optimizer.state[p], grad, 0.95)


def made(**states: str) -> tuple[torch.nn.Parameter, AdamW]:
    p = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = AdamW([p], lr=1e-3, betas=(0.9, 0.95), states={**states, "min_numel": 0})
    p.grad = torch.ones(3, 5)
    optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gradient_of_the_same_sign_and_size_moves_no_code(bits):
    """All elements of a row are its maximum: their code is the largest one at every step."""
    p, optimizer = made(exp_avg=f"int{bits}_row", exp_avg_sq=f"uint{bits}_row")
    counts, least = stepped(p, optimizer, torch.ones(3, 5))
    assert counts == [15, 15, 0, 15]
    assert least == pytest.approx(0.05 + 0.95 * 0.05, rel=1e-5)
    counts, _ = stepped(p, optimizer, torch.tensor([[1.0, 1.0, 1.0, 1.0, -9.0]]).expand(3, 5).contiguous())
    assert counts[0] < 15


def test_the_zero_bin_holds_what_was_above_zero():
    """uint8: one step of the scale is max/255, and less than half of it is zero. v = .95 .05 + .05 g^2."""
    p, optimizer = made(exp_avg="int8_row", exp_avg_sq="uint8_row")
    grad = torch.ones(3, 5)
    grad[1, 2] = 100.0  # v = 500, and its four neighbours are 0.0975 < 500/255/2
    counts, least = stepped(p, optimizer, grad)
    assert counts[2] == 4
    assert least == 0
    # A second time: what is stored as zero and gets no gradient is truly zero
    zeros = torch.zeros(3, 5)
    assert stepped(p, optimizer, zeros)[0][2] == 0


def test_before_the_first_step_moments_are_zeros():
    """v = .05 g^2 alone: what falls below half of max/255 is lost at the very first step, and no code was there to change."""
    p = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = AdamW([p], lr=1e-3, betas=(0.9, 0.95), states={"exp_avg": "int8_row", "exp_avg_sq": "uint8_row", "min_numel": 0})  # fmt: skip
    grad = torch.ones(3, 5)
    grad[1, 2], grad[0, 0] = 100.0, 0.0
    counts, least = stepped(p, optimizer, grad)
    assert all(math.isnan(n) for n in counts[:2])
    assert counts[2:] == [4, 15]  # the neighbours of 100; what got no gradient is truly zero
    assert least == 0


def test_float32_moments_have_no_codes():
    p, optimizer = made()
    counts, least = stepped(p, optimizer, torch.full((3, 5), 2.0))
    assert all(math.isnan(n) for n in counts[:3])
    assert counts[3] == 15
    assert least == pytest.approx(0.95 * 0.05 + 0.05 * 4)
    with pytest.raises(KeyError):
        optimizer.state_layouts(torch.zeros(1))
