"""activation_quantize against numpy, against the ops it fuses, and at its edges."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from qtrain_kernels import activation_quantize as declaration
from qtrain_kernels import contract, quantize_rows
from qtrain_kernels.activation_quantize import ACTIVATIONS, activation_quantize
from torch import Tensor


def _tests_of(op: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(op, Path(__file__).with_name(f"test_{op}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _activated(h: np.ndarray, activation: str) -> np.ndarray:
    """f in float64, from its equation."""
    if activation == "gelu":
        return 0.5 * h * (1 + np.vectorize(math.erf, otypes=[float])(h / math.sqrt(2)))
    if activation == "gelu_tanh":
        return 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    if activation == "silu":
        return h / (1 + np.exp(-h))
    positive = np.where(h < 0, 0, h)
    return positive if activation == "relu" else positive**2


def oracle(h: Tensor, up: Tensor | None, activation: str, *rest) -> list[np.ndarray]:
    """y element by element in float64, rounded by torch to h's dtype; then the oracle of quantize_rows_columns."""
    rows, columns, counters = rest[:3], rest[3:6], rest[6:]

    def rounded(values: np.ndarray) -> np.ndarray:
        return torch.from_numpy(values).to(h.dtype).to(torch.float64).numpy().reshape(h.shape)

    with np.errstate(all="ignore"):
        y = rounded(_activated(np.array(h.tolist(), dtype=np.float64).reshape(h.shape), activation))
        if up is not None:
            y = rounded(y * np.array(up.tolist(), dtype=np.float64).reshape(h.shape))
    sides = (*rows[:2], False, rows[2], None, *columns[:2], False, columns[2], None)
    return _tests_of("quantize_rows_columns").oracle(
        torch.from_numpy(y.astype(np.float32)), *sides, *counters
    )


def quantize(
    h: Tensor, activation: str, up: Tensor | None = None, rows=(127, False, 3), columns=(0, False, 4)
):
    zero = torch.tensor(0)
    return activation_quantize(h, up, activation, *rows, *columns, zero, zero, zero)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TORCH = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "silu": F.silu,
}


def test_the_activations_are_those_of_torch() -> None:
    assert set(TORCH) == set(ACTIVATIONS)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", list(TORCH))
def test_codes_are_those_of_the_activation_in_two_steps(activation: str, gated: bool) -> None:
    """What the layer after the activation would quantize, in eager bfloat16; rows and columns."""
    h, up = 3 * normal(37, 130).bfloat16(), normal(37, 130, seed=1).bfloat16() if gated else None
    y = TORCH[activation](h) if up is None else TORCH[activation](h) * up
    got = quantize(h, activation, up, (127, True, 3), (7, False, 4))
    zero = torch.tensor(0)
    want = quantize_rows.quantize_rows(y, 127, True, zero, zero, 3, zero)
    want += quantize_rows.quantize_rows(y.t(), 7, False, zero, zero, 4, zero)
    assert y.dtype == torch.bfloat16
    assert all(contract.difference(activation_quantize, a, b) is None for a, b in zip(got, want, strict=True))


def test_y_is_rounded_before_it_is_quantized() -> None:
    """The error of one code step on y itself, not on f in float32: at qmax 127 bfloat16's rounding moves codes."""
    h = 3 * normal(64, 256).bfloat16()
    codes = quantize(h, "gelu")[0]
    unrounded = quantize(h.float(), "gelu")[0]
    assert (codes != unrounded).float().mean() > 0.01


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_what_is_not_finite_stays_visible_in_its_row_and_column(activation: str) -> None:
    h = normal(5, 40)
    h[2, 7] = math.nan
    rows, row_scale, columns, column_scale = quantize(h, activation, columns=(127, False, 4))
    assert (rows[2] == 0).all()
    assert (columns[7] == 0).all()
    assert row_scale.isnan().nonzero().flatten().tolist() == [2]
    assert column_scale.isnan().nonzero().flatten().tolist() == [7]


def test_relu_is_bit_equal_and_every_sign_survives_a_gate() -> None:
    h, up = normal(9, 33), normal(9, 33, seed=1)
    codes, scale = quantize(h, "relu", up)[:2]
    want = torch.where(h > 0, h * up, 0)
    assert torch.equal(scale, (want.abs().amax(1) / torch.tensor(127.0)).clamp(min=2.0**-100))
    assert torch.equal(codes.sign().float(), torch.where(codes != 0, want.sign(), 0))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """The last row of a tensor of more than 2^31 elements equals the same row alone."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    R, C = 2**19 + 3, 4096
    h = torch.randn(R, C, device="cuda", dtype=torch.bfloat16)
    zero = torch.tensor(0, device="cuda")
    both, none = (127, False, 4), (0, False, 4)
    last = activation_quantize(h[-1:], None, "silu", *both, *none, zero, zero, zero)
    for columns in (none, both):
        whole = activation_quantize(h, None, "silu", *both, *columns, zero, zero, zero)
        assert torch.equal(whole[0][-1:], last[0])
        assert torch.equal(whole[1][-1:], last[1])
        if columns[0]:
            y = torch.nn.functional.silu(h[:, -1])
            column = quantize_rows.quantize_rows(y[None], 127, False, zero, zero, 0, zero)
            assert torch.equal(whole[3][-1:], column[1])
            assert (whole[2][-1].int() - column[0][0].int()).abs().max() <= 1
            assert (whole[2][-1] != column[0][0]).float().mean() < declaration.CODE_FLIPS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3)}, r"x must be \[R, C\]"),
        ({1: torch.zeros(2, 4)}, r"up must be like h, \[2, 3\]"),
        ({1: torch.zeros(2, 3).half()}, "up must be like h"),
        ({2: "tanh"}, "activation='tanh': allowed are gelu, gelu_tanh, relu, relu2, silu"),
        ({3: 128}, "qmax must be 1 ... 127"),
        ({8: 2**31}, "signed 32-bit"),
        ({9: torch.tensor(1.0)}, "seed must be a 0-d int64"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    zero = torch.tensor(0)
    arguments = [torch.zeros(2, 3), None, "gelu", 127, False, 0, 127, False, 0, zero, zero, zero]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        declaration.reference(*arguments)
