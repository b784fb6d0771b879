"""What is held against what: SQNR, distinct values, bands, row factors."""

from __future__ import annotations

import math

import pytest
import torch

from qtrain.nn.observation import (
    _as_multiplied,
    _out_of_band,
    _rounding,
    _row_factors,
    _share,
    most_distinct,
    rescaled,
    sqnr_db,
)
from qtrain.nn.oracle import OracleOperand
from qtrain.quant import QuantSpec, quantize_values

ROW, TENSOR, COLUMN = (QuantSpec.parse(f"int4_{g}") for g in ("row", "tensor", "column"))


def test_sqnr_in_decibels() -> None:
    r = torch.tensor([3.0, 4.0])
    assert sqnr_db(r, torch.tensor([3.0, 3.5])) == pytest.approx(10 * math.log10(25 / 0.25))
    assert sqnr_db(r, r) == math.inf
    assert sqnr_db(r, -r) == pytest.approx(10 * math.log10(25 / 100))
    tiny = torch.tensor([1e-30])  # squares leave float32
    assert sqnr_db(tiny, tiny * 0.5) == pytest.approx(10 * math.log10(4), rel=1e-4)


def test_sqnr_of_zeros_tells_zero_from_anything_else() -> None:
    zero = torch.zeros(3)
    assert math.isnan(sqnr_db(zero, zero))
    assert sqnr_db(zero, torch.ones(3)) == -math.inf


@pytest.mark.parametrize(
    ("seen", "expected", "said"),
    [
        (30.0, 30.4, ""),
        (30.4, 30.0, ""),
        (30.5, 30.0, ""),
        (30.6, 30.0, "SQNR 30.6 dB, expected 30.0 +- 0.5 dB (too good: not quantized as configured)"),
        (29.4, 30.0, "SQNR 29.4 dB, expected 30.0 +- 0.5 dB (too bad)"),
        (61.0, 90.0, ""),
        (90.0, 61.0, ""),
        (math.inf, 59.0, "SQNR inf dB, expected 59.0 +- 0.5 dB (too good: not quantized as configured)"),
        (59.0, math.inf, "SQNR 59.0 dB, expected inf +- 0.5 dB (too bad)"),
        (60.0, 61.0, "SQNR 60.0 dB, expected 61.0 +- 0.5 dB (too bad)"),
        (math.inf, math.inf, ""),
        (-math.inf, -math.inf, ""),
        (math.nan, math.nan, ""),
        (math.nan, 30.0, "SQNR nan dB, expected 30.0 +- 0.5 dB (too bad)"),
        (-math.inf, math.nan, "SQNR -inf dB, expected nan +- 0.5 dB (too bad)"),
    ],
)
def test_the_band_has_two_sides(seen: float, expected: float, said: str) -> None:
    assert _out_of_band(seen, expected, 0.5) == said


