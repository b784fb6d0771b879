"""fp8_scaled_mm against numpy: codes decoded from their bits, sums in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from qtrain_kernels import fp8_scaled_mm as declaration
from qtrain_kernels.fp8_scaled_mm import E4M3, E5M2, fp8_scaled_mm
from torch import Tensor


def _table(exponent_bits: int, mantissa_bits: int, infinities: bool) -> np.ndarray:
    """The 256 values of an fp8 format (OCP 8-bit floating point specification, tables 1 and 2)."""
    bias, top = 2 ** (exponent_bits - 1) - 1, 2**exponent_bits - 1
    values = np.zeros(256)
    for code in range(256):
        exponent, mantissa = code >> mantissa_bits & top, code & (2**mantissa_bits - 1)
        if exponent == top and infinities:
            value = math.inf if mantissa == 0 else math.nan
        elif exponent == top and mantissa == 2**mantissa_bits - 1:
            value = math.nan
        elif exponent == 0:
            value = mantissa * 2.0 ** (1 - bias - mantissa_bits)
        else:
            value = (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)
        values[code] = -value if code >> 7 else value
    return values


TABLES = {E4M3: _table(4, 3, False), E5M2: _table(5, 2, True)}


def _values(codes: Tensor) -> np.ndarray:
    return TABLES[codes.dtype][codes.contiguous().view(torch.uint8).numpy()]


def oracle(
    a: Tensor, b: Tensor, a_scale: Tensor | None, b_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> list[np.ndarray | Tensor]:  # fmt: skip
    rows, columns = _values(a), _values(b)
    with np.errstate(invalid="ignore"):
        y = np.array([[math.nan] * len(columns)] * len(rows)).reshape(len(rows), len(columns))
        for m, row in enumerate(rows):
            y[m] = (columns * row).sum(axis=1)
        y *= 1.0 if a_scale is None else a_scale.double().numpy().reshape(-1, 1)
        y *= 1.0 if b_scale is None else b_scale.double().numpy().reshape(1, -1)
    y += 0.0 if bias is None else bias.double().numpy()
    return [torch.from_numpy(y).to(dtype)]


def test_the_formats_are_torchs() -> None:
    for dtype, table in TABLES.items():
        values = torch.arange(256, dtype=torch.uint8).view(dtype).double().numpy()
        assert np.array_equal(values, table, equal_nan=True)


def test_a_code_that_is_not_finite_shows_in_its_row_and_column_and_nowhere_else() -> None:
    a, b = torch.ones(5, 70).to(E5M2), torch.ones(6, 70).to(E4M3)
    a[1, 3], a[2, 0], b[4, 69] = (torch.tensor(v) for v in (math.inf, math.nan, math.nan))
    y = fp8_scaled_mm(a, b, None, None, None, torch.bfloat16)
    expected = torch.full((5, 6), 70.0)
    expected[1], expected[2], expected[:, 4] = math.inf, math.nan, math.nan
    assert torch.equal(y.float().nan_to_num(-1, posinf=-2), expected.nan_to_num(-1, posinf=-2))


def _arguments(**change):
    codes = torch.zeros(2, 3).to(E4M3)
    plain = {"a": codes, "b": codes, "a_scale": None, "b_scale": None, "bias": None}
    return {**plain, "out_dtype": torch.float32, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 3)}, "must be float8_e4m3fn or float8_e5m2"),
        ({k: torch.zeros(2, 3).to(E5M2) for k in ("a", "b")}, "at most one of them e5m2"),
        ({"a": torch.zeros(2, 4).to(E4M3)}, r"a and b must be \[M, K\] and \[N, K\]"),
        ({"a_scale": torch.ones(3)}, r"a_scale must be \[2\]"),
        ({"b_scale": torch.ones(2, dtype=torch.float64)}, "b_scale must be .* float32"),
        ({"bias": torch.ones(3)}, r"bias must be \[2\]"),
        ({"out_dtype": torch.float16}, "out_dtype=torch.float16: allowed are torch.float32, torch.bfloat16"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        declaration.reference(**_arguments(**change))
    with pytest.raises(ValueError, match=message):
        fp8_scaled_mm(**_arguments(**change))


def test_the_library_is_not_given_what_it_would_drop() -> None:
    pytest.importorskip("triton")
    from qtrain_kernels.fp8_scaled_mm_triton import launch
    from qtrain_kernels.scaled_mm_config import LIBRARY

    codes = torch.zeros(16, 16).to(E4M3)
    with pytest.raises(ValueError, match="pass another config"):
        launch(codes, codes, None, None, torch.ones(16), torch.bfloat16, LIBRARY)


@pytest.mark.gpu
def test_long_sums_are_promoted_to_float32() -> None:
    """Of positive products, the tensor core's own sum stands still once a product is below its last bit: with 14 bits at
    about 2^13 times a product. Sums of 128 lose about 2^-8 of a product each, half a percent."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    a, b = (torch.rand(rows, 2**16, device="cuda").to(E4M3) for rows in (256, 128))
    want = a.double() @ b.double().t()
    for dtype in (torch.float32, torch.bfloat16):
        y = fp8_scaled_mm(a, b, None, None, None, dtype).double()
        assert ((y - want).abs() / want).max() < 0.01


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """The last rows of an operand and of an output of more than 2^31 elements equal the same rows alone."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    M, N, K = 2**17 + 3, 128, 2**14 + 16
    a = torch.randn(64, K, device="cuda").to(E4M3).repeat(M // 64 + 1, 1)[:M]
    b = torch.randn(N, K, device="cuda").to(E4M3)
    y = fp8_scaled_mm(a, b, None, None, None, torch.float32)
    want = a[-64:].double() @ b.double().t()
    assert torch.allclose(y[-64:].double(), want, rtol=0, atol=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(8))
def test_every_config_keeps_the_bound(index: int) -> None:
    """On a GPU, torch's own, the tiles of the rule whole and split and the specialised ones, in each mix of formats."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from qtrain_kernels.scaled_mm_config import LIBRARY, measurable, properties

    capability, _ = properties(torch.device("cuda"))
    configs = [LIBRARY, *measurable("fp8", capability, 2048, torch.float32)]
    if index >= len(configs):
        pytest.skip("there are no more configs for this architecture")
    M, N, K = 384, 672, 2080
    mixes = ((E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3))
    for types in mixes[:1] if configs[index] == LIBRARY else mixes:
        a, b = (torch.randn(rows, K, device="cuda").to(t) for rows, t in zip((M, N), types, strict=True))
        a_scale, b_scale = torch.rand(M, device="cuda") / K**0.5, torch.rand(N, device="cuda")
        arguments = (a, b, a_scale, b_scale, None, torch.bfloat16)
        y = fp8_scaled_mm.kernel("cuda")(*arguments, config=configs[index])
        want = declaration.reference(*arguments)
        assert torch.allclose(y.float(), want.float(), rtol=declaration.RTOL, atol=declaration.ATOL)
