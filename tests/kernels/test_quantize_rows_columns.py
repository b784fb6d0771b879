"""quantize_rows_columns against numpy, on every tier that this machine has, and against quantize_rows."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from qtrain_kernels import contract, cpu_tier, quantize_rows, quantize_rows_columns_cpu
from qtrain_kernels import quantize_rows_columns as declaration
from qtrain_kernels.quantize_rows_columns import quantize_rows_columns
from torch import Tensor

TIERS = [
    name for name in cpu_tier.TIERS if name == "torch" or not cpu_tier.NEEDS[name] - cpu_tier.cpu_flags()
]
F32 = np.float32


def _uniforms(*words: int) -> np.ndarray:
    """The hash in numpy, of the tests of quantize_rows."""
    spec = importlib.util.spec_from_file_location("rows", Path(__file__).with_name("test_quantize_rows.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._uniforms(*words)


def _quantized(
    y: np.ndarray, qmax: int, per_tensor: bool, u: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Codes and scales along the rows of y, element by element in float32."""
    with np.errstate(invalid="ignore", over="ignore"):
        amax = np.array([F32(0) if not len(row) else np.abs(row).max() for row in y], dtype=F32)
        if per_tensor and len(amax):
            amax[:] = amax.max()
        scale = np.maximum(amax / F32(qmax), F32(2.0**-100))
        v = y * (F32(1.0) / scale)[:, None]
    v[np.isnan(v)] = 0
    low = np.floor(v)
    if u is None:
        rest = v.astype(np.float64) - low
        code = low + (rest > 0.5) + ((rest == 0.5) & (low % 2 == 1))
    else:
        code = low + (u < (v - low))
    return np.clip(code, -qmax - 1, qmax).astype(np.int8), scale


def oracle(x: Tensor, *rest) -> list[np.ndarray]:
    rows, columns, (seed, step, row_offset) = rest[:5], rest[5:10], (int(t) for t in rest[10:])
    values = np.array(x.to(torch.float32).tolist(), dtype=F32).reshape(x.shape)
    found = []
    for along_columns, (qmax, stochastic, per_tensor, stream, fold) in ((False, rows), (True, columns)):
        if not qmax:
            found += [np.zeros((0, 0), dtype=np.int8), np.zeros(0, dtype=F32)]
            continue
        factor = F32(1) if fold is None else fold.numpy()
        with np.errstate(invalid="ignore", over="ignore"):
            y = values * (factor if fold is None or not along_columns else factor[:, None])
        u = _uniforms(seed, step, stream, *x.shape, row_offset) if stochastic else None
        if along_columns:
            y, u = y.T.copy(), None if u is None else u.T
        found += _quantized(y, qmax, per_tensor, u)
    return found


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", TIERS)
def test_every_tier_gives_the_bits_of_the_reference(name: str, threads: int) -> None:
    kernel = functools.partial(quantize_rows_columns.kernel("cpu"), on=cpu_tier._tier(name))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert contract.failures(quantize_rows_columns, implementation=kernel) == []
    finally:
        torch.set_num_threads(before)


def test_torch_s_chunks_give_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maxima over all of them, and the random bits of their own rows."""
    monkeypatch.setattr(quantize_rows_columns_cpu, "CHUNK", 300)
    kernel = functools.partial(quantize_rows_columns.kernel("cpu"), on=cpu_tier._tier("torch"))
    assert contract.failures(quantize_rows_columns, implementation=kernel) == []


@pytest.mark.parametrize("case", list(quantize_rows.quantize_rows.cases))
def test_rows_are_those_of_quantize_rows(case: str) -> None:
    x, qmax, stochastic, seed, step, stream, offset = quantize_rows.quantize_rows.cases[case]()
    nothing = (0, False, False, 0, None)
    got = quantize_rows_columns(x, qmax, stochastic, False, stream, None, *nothing, seed, step, offset)
    want = quantize_rows.reference(x, qmax, stochastic, seed, step, stream, offset)
    assert all(contract.same_bits(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, want, strict=False))
    assert torch.equal(got[1].isnan(), want[1].isnan())


@pytest.mark.parametrize("name", TIERS)
def test_no_copy_wanted(name: str) -> None:
    zero = torch.zeros((), dtype=torch.int64)
    arguments = (torch.randn(70, 65), *(0, False, False, 0, None) * 2, zero, zero, zero)
    outputs = quantize_rows_columns.kernel("cpu")(*arguments, on=cpu_tier._tier(name))
    assert [x.shape for x in outputs] == [x.shape for x in declaration.reference(*arguments)]


def test_columns_are_the_rows_of_the_transpose() -> None:
    x = torch.randn(70, 45, generator=torch.Generator().manual_seed(0))
    side, fold, nothing = (127, False, False, 0), torch.linspace(0.5, 2, 70), (0, False, False, 0, None)
    zero = torch.tensor(0)
    rows = quantize_rows_columns(x.t(), *side, fold, *nothing, zero, zero, zero)[:2]
    columns = quantize_rows_columns(x, *nothing, *side, fold, zero, zero, zero)[2:]
    assert all(torch.equal(a, b) for a, b in zip(rows, columns, strict=True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_the_gpu() -> None:
    """Of both copies, of rows far apart, and of columns far apart."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    counters = [torch.tensor(n, device="cuda") for n in (1, 2, 0)]
    sides = (127, True, False, 3, None, 7, False, False, 4, None)
    for R, C in ((2**19 + 3, 4096), (4096, 2**19 + 16)):
        x = torch.randn(R, C, device="cuda", dtype=torch.bfloat16)
        rows, _, columns, column_scale = quantize_rows_columns(x, *sides, *counters)
        offset = torch.tensor(R - 2, device="cuda")
        last = quantize_rows.quantize_rows(x[-2:], 127, True, *counters[:2], 3, offset)[0]
        assert torch.equal(rows[-2:], last)
        codes, scale = quantize_rows.quantize_rows(x[:, -3:].t(), 7, False, *counters[:2], 4, counters[2])
        assert torch.equal(columns[-3:], codes)
        assert torch.equal(column_scale[-3:], scale)
    x = torch.randn(4, 2**26, device="cuda", dtype=torch.bfloat16)
    for far in (x[:, :70], x[:, :70].t()):
        got = quantize_rows_columns(far, *sides, *counters)
        want = quantize_rows_columns(far.contiguous(), *sides, *counters)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(3)}, r"x must be \[R, C\]"),
        ({1: 128}, "qmax must be 1 ... 127"),
        ({6: -1}, "qmax must be 1 ... 127"),
        ({4: 2**31}, "signed 32-bit"),
        ({5: torch.ones(2)}, r"row_fold must be \[3\]"),
        ({10: torch.ones(2, dtype=torch.float64)}, r"column_fold must be \[2\] float32"),
        ({11: torch.tensor(1.0)}, "seed must be a 0-d int64"),
    ],
)
def test_bad_arguments_are_named(change, message) -> None:
    side, zero = (127, False, False, 0, None), torch.tensor(0)
    arguments = [torch.zeros(2, 3), *side, *side, zero, zero, zero]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        declaration.reference(*arguments)
