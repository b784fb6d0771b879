"""The tables against the formats' own rounding and against another library's dynamic map."""

from __future__ import annotations

import pytest
import torch

from qtrain.optim import codec
from qtrain.quant import QuantSpec, dequantize, get_format, quantize

TABLED = [
    "dynamic8",
    "dynamic8_unsigned",
    "dynamic4",
    "dynamic4_unsigned",
    "linear4_nozero",
    "e4m3",
    "e5m2",
    "e2m1",
]


def edges(name: str) -> torch.Tensor:
    """Every level, midpoint and power of two with both float32 neighbours, signed zeros, ends and beyond."""
    levels = get_format(name).levels()
    points = torch.cat(
        [
            levels,
            (levels[1:] + levels[:-1]) / 2,
            2.0 ** torch.arange(-126, 10.0),
            torch.tensor([0.0, 1e30, 3e-45]),
        ]
    )
    points = torch.cat([points, -points])
    up, down = torch.full_like(points, torch.inf), torch.full_like(points, -torch.inf)
    return torch.cat(
        [points, torch.nextafter(points, up), torch.nextafter(points, down), torch.tensor([torch.inf])]
    )


@pytest.mark.parametrize("name", TABLED)
def test_codes_are_those_of_the_format_everywhere(name: str) -> None:
    number_format = get_format(name)
    assert codec.code_table(number_format) is not None
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(200_000, generator=generator) * 10 ** torch.empty(200_000).uniform_(
        -9, 3, generator=generator
    )
    v = torch.cat([edges(name), random])
    assert torch.equal(codec.nearest_codes(v, number_format), number_format.encode(number_format.round(v)))


def test_a_grid_too_fine_for_the_table_is_refused_and_still_right() -> None:
    number_format = get_format(
        "midrise8"
    )  # near 128 its step of 1 is 2^-7 of the value, and cells begin off the grid
    fine = type(get_format("linear4_nozero"))("fine", tuple(1 + i * 2.0**-12 for i in range(256)))
    v = torch.linspace(0.9, 1.1, 5001)
    assert codec.code_table(fine) is None
    for f in (fine, number_format):
        assert torch.equal(codec.nearest_codes(v, f), f.encode(f.round(v)))


@pytest.mark.parametrize("granularity", ["tensor", "row", "group:16", "group:128", "block:1x7"])
@pytest.mark.parametrize("name", ["int8", "uint8", "uint4", "int4", "int3", *TABLED])
@pytest.mark.parametrize("shape", [(1, 1), (3, 127), (5, 256), (2, 48)])
def test_encode_and_decode_are_quantize_and_dequantize(
    name: str, granularity: str, shape: tuple[int, int]
) -> None:
    spec = QuantSpec(format=name, granularity=granularity)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-5
    x[0, 0] = 3.0  # one outlier
    x[-1] = 0.0 if shape[0] > 1 else x[-1]
    x = x.abs() if get_format(name).min >= 0 else x
    ours, reference = codec.encode(x, spec), quantize(x, spec)
    assert torch.equal(ours.codes, reference.codes)
    assert ours.codes.is_contiguous()
    assert torch.equal(ours.scale, reference.scale)
    assert torch.equal(codec.decode(ours), dequantize(reference))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["dynamic8", "e4m3", "int8", "linear4_nozero"])
def test_what_is_not_finite_spoils_its_block_and_no_other(name: str, bad: float) -> None:
    x = torch.ones(2, 256)
    x[0, 5] = bad
    decoded = codec.decode(codec.encode(x, QuantSpec(format=name, granularity="group:128")))
    assert (
        not decoded[0, :128].isfinite().any()
    )  # NaN, but infinity where a grid has no zero to multiply it with
    assert torch.equal(decoded[0, 128:], torch.ones(128))
    assert torch.equal(decoded[1], torch.ones(256))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_that_of_bitsandbytes(signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    name = "dynamic8" if signed else "dynamic8_unsigned"
    theirs = functional.create_dynamic_map(signed=signed).sort().values
    # theirs is computed in float32 linspaces, ours in float64
    torch.testing.assert_close(get_format(name).levels(), theirs, rtol=1e-6, atol=1e-9)


def test_blockwise_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    codes, state = functional.quantize_blockwise(x, blocksize=256)
    ours = codec.encode(x, QuantSpec(format="dynamic8", granularity="group:256"))
    assert torch.equal(ours.scale.flatten(), state.absmax)
    levels = functional.create_dynamic_map(signed=True).sort().values.double()
    exact = ((x / ours.scale).double()[..., None] - levels).abs().argmin(-1)
    assert torch.equal(ours.codes.int(), exact.int())  # nearest by brute force
    apart = ours.codes.int() - codes.int()
    assert apart.abs().max() <= 1  # their search on CPUs misses the nearest level near midpoints:
    assert (apart != 0).float().mean() < 3e-3  # 24 of these 16384
