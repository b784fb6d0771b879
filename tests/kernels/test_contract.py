"""Every op of the registry: its reference against numpy, its registration, and the contract of its kernels.

The numpy computation of op NAME is ``oracle`` in ``test_NAME.py``, with the op's signature; an op without one fails.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from qtrain_kernels import contract
from qtrain_kernels import quantize_rows as declaration
from qtrain_kernels.counter_hash import random_bits, uniform
from qtrain_kernels.op import Op, all_ops

OPS = all_ops()
FEW = 6  # cases that are traced; the values of all cases are checked by the other tests


def oracle(name: str) -> Callable[..., Any]:
    path = Path(__file__).with_name(f"test_{name}.py")
    spec = importlib.util.spec_from_file_location(f"oracle_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.oracle


def few_cases(op: Op[Any, Any]) -> list[tuple[Any, ...]]:
    names = list(op.cases)
    return [op.cases[name]() for name in names[:: max(1, len(names) // FEW)]]


@pytest.fixture(params=OPS.values(), ids=OPS)
def op(request) -> Op[Any, Any]:
    return request.param


def test_the_registry_finds_the_ops():
    assert "quantize_rows" in OPS


def test_reference_equals_numpy(op):
    compute = oracle(op.name)
    for name, case in op.cases.items():
        got = contract.effects(op, op.reference, case())
        for i, (a, b) in enumerate(zip(got, compute(*case()), strict=True)):
            want = b if isinstance(b, torch.Tensor) else torch.from_numpy(np.asarray(b))
            assert contract.difference(op, a, want) is None, f"{name}, output {i}"


def test_contract_on_cpu(op):
    assert contract.failures(op, "cpu") == []


@pytest.mark.gpu
def test_contract_on_cuda(op):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert contract.failures(op, "cuda") == []


def checks_of(inputs: tuple[Any, ...]) -> tuple[str, ...]:
    """opcheck's schema test compares the inputs before and after, which torch cannot for fp8; the contract does."""
    fp8 = any(isinstance(x, torch.Tensor) and "float8" in str(x.dtype) for x in inputs)
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    return checks if fp8 else ("test_schema", *checks)


def test_registration(op):
    """Schema, fake, autograd registration and functionalisation, as torch checks them."""
    for inputs in few_cases(op):
        # To opcheck, NaN is not NaN
        if not any(out.isnan().any() for out in contract.effects(op, op, inputs)):
            torch.library.opcheck(op.overload, inputs, test_utils=checks_of(inputs))


def test_fullgraph_compile_gives_the_same_bits_and_counts(op):
    for inputs, again, traced in zip(few_cases(op), few_cases(op), few_cases(op), strict=True):
        torch.compiler.reset()
        compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
        want = contract.effects(op, op, inputs)
        compiled(*traced)
        before = op.calls
        got = contract.effects(op, compiled, again)
        assert op.calls == before + 1
        assert all(contract.same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_tracing_is_not_counted(op):
    inputs = few_cases(op)[0]
    before = op.calls
    with torch._subclasses.FakeTensorMode() as mode:
        op(*torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    assert op.calls == before


# What a wrong kernel looks like: each of these is one change to the reference of quantize_rows.


def _variant(half_away=False, row_offset_used=True, bits_per_column=True, numerator=None, floor_at=2.0**-100):
    def run(x, qmax, stochastic, seed, step, stream, row_offset):
        R, C = x.shape
        x = x.to(torch.float32)
        amax = x.abs().amax(dim=1) if C else x.new_zeros(R)
        scale = (amax / (numerator or qmax)).clamp(min=floor_at)
        v = x * scale.reciprocal()[:, None]
        v = torch.where(v.isnan(), 0.0, v)
        if stochastic:
            offset = row_offset if row_offset_used else 0
            u = uniform(random_bits(seed, step, stream, R, C, offset))
            u = u if bits_per_column else u[:, :1]
            v = v.floor() + (u < v - v.floor())
        else:
            v = v.sign() * (v.abs() + 0.5).floor() if half_away else v.round()
        return v.clamp(-qmax - 1, qmax).to(torch.int8).contiguous(), scale

    return run


def _forgets_the_last_column(*args):
    codes, scale = declaration.reference(*args)
    hole = torch.empty_like(codes)
    hole[:, :-1] = codes[:, :-1]
    return hole, scale


def _drops_nan(x, *rest):
    return declaration.reference(x.nan_to_num(nan=0.0, posinf=float("inf"), neginf=-float("inf")), *rest)


def _flushes_subnormals(x, *rest):
    return declaration.reference(torch.where(x.abs() < 2.0**-126, 0, x), *rest)


def _fused(x, qmax, stochastic, *rest):
    """x * inv + magic rounded once, as a contracted multiply-add would."""
    codes, scale = declaration.reference(x, qmax, stochastic, *rest)
    if stochastic:
        return codes, scale
    v = x.double() * scale.reciprocal()[:, None].double()
    v = torch.where(v.isnan(), 0.0, v)
    return v.round().clamp(-qmax - 1, qmax).to(torch.int8).contiguous(), scale


def _writes_its_input(x, *rest):
    result = declaration.reference(x, *rest)
    if x.numel():
        x.view(-1)[0] = 1.0 if x.is_contiguous() else x[0, 0]
    return result


def _transposed_output(*args):
    codes, scale = declaration.reference(*args)
    return codes.t().contiguous().t(), scale


WRONG = {
    "returns other strides": _transposed_output,
    "rounds halves away from zero": _variant(half_away=True),
    "drops row_offset": _variant(row_offset_used=False),
    "one random number a row": _variant(bits_per_column=False),
    "divides by 128": _variant(numerator=128),
    "another floor of the scale": _variant(floor_at=2.0**-99),
    "leaves a column unwritten": _forgets_the_last_column,
    "drops NaN from the maximum": _drops_nan,
    "flushes subnormals": _flushes_subnormals,
    "fuses multiply and rounding": _fused,
    "writes its input": _writes_its_input,
}


def test_the_unchanged_variant_passes():
    assert contract.failures(OPS["quantize_rows"], implementation=_variant()) == []


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_breaks_the_contract(wrong):
    assert contract.failures(OPS["quantize_rows"], implementation=wrong) != []


@pytest.mark.parametrize(
    ("flips", "size", "holds"), [(1, 1, True), (2, 1, True), (3, 1, False), (1, 2, False), (0, 0, True)]
)
def test_codes_may_flip_by_one_in_the_stated_share(monkeypatch, flips, size, holds):
    op = OPS["quantize_rows"]
    monkeypatch.setattr(op, "code_flips", 2 / (7 * 33))
    case = "fp32/int8/nearest"
    monkeypatch.setattr(op, "cases", {case: op.cases[case]})

    def run(*args):
        codes, scale = declaration.reference(*args)
        codes.view(-1)[:flips] += -size * codes.view(-1)[:flips].sign() + size * (codes.view(-1)[:flips] == 0)
        return codes, scale

    assert (contract.failures(op, implementation=run) == []) is holds
