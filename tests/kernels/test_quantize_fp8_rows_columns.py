"""quantize_fp8_rows_columns against numpy, against torch's casts on every bfloat16, and against qtrain.quant."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from qtrain_kernels import quantize_fp8_rows_columns as declaration
from qtrain_kernels.counter_hash import random_bits, uniform
from qtrain_kernels.quantize_fp8_rows_columns import FORMATS, quantize_fp8_rows_columns
from torch import Tensor

from qtrain.quant import QuantSpec
from qtrain.quant.qtensor import quantize_values

F32 = np.float32
NOTHING = ("", False, False, 0, None)


def _uniforms(*words: int) -> np.ndarray:
    """The hash in numpy, of the tests of quantize_rows."""
    spec = importlib.util.spec_from_file_location("rows", Path(__file__).with_name("test_quantize_rows.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._uniforms(*words)


def _grid(number_format: str) -> np.ndarray:
    """The numbers of a format, ascending, from their definition: no rounding arithmetic to get wrong."""
    exponents, mantissa, bias, largest = {"e4m3": (16, 3, 7, 448), "e5m2": (31, 2, 15, 57344)}[number_format]
    numbers = [
        (f + (2**mantissa if e else 0)) * 2.0 ** (max(e, 1) - bias - mantissa)
        for e in range(exponents)
        for f in range(2**mantissa)
    ]
    positive = np.array([n for n in numbers if n <= largest])
    return np.concatenate([-positive[:0:-1], positive])


def _quantized(
    y: np.ndarray, number_format: str, per_tensor: bool, u: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Codes' values, by search in the grid, and scales along the rows of y."""
    grid = _grid(number_format)
    with np.errstate(invalid="ignore", over="ignore"):
        amax = np.array([F32(0) if not len(row) else np.abs(row).max() for row in y], dtype=F32)
        if per_tensor and len(amax):
            amax[:] = amax.max()
        scale = np.maximum(amax / F32(grid[-1]), F32(2.0**-100))
        scale[~np.isfinite(scale)] = np.nan
        v = (y * (F32(1.0) / scale)[:, None]).astype(np.float64)
    v[np.isnan(v)] = 0
    below = np.clip(np.searchsorted(grid, v, side="right") - 1, 0, len(grid) - 2)
    low, high = grid[below], grid[below + 1]
    place = (v - low) / (high - low)  # exact: the gaps are powers of two
    if u is None:
        # Neighbours of a tie differ in their last bit; the grid's middle, zero, is even
        even = (below - len(grid) // 2) % 2 == 0
        code = np.where((place > 0.5) | ((place == 0.5) & ~even), high, low)
        code = np.where(code == 0, np.copysign(0, v), code)
    else:
        code = np.where(u < place.astype(F32), high, low)
    code = np.clip(np.where(v >= grid[-1], grid[-1], code), grid[0], grid[-1])
    return code.astype(F32), scale


def oracle(x: Tensor, *rest) -> list[Tensor]:
    rows, columns, (seed, step, row_offset) = rest[:5], rest[5:10], (int(t) for t in rest[10:])
    values = np.array(x.to(torch.float32).tolist(), dtype=F32).reshape(x.shape)
    found = []
    for along_columns, (name, stochastic, per_tensor, stream, fold) in ((False, rows), (True, columns)):
        dtype = torch.float8_e5m2 if name == "e5m2" else torch.float8_e4m3fn
        if not name:
            found += [torch.zeros((0, 0), dtype=torch.float32).to(dtype), torch.zeros(0)]
            continue
        factor = F32(1) if fold is None else fold.numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            y = values * (factor if fold is None or not along_columns else factor[:, None])
        u = _uniforms(seed, step, stream, *x.shape, row_offset) if stochastic else None
        if along_columns:
            y, u = y.T.copy(), None if u is None else u.T
        codes, scale = _quantized(y, name, per_tensor, u)
        found += [torch.from_numpy(codes).to(dtype), torch.from_numpy(scale)]
    return found


def _counters(*values: int) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(v) for v in values)


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_is_a_saturating_cast_of_every_bfloat16(name: str) -> None:
    largest, dtype = FORMATS[name].largest, FORMATS[name].dtype
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.abs() <= largest].reshape(1, -1)  # its largest is the format's: scale = 1
    codes, scale, _, _ = quantize_fp8_rows_columns(x, name, *NOTHING[1:], *NOTHING, *_counters(0, 0, 0))
    assert scale.tolist() == [1.0]
    assert torch.equal(codes.view(torch.uint8), x.to(dtype).view(torch.uint8))  # the sign of zeros too