def test_distinct_values_are_counted_under_one_scale() -> None:
    x = torch.tensor([[1.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    assert most_distinct(x, ROW) == 3
    assert most_distinct(x, TENSOR) == 5
    assert most_distinct(x, COLUMN) == 2
    assert (
        most_distinct(x, QuantSpec.parse("int4_group2")) == 2
    )  # the filling of the ragged end does not count
    assert most_distinct(torch.zeros(2, 4), ROW) == 1
    assert most_distinct(torch.zeros(0, 4), ROW) == 0


def test_distinct_values_are_sampled_over_many_scales() -> None:
    x = torch.zeros(2048, 3)
    x[1025] = torch.tensor([1.0, 2.0, 3.0])  # every fourth row is looked at
    assert most_distinct(x, ROW) == 1
    x[1024] = torch.tensor([1.0, 2.0, 3.0])
    assert most_distinct(x, ROW) == 3
    few = torch.zeros(512, 2)
    few[511] = torch.tensor([1.0, 2.0])  # up to 512 scales: all of them
    assert most_distinct(few, ROW) == 2
    assert most_distinct(torch.cat([torch.zeros(511, 2), few]), ROW) == 2


def test_rescaling_fits_each_block() -> None:
    source = torch.tensor([[2.0, -4.0, 6.0], [0.3, 0.6, -0.9]])
    codes = torch.tensor([[1.0, -2.0, 3.0], [1.0, 2.0, -3.0]])
    assert torch.allclose(rescaled(codes, source, ROW), source)
    assert rescaled(torch.zeros(2, 3), source, ROW).abs().max() == 0.0
    s = float((codes * source).sum() / codes.square().sum())
    assert torch.allclose(rescaled(codes, source, TENSOR).reshape(2, 3), s * codes)
    ragged = rescaled(codes, source, QuantSpec.parse("int4_group2"))
    assert torch.allclose(ragged, torch.tensor([[2.0, -4.0], [6.0, 0.0], [0.3, 0.6], [-0.9, 0.0]]))


def test_row_factors_leave_out_other_numbers() -> None:
    codes = torch.tensor([[1.0, -2.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 2.0, -1.0]])
    wanted = codes * torch.tensor([[0.5], [7.0], [-3.0]])
    assert torch.equal(_row_factors(codes, wanted), torch.tensor([[0.5], [1.0], [-3.0]]))
    seen = codes.clone()
    seen[0, 3] = 2.0  # one code flipped
    assert torch.allclose(_row_factors(seen, wanted), torch.tensor([[0.5], [1.0], [-3.0]]))


def test_share_of_elements_within_the_tolerance() -> None:
    seen, wanted = torch.tensor([1.0, 2.0, math.nan, math.inf]), torch.tensor([1.1, 2.0, math.nan, math.inf])
    assert _share(seen, wanted, torch.tensor(0.05)) == (0.75, 1)
    assert _share(seen, wanted, torch.tensor(0.2)) == (1.0, 0)
    assert _share(torch.tensor([math.nan, 1.0]), torch.tensor([1.0, math.nan]), torch.tensor(9.0)) == (0.0, 2)
    assert _share(torch.zeros(0), torch.zeros(0), torch.tensor(0.0)) == (1.0, 0)


def test_rounding_is_that_of_the_coarsest_dtype() -> None:
    assert _rounding(torch.float32, torch.bfloat16) == 2.0**-8
    assert _rounding(torch.float32, torch.float32) == 2.0**-18
    assert _rounding(torch.int32, torch.float32) == 2.0**-18


def operand(spec: QuantSpec | None, source: torch.Tensor) -> OracleOperand:
    if spec is None:
        return OracleOperand(source, None, source, None)
    q = quantize_values(source, spec)
    return OracleOperand(source, spec, q.values, q.scale)


SOURCE = torch.randn(40, 50, generator=torch.Generator().manual_seed(1))


def test_codes_match_with_their_scales_as_factors() -> None:
    oracle = operand(ROW, SOURCE)
    seen = _as_multiplied(oracle.values.to(torch.bfloat16), oracle, twice_rounded=False)
    assert (seen.exact, seen.agreement, seen.problem) == (True, 1.0, "")
    assert len(seen.factors) == 1
    assert torch.allclose(seen.factors[0], oracle.scale)


def test_dequantized_numbers_match_as_they_are() -> None:
    oracle = operand(QuantSpec.parse("int4_group8"), SOURCE)
    seen = _as_multiplied(oracle.multiplied.to(torch.bfloat16), oracle, twice_rounded=False)
    assert (seen.exact, seen.agreement, seen.problem) == (False, 1.0, "")
    assert torch.equal(seen.factors[0], torch.ones(40, 1))
    seen = _as_multiplied(oracle.multiplied, oracle, twice_rounded=False)
    assert seen.exact
    assert len(seen.factors) == 2  # the fitted factor is one but for rounding


def test_high_precision_matches_within_one_rounding_and_within_two() -> None:
    oracle = operand(None, SOURCE)
    rounded = SOURCE.to(torch.bfloat16)
    assert _as_multiplied(rounded, oracle, twice_rounded=False).problem == ""
    twice = (rounded.float() + 0.003 * torch.randn(40, 50)).to(torch.bfloat16)
    assert (
        "not those of the high-precision operand"
        in _as_multiplied(twice, oracle, twice_rounded=False).problem
    )
    assert _as_multiplied(twice, oracle, twice_rounded=True).problem == ""
    q = quantize_values(SOURCE, QuantSpec.parse("int8_group8"))
    dequantized = (q.values.reshape(40, -1, 1) * 1.0).reshape(40, 50) * q.scale.repeat_interleave(8, 1)[
        :, :50
    ]
    problem = _as_multiplied(dequantized.to(torch.bfloat16), oracle, twice_rounded=False).problem
    assert problem.split()[1:] == [
        "of",
        "2000",
        "elements",
        "are",
        "not",
        "those",
        "of",
        "the",
        "high-precision",
        "operand",
    ]


@pytest.mark.parametrize(("others", "fails"), [(2, False), (3, True)])
def test_one_code_in_a_thousand_may_differ(others: int, fails: bool) -> None:
    oracle = operand(ROW, SOURCE)
    values = oracle.values.clone()
    places = [(i, int((values[i].abs() == 2).nonzero()[0])) for i in range(3, 3 + others)]
    for i, j in places:
        values[i, j] *= 1.5  # 2 -> 3
    seen = _as_multiplied(values, oracle, twice_rounded=False)
    assert bool(seen.problem) == fails
    assert seen.exact != fails
    if fails:
        assert seen.problem.endswith("of 2000 elements are not those of what this spec makes of its source")
    else:
        assert seen.agreement == 1 - others / 2000


def test_one_code_of_a_small_operand_may_differ() -> None:
    oracle = operand(ROW, SOURCE[:2, :10])
    values = oracle.values.clone()
    values[0, int((values[0].abs() == 3).nonzero()[0])] *= 4 / 3
    assert _as_multiplied(values, oracle, twice_rounded=False).problem == ""
    values[1] = values[1].flip(0)
    assert _as_multiplied(values, oracle, twice_rounded=False).problem
