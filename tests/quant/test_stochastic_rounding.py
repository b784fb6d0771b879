"""Stochastic rounding of operands: its mean, and the noise that belongs to each element."""

from __future__ import annotations

import pytest
import torch

from qtrain.quant import dequantize, fake_quantize, quantize, quantize_values

from .slow_reference import operand, spec_of


@pytest.mark.parametrize(
    "text",
    [
        "int4",
        "int8 granularity=group:4",
        "int4 symmetric=False granularity=block:2x3",
        "e2m1 granularity=group:4 scale_format=e8m0",
        "e2m1 granularity=group:4 scale_format=e4m3 tensor_scale=True",
        "midrise4 granularity=column",
        "dynamic8 granularity=tensor",
    ],
)
def test_stochastic_rounding(text):
    """The mean of 500 draws is x within 5.5 sigma of it, a draw's neighbours known from noise 0 and almost 1."""
    spec = spec_of(text, rounding="stochastic")
    x = operand()
    up = fake_quantize(x, spec, torch.zeros(7, 13))
    down = fake_quantize(x, spec, torch.full((7, 13), 1 - 2.0**-24))
    noise = torch.rand(500, 7, 13, generator=torch.Generator().manual_seed(5))
    draws = torch.stack([fake_quantize(x, spec, n) for n in noise])
    assert bool(((draws == up) | (draws == down)).all())
    scale = quantize_values(x, spec, noise[0]).scale
    gap = (spec.blocks.expand(scale, (7, 13)) * spec.number_format.widest_gap).expand(7, 13)
    assert bool((up - down <= gap * (1 + 1e-5)).all())
    inside = (x >= down) & (x <= up)
    assert inside.float().mean() > 0.5
    error = (draws.double().mean(0) - x.double())[inside]
    sigma = ((up - x) * (x - down)).clamp(min=0).sqrt().double()[inside] / 500**0.5
    assert bool((error.abs() <= 5.5 * sigma + gap[inside] * 1e-4).all())
    # element by element against the nearest rule: noise one half decides as nearest does, up to ties
    packed = quantize(x, spec, noise[0])
    assert torch.equal(dequantize(packed), draws[0])


def test_noise_belongs_to_its_element_under_ragged_tilings():
    x = torch.full((5, 7), 0.5)
    x[:, 6] = 7.0
    x[4] = 7.0
    noise = (torch.arange(35).reshape(5, 7) % 2) * 0.75
    spec = spec_of("int4 granularity=tensor", rounding="stochastic")
    want = torch.where(noise < 0.5, 1.0, 0.0)
    got = quantize_values(x, spec, noise).values
    assert torch.equal(got[:4, :6], want[:4, :6])
    spec = spec_of("int4 granularity=block:2x4", rounding="stochastic", min_scale=1.0)
    assert torch.equal(quantize_values(x, spec, noise).values[:4, :6], want[:4, :6])


def test_noise_errors():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^rounding='stochastic' needs noise$"):
        quantize_values(x, spec_of("int8 rounding=stochastic"))
    with pytest.raises(ValueError, match=r"^rounding='nearest' takes no noise$"):
        quantize_values(x, spec_of("int8"), torch.zeros(2, 3))
    with pytest.raises(
        ValueError,
        match=r"^noise of shape \(1, 3\) for an operand of shape \(2, 3\): each element needs its own$",
    ):
        quantize_values(x, spec_of("int8 rounding=stochastic"), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="needs noise"):
        fake_quantize(x, spec_of("int8 rounding=stochastic"))
    with pytest.raises(ValueError, match="takes no noise"):
        quantize(x, spec_of("int8"), x)
