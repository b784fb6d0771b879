"""Rows as bytes: against a reference in numpy, and what a layer finds that quantizes what arrived."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtrain.communication.row_format import Piece, RowFormat
from qtrain.quant import QuantSpec, dequantize, quantize

SPECS = [
    "int8_row", "int4_row", "int3_group64", "int8_group128", "int8_group128_asym", "e4m3_row", "e2m1_group32",
    "nf4_group64", "mxfp8", "mxfp4", "midrise4_row_gaussian", "int8_row_mse",
]  # fmt: skip
IDEMPOTENT = [
    "int8_row",
    "int4_row",
    "int3_group64",
    "int8_group128",
    "e4m3_row",
    "e2m1_group32",
    "nf4_group64",
]


def rows(n: int = 37, k: int = 193) -> torch.Tensor:
    """Magnitudes over many binades, a row of zeros, tiny numbers, one huge outlier."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, k, generator=generator) * torch.exp2(torch.randn(n, 1, generator=generator) * 12)
    x[3] = 0
    x[4] = 1e-38
    x[5, 7] = 1e30
    return x


@pytest.mark.parametrize("text", SPECS)
def test_a_row_takes_its_bytes_and_comes_back(text):
    spec, x = QuantSpec.parse(text), rows()
    form = RowFormat(x.shape[1], spec)
    sent = form.encode(x)
    assert (sent.dtype, sent.shape) == (torch.uint8, (len(x), form.row_bytes))
    assert sent.numel() == quantize(x, spec).nbytes
    assert torch.equal(form.decode(sent), dequantize(quantize(x, spec)))


def test_int8_groups_against_numpy():
    x = rows()
    form = RowFormat(193, QuantSpec.parse("int8_group128"))
    sent = form.encode(x).numpy()
    assert sent.shape[1] == 193 + 4 * 2
    for start, stop, place in ((0, 128, 193), (128, 193, 197)):
        group = x[:, start:stop].numpy()
        scale = np.maximum(np.abs(group).max(1) / np.float32(127), np.float32(2.0**-100))
        np.testing.assert_array_equal(sent[:, place : place + 4].copy().view(np.float32)[:, 0], scale)
        codes = sent[:, start:stop].view(np.int8).astype(np.float64)
        # Half a step, and a rounding of x / scale
        assert np.all(np.abs(codes * scale[:, None] - group) <= scale[:, None] * (0.5 + 1e-4))


@pytest.mark.parametrize("text", SPECS)
def test_a_row_is_encoded_alike_in_any_company(text):
    """A process encodes its rows as another would: so a run's numbers don't hang on the number of processes."""
    spec, x = QuantSpec.parse(text), rows()
    form = RowFormat(x.shape[1], spec)
    together = form.encode(x)
    assert torch.equal(torch.cat([form.encode(x[:1]), form.encode(x[1:19]), form.encode(x[19:])]), together)
    assert torch.equal(form.decode(together)[5:6].nan_to_num(), form.decode(together[5:6]).nan_to_num())


@pytest.mark.parametrize("text", IDEMPOTENT)
def test_quantizing_what_arrived_gives_the_codes_of_the_master(text):
    spec = QuantSpec.parse(text)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([rows(), torch.randn(5000, 193, generator=generator)])
    form = RowFormat(193, spec)
    once, again = quantize(x, spec), quantize(form.decode(form.encode(x)), spec)
    assert torch.equal(once.scale, again.scale)
    assert torch.equal(once.codes, again.codes)


def test_a_format_that_ends_nearer_below_zero_does_not():
    """Why ``gathers_exactly`` leaves dynamic8 out: its largest value is 1, its least one -0.993."""
    spec = QuantSpec.parse("dynamic8_row")
    x = torch.tensor([[-1.0, 0.3, 0.1], [1.0, 0.3, 0.1]])
    form = RowFormat(3, spec)
    once, again = quantize(x, spec), quantize(form.decode(form.encode(x)), spec)
    assert (once.scale == again.scale).flatten().tolist() == [False, True]


@pytest.mark.parametrize("largest", [127.0, 7.0, 3.0, 448.0, 6.0, 28.0, 57344.0])
def test_a_scale_is_found_again_for_every_mantissa(largest):
    """What the one above rests on."""
    one = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)  # [1, 2): all there are
    divisor = torch.tensor(largest)
    scale = one / divisor
    assert torch.equal(scale * divisor / divisor, scale)
    assert not torch.equal(one * divisor / divisor, one)  # of numbers that are no quotients some are not


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible(text, bad):
    spec, x = QuantSpec.parse(text), rows()
    form = RowFormat(x.shape[1], spec)
    clean = form.decode(form.encode(x))
    x[9, 11] = bad
    found = form.decode(form.encode(x))
    assert not bool(found[9, 11].isfinite())
    keep = torch.arange(len(x)) != 9
    assert torch.equal(found[keep], clean[keep])


def test_exact_rows_are_their_bits():
    x = torch.tensor([[1.5, torch.nan], [-0.0, 1e-45]])
    form = RowFormat(2, None)
    assert form.row_bytes == 8
    # Behind an odd number of bytes, where float32 cannot begin
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), form.encode(x).flatten()])[1:].view(2, 8)
    assert torch.equal(form.decode(shifted).view(torch.int32), x.view(torch.int32))


def test_pieces_take_the_spec_where_it_saves():
    spec = QuantSpec.parse("int8_row")
    assert Piece.of("w", torch.Size([7, 4, 9]), spec).format == RowFormat(36, spec)
    assert Piece.of("w", torch.Size([7, 1]), spec).format.spec is None  # 5 bytes for 4
    assert Piece.of("b", torch.Size([700]), spec).format.spec is None
    assert Piece.of("w", torch.Size([7, 36]), None).format.spec is None
    assert [Piece.of("w", torch.Size([7, 36]), spec).chunk(w) for w in (1, 2, 4, 9)] == [7, 4, 2, 1]
