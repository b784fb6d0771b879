"""The census of native layers: what ran must be the int8 product, inside of its op and outside."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from census_models import assert_fails, census_of, gpt, loss_of
from qtrain_kernels import op as op_module
from qtrain_kernels.int8_scaled_mm import int8_scaled_mm
from torch import Tensor

import qtrain.nn.native as carrier
from qtrain.nn import take_census

NATIVE = ["int8_reused", "tensor_reused", "saved_stochastic"]


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_native_layers_pass_and_their_products_are_int8(name: str, dtype: str) -> None:
    census = census_of(name, dtype, compute="native", layers=2)
    assert census.failures() == []
    assert {o.kernel for o in census.quantized()} == {"int8_scaled_mm"}
    assert {o.dtype for o in census.quantized()} == {"int8"}
    assert set(census.flops) == {"int8"}
    assert census.flops_summary() == "int8 100.0%"
    assert census.to_dict()["flops_summary"] == "int8 100.0%"


def test_flops_by_precision_count_what_stays_in_high_precision() -> None:
    """A GEMM costs 2 T I O: two in bf16 (dgrad and wgrad), one in int8."""
    specs = {"fprop": {"input": "int8_row", "weight": "int8_row"}}
    census = census_of(specs, "bf16", compute="native")
    assert census.failures() == []
    assert census.flops["bf16"] == 2 * census.flops["int8"]
    assert census.flops_summary() == "bf16 66.7%, int8 33.3%"
    assert set(census_of("int8_reused", "bf16").flops) == {"bf16"}


def _instead(product: Any) -> Any:
    """An int8_scaled_mm of the layer: the real one runs, named, seen and counted, and ``product`` is given out."""

    def fake(a: Tensor, b: Tensor, a_scale: Any, b_scale: Any, bias: Any, dtype: torch.dtype) -> Tensor:
        int8_scaled_mm(a, b, a_scale, b_scale, bias, dtype)
        return product(a, b, a_scale, b_scale, bias, dtype)

    return fake


def _bf16_of_codes(a: Tensor, b: Tensor, a_scale: Any, b_scale: Any, bias: Any, dtype: torch.dtype) -> Tensor:
    """What simulated does: codes are exact in bf16, and the product is rounded to it before it is scaled."""
    y = (a.to(torch.bfloat16) @ b.to(torch.bfloat16).t()).to(torch.float32)
    for factor in (a_scale if a_scale is None else a_scale[:, None], b_scale):
        y = y if factor is None else y * factor
    return (y if bias is None else y + bias).to(dtype)


def _bf16_dequantized(a: Tensor, b: Tensor, a_scale: Any, b_scale: Any, bias: Any, dtype: torch.dtype) -> Tensor:  # fmt: skip
    left = (a.float() if a_scale is None else a * a_scale[:, None]).to(torch.bfloat16)
    right = (b.float() if b_scale is None else b * b_scale[:, None]).to(torch.bfloat16)
    y = left @ right.t()
    return (y if bias is None else y + bias).to(dtype)


@pytest.mark.parametrize("product", [_bf16_of_codes, _bf16_dequantized])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_bf16_product_beside_the_real_one_fails(monkeypatch, product, dtype: str) -> None:
    """Names, codes and counters stay; what the layer gives out is a bf16 product of the very same numbers."""
    monkeypatch.setattr(carrier, "int8_scaled_mm", _instead(product))
    census = census_of("int8_reused", dtype, compute="native")
    assert_fails(census, name="y")
    assert_fails(census, name="dW")
    texts = ("are not what int8_scaled_mm gave out", "computed by mm on bfloat16, configured as native")
    assert any(text in o.problem for o in census.observations for text in texts)


@pytest.mark.parametrize("product", [_bf16_of_codes, _bf16_dequantized])
def test_a_bf16_product_inside_of_the_op_fails(monkeypatch, product) -> None:
    """The op's body multiplies in bf16; its name, its operands and its counter are those of the real one."""
    before = int8_scaled_mm.calls
    monkeypatch.setattr("qtrain_kernels.int8_scaled_mm_cpu.launch", product)
    op_module._load.cache_clear()
    try:
        census = census_of("int8_reused", "bf16", compute="native")
    finally:
        op_module._load.cache_clear()
    assert int8_scaled_mm.calls == before + 21
    assert_fails(
        census, name="y", text="rows that int8_scaled_mm gave out are not the product of its int8 codes"
    )


def test_native_that_was_simulated_fails() -> None:
    model, report = gpt("int8_reused", compute="native")
    for layer in model.modules():
        if getattr(layer, "native", False):
            layer.native = False
    assert_fails(
        take_census(model, report, loss_of("bf16")), text="computed by mm on bfloat16, configured as native"
    )


def test_simulated_that_was_native_fails() -> None:
    model, report = gpt("int8_reused", compute="native")
    report = replace(report, layers=tuple(replace(layer, native=False) for layer in report.layers))
    assert_fails(
        take_census(model, report, loss_of("bf16")), text="computed natively, configured as simulated"
    )


def test_a_product_that_is_not_counted_fails(monkeypatch) -> None:
    calls = iter([0, 0, 0])
    monkeypatch.setattr("qtrain.nn.census._native_calls", lambda: next(calls, 0))
    assert_fails(
        census_of("int8_reused", compute="native"), text="counts 0 executions where 21 products were seen"
    )


@pytest.mark.parametrize("scale", ["a", "b"])
def test_a_dropped_scale_fails(monkeypatch, scale: str) -> None:
    def fake(a: Tensor, b: Tensor, a_scale: Any, b_scale: Any, bias: Any, dtype: torch.dtype) -> Tensor:
        if scale == "a":
            return int8_scaled_mm(a, b, None, b_scale, bias, dtype)
        return int8_scaled_mm(a, b, a_scale, None, bias, dtype)

    monkeypatch.setattr(carrier, "int8_scaled_mm", fake)
    assert_fails(census_of("int8_reused", "bf16", compute="native"), text="do not follow from the product")


def test_swapped_folds_fail(monkeypatch) -> None:
    """g is scaled by the weight's scales for dgrad and by the input's for wgrad."""
    right = carrier.NativeGemms.quantized

    def fake(
        self: Any, x: Tensor, rows: Any, columns: Any, row_fold: Any = None, column_fold: Any = None
    ) -> Any:
        return right(self, x, rows, columns, None, column_fold)

    monkeypatch.setattr(carrier.NativeGemms, "quantized", fake)
    assert_fails(census_of("int8_reused", "bf16", compute="native"), name="dgrad.grad_output")
