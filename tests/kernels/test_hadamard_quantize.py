"""hadamard_quantize against numpy, against the transforms of recipes, and at its edges."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from qtrain_kernels import hadamard_quantize as declaration
from qtrain_kernels.counter_hash import random_signs
from qtrain_kernels.hadamard_quantize import hadamard_quantize
from torch import Tensor

from qtrain.quant.transforms import Transform


def _oracle_of_rows(*arguments) -> tuple[np.ndarray, np.ndarray]:
    spec = importlib.util.spec_from_file_location("rows", Path(__file__).with_name("test_quantize_rows.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.oracle(*arguments)


def _halves(y: np.ndarray) -> np.ndarray:
    """H of the last axis by its recursion, H_2n y = (H_n (even part)) +- (H_n (odd part)) interleaved: neighbours first."""
    B = y.shape[-1]
    if B == 1:
        return y
    sums, differences = _halves(y[..., 0::2] + y[..., 1::2]), _halves(y[..., 0::2] - y[..., 1::2])
    out = np.empty_like(y)
    out[..., 0::2], out[..., 1::2] = sums, differences
    return out


def oracle(x: Tensor, signs: Tensor | None, block: int, *how) -> tuple[np.ndarray, np.ndarray]:
    """Recursive butterflies in float32; then the oracle of quantize_rows."""
    y = np.array(x.to(torch.float32).tolist(), dtype=np.float32).reshape(x.shape)
    with np.errstate(all="ignore"):
        if signs is not None:
            y = y * np.array(signs.tolist(), dtype=np.float32)
        y = _halves(y.reshape(y.shape[0], y.shape[1] // block, block)).reshape(y.shape)
        y = y * np.float32(block**-0.5)
    return _oracle_of_rows(torch.from_numpy(y), *how)


def quantize(x: Tensor, block: int, signs: Tensor | None = None, qmax=127, stochastic=False):
    zero = torch.tensor(0)
    return hadamard_quantize(x, signs, block, qmax, stochastic, zero, zero, 3, zero)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("block", declaration.BLOCKS)
def test_it_is_the_transform_of_recipes(block: int, signed: bool) -> None:
    """y to float32's accuracy (a GEMM there, butterflies here), so that codes err by half a step of it."""
    x, zero = normal(9, 2 * block), torch.tensor(0)
    signs = random_signs(zero, zero, 5, 2 * block) if signed else None
    want = Transform.parse(f"{'rht' if signed else 'hadamard'}:{block}").forward(x, signs)
    torch.testing.assert_close(declaration.transform(x, signs, block), want, rtol=0, atol=3e-6)
    codes, scale = quantize(x, block, signs)
    error = (codes * scale[:, None] - want).abs() / scale[:, None]
    assert 0.4 < error.max() < 0.5 + 1e-3


def test_an_outlier_spreads_over_its_block_alone() -> None:
    x = torch.zeros(1, 64)
    x[0, 21] = 8.0
    codes, scale = quantize(x, 16)
    assert codes[0, :16].any().item() is codes[0, 32:].any().item() is False
    assert (codes[0, 16:32].abs() == 127).all()
    torch.testing.assert_close(scale, torch.tensor([2 / 127]))


def test_the_product_of_two_transformed_operands_is_that_of_the_operands() -> None:
    a, b, zero = normal(5, 96), normal(6, 96, seed=1), torch.tensor(0)
    signs = random_signs(zero, zero, 5, 96)
    (p, s), (q, t) = quantize(a, 32, signs), quantize(b, 32, signs)
    product = (p.float() * s[:, None]) @ (q.float() * t[:, None]).t()
    # Each side errs by at most half a step: 96 products of 3 (sigma 1) times 0.5 * 3 / 127, as a random walk
    assert 1e-3 < (product - a @ b.t()).abs().max() < 0.5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_poisons_its_row_and_no_other(value: float) -> None:
    x = normal(5, 32)
    clean = quantize(x, 16)
    x[2, 7] = value
    codes, scale = quantize(x, 16)
    assert (codes[2] == 0).all()
    assert torch.isnan(codes[2] * scale[2]).all()
    others = [0, 1, 3, 4]
    assert torch.equal(codes[others], clean[0][others])
    assert torch.equal(scale[others], clean[1][others])


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """The last row of a tensor of more than 2^31 elements equals the same row alone."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, zero = (
        torch.randn(2**19 + 3, 4096, device="cuda", dtype=torch.bfloat16),
        torch.tensor(0, device="cuda"),
    )
    how = (None, 64, 127, False, zero, zero, 3, zero)
    for whole, last in zip(hadamard_quantize(x, *how), hadamard_quantize(x[-1:], *how), strict=True):
        assert torch.equal(whole[-1:], last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(8)}, r"x must be \[R, C\]"),
        ({2: 16}, "block=16 of 8 columns: must be a power of two, 2 ... 1024, that divides them"),
        ({2: 6}, "block=6"),
        ({2: 1}, "block=1"),
        ({1: torch.ones(4)}, r"signs must be \[8\] float32"),
        ({1: torch.ones(8).bfloat16()}, "counter_hash.random_signs"),
        ({3: 0}, "qmax must be 1 ... 127"),
        ({5: torch.tensor(1.0)}, "seed must be a 0-d int64"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    zero = torch.tensor(0)
    arguments = [torch.zeros(2, 8), None, 4, 127, False, zero, zero, 0, zero]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        declaration.reference(*arguments)
