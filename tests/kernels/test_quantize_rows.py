"""quantize_rows against numpy, and the statistics and splits of its stochastic rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from qtrain_kernels import quantize_rows as declaration
from qtrain_kernels.quantize_rows import quantize_rows
from torch import Tensor

WORD = np.uint64(2**32)
ZERO = np.uint64(0)


def _mix(x: np.ndarray, second_key: np.ndarray | np.uint64 = ZERO) -> np.ndarray:
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x7FEB352D) + second_key) % WORD
    x = x ^ (x >> np.uint64(15))
    x = (x * np.uint64(0x846CA68B)) % WORD
    return x ^ (x >> np.uint64(16))


def _uniforms(seed: int, step: int, stream: int, R: int, C: int, row_offset: int) -> np.ndarray:
    """The hash on uint64 modulo 2^32, [R, C] float64."""
    low, high, step, stream = (np.uint64(v % 2**32) for v in (seed, seed >> 32, step, stream))
    keys = []
    for start in (0x243F6A88, 0x85A308D3):
        word = _mix(low ^ np.uint64(start))
        word = _mix((word + high) % WORD)
        word = _mix(word ^ step)
        keys.append(_mix((word + stream) % WORD))
    row = np.array([(row_offset + r) % 2**32 for r in range(R)], dtype=np.uint64)[:, None]
    column = np.arange(C, dtype=np.uint64)[None, :]
    r0, r1 = _mix(row ^ keys[0]), _mix((row + keys[1]) % WORD)
    bits = _mix((column * np.uint64(0x9E3779B9) % WORD) ^ r0, r1)
    return (bits >> np.uint64(8)).astype(np.float64) * 2.0**-24


def oracle(
    x: Tensor, qmax: int, stochastic: bool, seed: Tensor, step: Tensor, stream: int, row_offset: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """The equations with numpy: float32 where they round to float32, float64 and integers elsewhere."""
    values = np.array(x.to(torch.float32).tolist(), dtype=np.float32).reshape(x.shape)
    R, C = values.shape
    scale = np.full(R, 2.0**-100, dtype=np.float32)
    codes = np.zeros((R, C), dtype=np.int64)
    if stochastic:
        u = _uniforms(int(seed), int(step), stream, R, C, int(row_offset))
    for r in range(R):
        row = values[r]
        if np.isnan(row).any():
            scale[r] = np.nan
        elif np.isinf(row).any():
            scale[r] = np.inf
        elif C:
            scale[r] = max(np.abs(row).max() / np.float32(qmax), np.float32(2.0**-100))
            v = row * (np.float32(1.0) / scale[r])
            assert v.dtype == np.float32
            whole = np.floor(v.astype(np.float64))
            if stochastic:
                fraction = (v - whole.astype(np.float32)).astype(np.float32)
                code = whole + (u[r] < fraction)
            else:
                rest = v.astype(np.float64) - whole  # exact
                code = whole + (rest > 0.5) + ((rest == 0.5) & (whole % 2 == 1))
            codes[r] = np.clip(code, -qmax - 1, qmax)
    return codes.astype(np.int8), scale


def scalar(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


def quantize(x: Tensor, qmax=127, stochastic=False, seed=1, step=2, stream=3, row_offset=0):
    return quantize_rows(x, qmax, stochastic, scalar(seed), scalar(step), stream, scalar(row_offset))


@pytest.mark.parametrize("qmax", [1, 7, 127])
def test_error_is_half_a_step_nearest_and_a_step_stochastic(qmax):
    x = torch.randn(16, 257, generator=torch.Generator().manual_seed(0))
    for stochastic, bound in ((False, 0.5), (True, 1.0)):
        codes, scale = quantize(x, qmax, stochastic)
        error = (codes * scale[:, None] - x).abs() / scale[:, None]
        assert bound * 0.9 < error.max() <= bound * (1 + 1e-5)  # two-sided: exact would mean not quantized
        assert codes.abs().max() == qmax


def test_a_non_finite_element_poisons_its_row_and_no_other():
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    clean_codes, clean_scale = quantize(x)
    for value in (math.nan, math.inf, -math.inf):
        dirty = x.clone()
        dirty[2, 7] = value
        codes, scale = quantize(dirty)
        assert (codes[2] == 0).all()
        assert torch.isnan(codes[2] * scale[2]).all()
        others = [0, 1, 3, 4]
        assert torch.equal(codes[others], clean_codes[others])
        assert torch.equal(scale[others], clean_scale[others])


def test_quantizing_codes_again_changes_nothing():
    """Rounding is idempotent: codes * scale has the same codes (a power-of-two scale makes the product exact)."""
    x = torch.randint(-127, 128, (9, 65), generator=torch.Generator().manual_seed(2)).float() * 2**-5
    x[:, 0] = 127 * 2**-5
    for stochastic in (False, True):
        codes, scale = quantize(x, stochastic=stochastic)
        assert torch.equal(codes * scale[:, None], x)


def test_stochastic_rounding_is_unbiased_with_the_bernoulli_variance():
    """code = floor + Bernoulli(f): mean and variance of N draws within 5.5 sigma; false alarm < 1e-6 in all."""
    N = 120_000
    for value in (0.0625, 0.5, 0.9375, 3.3, -0.25, -7.75, 126.5, -126.9):
        x = torch.full((N // 1000, 1001), value)
        x[:, 0] = 127.0  # scale = 1
        codes = quantize(x, stochastic=True)[0][:, 1:].double()
        f = torch.tensor(value).double().item() - math.floor(value)
        sigma = math.sqrt(f * (1 - f))
        assert set(codes.unique().tolist()) == {math.floor(value), math.floor(value) + 1}
        assert abs(codes.mean() - value) < 5.5 * sigma / math.sqrt(N)
        fourth = f * (1 - f) * (1 - 3 * f * (1 - f))  # E (b - f)^4 of a Bernoulli
        assert abs(codes.var() - sigma**2) < 5.5 * math.sqrt((fourth - sigma**4) / N) + 2 / N


def test_the_edges_of_the_uniform():
    """Where u = 0, v > 0 rounds up however small it is, and an integer v stays. Where u is the largest, a v just
    below -qmax rounds down: the one way to the code -qmax - 1."""

    def codes(name: str) -> Tensor:
        return quantize_rows(*quantize_rows.cases[f"{name}/stochastic"]())[0][0]

    assert codes("subnormal/zero_uniform").nonzero().flatten().tolist() == [0, 52]
    assert codes("one_hot/zero_uniform").nonzero().flatten().tolist() == [0]
    assert (codes("below_minus_qmax/top_uniform") == -128).nonzero().flatten().tolist() == [8]


def test_row_offset_splits_the_whole():
    x = torch.randn(10, 50, generator=torch.Generator().manual_seed(3))
    whole, _ = quantize(x, 7, True, row_offset=100)
    parts = [quantize(x[a:b], 7, True, row_offset=100 + a)[0] for a, b in ((0, 4), (4, 5), (5, 10))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(torch.cat([quantize(x[:4], 7, True)[0], quantize(x[4:], 7, True)[0]]), whole)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    """The last row of a tensor of more than 2^31 elements equals the same row alone."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    R, C = 2**19 + 3, 4096
    x = torch.randn(R, C, device="cuda", dtype=torch.bfloat16)
    seed, step = scalar(1).cuda(), scalar(2).cuda()
    for stochastic in (False, True):
        codes, scale = quantize_rows(x, 127, stochastic, seed, step, 3, scalar(0).cuda())
        last, last_scale = quantize_rows(x[-1:], 127, stochastic, seed, step, 3, scalar(R - 1).cuda())
        assert torch.equal(codes[-1:], last)
        assert torch.equal(scale[-1:], last_scale)


