"""norm_quantize against numpy, against PyTorch's norms followed by quantize_rows, and at its edges."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from qtrain_kernels import contract
from qtrain_kernels import norm_quantize as declaration
from qtrain_kernels.norm_quantize import norm_quantize
from qtrain_kernels.quantize_rows import quantize_rows
from torch import Tensor


def _oracle_of_rows(*arguments) -> tuple[np.ndarray, np.ndarray]:
    spec = importlib.util.spec_from_file_location("rows", Path(__file__).with_name("test_quantize_rows.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.oracle(*arguments)


def oracle(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer_norm: bool, *how):
    """The norm row by row in float64, rounded by torch to x's dtype; then the oracle of quantize_rows."""
    values = np.array(x.tolist(), dtype=np.float64).reshape(x.shape)
    R, C = values.shape
    y, rstd, mean = np.zeros((R, C)), np.zeros(R, dtype=np.float32), np.zeros(R, dtype=np.float32)
    with np.errstate(all="ignore"):
        for r in range(R):
            row = values[r]
            if layer_norm:
                mean[r] = sum(row) / C
                row = row - sum(row) / C
            inverse = 1 / np.sqrt(sum(row * row) / C + eps)
            rstd[r] = inverse
            y[r] = row * inverse * np.array(weight.tolist()) + (
                0 if bias is None else np.array(bias.tolist())
            )
    rounded = torch.from_numpy(y).to(x.dtype)
    return *_oracle_of_rows(rounded, *how), rstd, mean if layer_norm else mean[:0]


def quantize(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps=1e-5, layer_norm=False):
    weight, zero = x.new_ones(x.shape[1]) if weight is None else weight, torch.tensor(0)
    return norm_quantize(x, weight, bias, eps, layer_norm, 127, True, zero, zero, 3, zero)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "layernorm_without_bias"])
def test_codes_are_those_of_torchs_norm(kind: str, dtype: torch.dtype) -> None:
    """The same codes, scale and statistics as PyTorch's own norm, followed by quantize_rows."""
    x = (2 * normal(65, 384) + 0.5).to(dtype)
    weight, bias = (1 + 0.1 * normal(384, seed=1)).to(dtype), (0.1 * normal(384, seed=2)).to(dtype)
    zero = torch.tensor(0)
    if kind == "rmsnorm":
        y = F.rms_norm(x, (384,), weight, 1e-5)
        got = quantize(x, weight)
        assert got[3].numel() == 0
    else:
        bias = bias if kind == "layernorm" else None
        y, mean, rstd = torch.native_layer_norm(x, (384,), weight, bias, 1e-5)
        got = quantize(x, weight, bias, layer_norm=True)
        torch.testing.assert_close(
            got[2], rstd.flatten().float(), rtol=1e-2, atol=0
        )  # rstd has x's dtype there
        torch.testing.assert_close(got[3], mean.flatten().float(), rtol=1e-2, atol=1e-6)
    want = quantize_rows(y, 127, True, zero, zero, 3, zero)
    assert all(contract.difference(norm_quantize, a, b) is None for a, b in zip(got, want, strict=False))


def test_weight_and_bias_belong_to_columns() -> None:
    """A weight that is zero but for one column leaves the codes of that column; a bias alone gives its own codes."""
    x, weight, bias = normal(7, 50), torch.zeros(50), torch.zeros(50)
    weight[13] = 2.0
    codes = quantize(x, weight)[0]
    assert codes.any(dim=0).nonzero().flatten().tolist() == [13]
    bias[5] = -3.0
    codes, scale, _, _ = quantize(x, torch.zeros(50), bias, layer_norm=True)
    assert (codes[:, 5] == -127).all()
    assert codes.any(dim=0).nonzero().flatten().tolist() == [5]
    torch.testing.assert_close(scale, torch.full((7,), 3 / 127))


def test_the_statistics_of_a_row_are_its_own() -> None:
    x = normal(4, 200) * torch.tensor([1.0, 100.0, 1e-3, 1.0])[:, None]
    _, _, rstd, _ = quantize(x, eps=0.0)
    torch.testing.assert_close(rstd, x.double().square().mean(1).rsqrt().float())
    _, _, rstd, mean = quantize(x + 5, eps=0.0, layer_norm=True)
    torch.testing.assert_close(mean, (x + 5).double().mean(1).float())
    torch.testing.assert_close(
        rstd[:2], (x + 5).double().var(1, correction=0).rsqrt().float()[:2], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_poisons_its_row_and_no_other(value: float, layer_norm: bool) -> None:
    x = normal(5, 40)
    clean = quantize(x, layer_norm=layer_norm)
    x[2, 7] = value
    codes, scale, _, _ = quantize(x, layer_norm=layer_norm)
    assert (codes[2] == 0).all()
    assert scale.isnan().nonzero().flatten().tolist() == [2]
    others = [0, 1, 3, 4]
    assert torch.equal(codes[others], clean[0][others])


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """The last row of a tensor of more than 2^31 elements equals the same row alone."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = torch.randn(2**19 + 3, 4096, device="cuda", dtype=torch.bfloat16)
    weight, zero = x.new_ones(4096), torch.tensor(0, device="cuda")
    how = (weight, None, 1e-5, True, 127, False, zero, zero, 3, zero)
    for whole, last in zip(norm_quantize(x, *how), norm_quantize(x[-1:], *how), strict=True):
        assert torch.equal(whole[-1:], last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3)}, r"x must be \[R, C\]"),
        ({0: torch.zeros(3, 0)}, "x has no columns"),
        ({1: torch.ones(2)}, r"weight must be \[3\]"),
        ({2: torch.ones(3, dtype=torch.float64)}, r"bias must be \[3\] .* not \[3\] torch.float64"),
        ({1: torch.ones(3, device="meta")}, "on meta"),
        ({3: -1e-5}, "eps=-1e-05: must be at least 0"),
        ({3: math.nan}, "eps=nan"),
        ({5: 0}, "qmax must be 1 ... 127"),
        ({7: torch.tensor(1.0)}, "seed must be a 0-d int64"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    zero = torch.tensor(0)
    arguments = [torch.zeros(2, 3), torch.ones(3), None, 1e-5, False, 127, False, zero, zero, 0, zero]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        declaration.reference(*arguments)
