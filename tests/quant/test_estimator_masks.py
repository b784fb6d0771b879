"""Where the estimators let a gradient through, against the slow reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtrain.quant import quantize_values

from .slow_reference import F32, SPECS, operand, reference, slices, spec_of


@pytest.mark.parametrize("text", [s for s in SPECS if "mse" not in s and "tensor_scale" not in s])
def test_clipped_mask(text):
    spec = spec_of(text, estimator="clipped")
    x = operand()
    want = reference(x.numpy(), spec)
    # the extreme element itself may land a rounding error outside
    low, high = spec.number_format.min, spec.number_format.max
    inside = (want.v >= low - 1e-6 * high) & (want.v <= high + 1e-6 * high)
    q = quantize_values(x, spec)
    assert q.inside.dtype == torch.bool
    assert np.array_equal(q.inside.numpy(), inside)
    if (
        spec.clip == "absmax"
        and spec.scale_format == "float32"
        and spec.symmetric
        and low < 0
        and low == -high
    ):
        assert bool(q.inside.all())


@pytest.mark.parametrize("text", [s for s in SPECS if "mse" not in s and "tensor_scale" not in s])
def test_trust_mask(text):
    spec = spec_of(text, estimator="trust")
    x = operand()
    want = reference(x.numpy(), spec)
    zero = np.zeros((7, 13), F32)
    for at, place in slices(spec.granularity, (7, 13)).items():
        zero[place] = want.zero_point[at]
    moved = np.abs(want.values.astype(np.float64) + zero - want.v)
    half = float(np.diff(spec.number_format.levels().double().numpy()).max()) / 2
    q = quantize_values(x, spec)
    undecided = np.abs(moved - half) < 1e-5 * half + 1e-6 * np.abs(want.v)
    undecided &= (moved != half) | ("dynamic" in text)  # whose levels float32 rounds
    assert undecided.sum() <= 9
    assert np.array_equal(q.inside.numpy()[~undecided], (moved <= half)[~undecided])


def test_masks_at_their_ends():
    """scale 1: v is x. int4 ends at -8 and 7, whatever lies a rounding error beyond still counts as inside."""
    x = torch.tensor([[7.0, 7.0001, 7.4, -7.9, -8.0, -8.0001, -8.6, 0.0]])
    spec = spec_of("int4 clip=percentile:60 estimator=clipped", min_scale=1.0)
    x = torch.cat([x, torch.zeros(1, 12)], 1)
    q = quantize_values(x, spec)
    assert q.scale.item() == 1.0
    assert q.inside[0, :8].tolist() == [True, False, False, True, True, False, False, True]
    nearly = torch.tensor([[7.0 * (1 + 2.0**-22), -8.0 * (1 + 2.0**-22), 7.0 * (1 + 2.0**-18)] + [0.0] * 17])
    assert quantize_values(nearly, spec).inside[0, :3].tolist() == [True, True, False]
    spec = spec_of("int4 clip=percentile:60 estimator=trust", min_scale=1.0)
    assert quantize_values(x, spec).inside[0, :8].tolist() == [True] * 6 + [False, True]
    y = torch.tensor([[7.5, 7.500001, -8.5, -8.500001, 2.5, 3.49] + [0.0] * 14])
    assert quantize_values(y, spec).inside[0, :6].tolist() == [True, False, True, False, True, True]


def test_masks_have_the_operands_shape_under_ragged_tilings():
    for estimator in ("clipped", "trust"):
        q = quantize_values(operand(), spec_of("int4 granularity=block:4x4 clip=rms:1", estimator=estimator))
        assert q.inside.shape == (7, 13)
        assert not q.inside.all()