@pytest.mark.parametrize("spec", ["e4m3_row", "e5m2_row", "e4m3_tensor", "e5m2_tensor", "e4m3_row_sr", "e5m2_tensor_sr"])  # fmt: skip
def test_both_copies_are_those_of_the_algebra(spec: str) -> None:
    parsed = QuantSpec.parse(spec)
    x = torch.randn(37, 53, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-26, 27)
    x = x.clamp(-1e5, 1e5)
    x[3, 5], x[7, 9] = (0.0, -0.0) if parsed.granularity == "tensor" else (float("inf"), float("nan"))
    side = (parsed.format, parsed.stochastic, parsed.granularity == "tensor", 7, None)
    seed, step, offset = _counters(5, 6, 11)
    found = quantize_fp8_rows_columns(x, *side, *side, seed, step, offset)
    noise = uniform(random_bits(seed, step, 7, *x.shape, offset)) if parsed.stochastic else None
    for codes, scale, operand, u in (
        (*found[:2], x, noise),
        (*found[2:], x.t(), None if noise is None else noise.t()),
    ):
        want = quantize_values(operand, parsed, u)
        assert torch.equal(codes.view(torch.uint8), parsed.number_format.encode(want.values))
        assert torch.equal(
            scale.nan_to_num(-1.0), want.scale.expand(scale.shape[0], 1)[:, 0].nan_to_num(-1.0)
        )


def test_stochastic_rounding_is_unbiased() -> None:
    """In a normal binade, in a subnormal one, and below the smallest number: mean of N within 5.5 sigma."""
    N = 200_000
    for name, value, gap in (("e4m3", 1.3, 0.125), ("e4m3", -0.0115, 2.0**-9), ("e5m2", 2.0**-18, 2.0**-16)):
        x = torch.full((N // 1000, 1001), value)
        x[:, 0] = FORMATS[name].largest
        codes, _, _, _ = quantize_fp8_rows_columns(
            x, name, True, False, 3, None, *NOTHING, *_counters(1, 2, 0)
        )
        mean = codes[:, 1:].double().mean().item()
        assert len(codes[:, 1:].float().unique()) == 2
        assert abs(mean - value) < 5.5 * gap / 2 / N**0.5


def test_a_non_finite_element_poisons_its_row_and_no_other() -> None:
    x = torch.randn(4, 20, generator=torch.Generator().manual_seed(2))
    clean = quantize_fp8_rows_columns(x, "e4m3", *NOTHING[1:], *NOTHING, *_counters(0, 0, 0))
    for value in (float("inf"), float("nan")):
        dirty = x.clone()
        dirty[2, 7] = value
        codes, scale, _, _ = quantize_fp8_rows_columns(
            dirty, "e4m3", *NOTHING[1:], *NOTHING, *_counters(0, 0, 0)
        )
        assert codes[2].view(torch.uint8).tolist() == [0] * 20
        assert scale[2].isnan()
        for i in (0, 1, 3):
            assert torch.equal(codes[i].float(), clean[0][i].float())
            assert scale[i] == clean[1][i]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3)}, r"x must be \[R, C\]"),
        ({1: "e3m4"}, r'row_format=\'e3m4\': allowed are "" \(no such copy\), e4m3, e5m2'),
        ({6: "fp8"}, "column_format='fp8'"),
        ({4: 2**31}, "signed 32-bit"),
        ({10: torch.ones(2, dtype=torch.float64)}, r"column_fold must be \[2\] float32"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    side = ("e4m3", False, False, 0, None)
    arguments = [torch.zeros(2, 3), *side, *side, *_counters(0, 0, 0)]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        declaration.reference(*arguments)