@pytest.mark.parametrize("change", [{"seed": 9}, {"step": 9}, {"stream": 9}, {"row_offset": 9}], ids=str)
def test_every_word_of_the_name_changes_stochastic_codes_and_no_nearest_code(change):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(4))
    assert not torch.equal(quantize(x, stochastic=True)[0], quantize(x, stochastic=True, **change)[0])
    assert torch.equal(quantize(x)[0], quantize(x, **change)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"x must be \[R, C\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, "float64"),
        ({"qmax": 0}, "qmax must be 1 ... 127"),
        ({"qmax": 128}, "qmax must be 1 ... 127"),
        ({"stream": 2**31}, "signed 32-bit"),
        ({"seed": torch.tensor(1, dtype=torch.int32)}, "seed must be a 0-d int64"),
        ({"step": torch.tensor([1])}, "step must be a 0-d int64"),
        ({"row_offset": torch.tensor(1.0)}, "row_offset must be a 0-d int64"),
        ({"seed": torch.tensor(1, device="meta")}, "seed is on meta"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(2, 3), "qmax": 7, "stochastic": True, "seed": scalar(0), "step": scalar(0)}
    arguments |= {"stream": 0, "row_offset": scalar(0)}
    with pytest.raises(ValueError, match=message):
        declaration.reference(**(arguments | change))
