"""What NumberFormat gives every format for free, on a format of the reader's own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from qtrain.quant.formats import NumberFormat, format_names, get_format


@dataclass(frozen=True)
class Octal(NumberFormat):
    """Three bits with a NaN, an infinity and a repeated level among the codes."""

    name: str = "octal"
    bits: int = 3
    min: float = -1.0
    max: float = 2.0
    widest_gap: float = 1.0
    exact_in_bf16: bool = True

    def round(self, v, noise=None):
        return v

    def encode(self, values):
        return values.to(torch.uint8)

    def decode(self, codes):
        return torch.tensor([0.0, 1.0, 2.0, float("nan"), 0.5, 0.5, -1.0, float("inf")])[
            codes.to(torch.int64)
        ]


def test_levels_are_sorted_distinct_finite_and_from_all_codes():
    assert Octal().levels().tolist() == [-1.0, 0.0, 0.5, 1.0, 2.0]


def test_no_unsigned_counterpart_by_default():
    with pytest.raises(
        ValueError,
        match=r"^format 'octal' has no unsigned counterpart; those with one: int2\.\.int8, dynamic8, dynamic4$",
    ):
        Octal().unsigned()


def test_the_counterparts_that_the_message_names_exist():
    for name in [*(f"int{b}" for b in range(2, 9)), "dynamic8", "dynamic4"]:
        assert get_format(name).unsigned().min == 0.0


def test_it_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        NumberFormat()  # type: ignore[abstract]


@pytest.mark.parametrize("name", format_names())
def test_the_invariants_of_every_format(name):
    grid = get_format(name)
    levels = grid.levels()
    assert levels.dtype == torch.float32
    assert levels.numel() <= 2**grid.bits <= 256
    assert bool((levels[1:] > levels[:-1]).all())
    assert levels[0].item() == pytest.approx(grid.min, rel=1e-7)
    assert levels[-1].item() == pytest.approx(grid.max, rel=1e-7)
    # float32 levels near 1 are 6e-8 off each
    assert (levels[1:] - levels[:-1]).max().item() == pytest.approx(grid.widest_gap, rel=1e-6, abs=1.2e-7)
    assert torch.equal(grid.round(levels), levels)
    assert torch.equal(grid.decode(grid.encode(levels)), levels)
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    named = grid.decode(codes).isfinite()
    assert torch.equal(grid.encode(grid.decode(codes[named])), codes[named])
    if grid.exact_in_bf16:
        assert torch.equal(levels.bfloat16().float(), levels)
    assert hash(grid) == hash(get_format(name))
