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
from qtrain.nn.native_ops import references_run
from qtrain.nn.probe import FP8_SUMS

FP8_ROW = {
    "fprop": {"input": "e4m3_row", "weight": "e4m3_row"},
    "dgrad": {"grad_output": "e5m2_row_sr", "weight": "e4m3_row"},
    "wgrad": {"grad_output": "e4m3_row_sr", "input": "fprop"},
}
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


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_row"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_fp8_layers_pass_and_their_products_are_fp8(name: str, dtype: str) -> None:
    with references_run():
        census = census_of(FP8_ROW if name == "fp8_row" else name, dtype, compute="native", layers=2)
    assert census.failures() == []
    assert {o.kernel for o in census.quantized()} == {"fp8_scaled_mm"}
    assert {o.dtype for o in census.quantized()} <= {"float8_e4m3fn", "float8_e5m2"}
    assert census.flops_summary() == "fp8 100.0%"


@pytest.mark.parametrize("product", ["rounded_to_fp8", "without_a_scale", "int8"])
def test_an_fp8_product_of_other_numbers_fails(monkeypatch: pytest.MonkeyPatch, product: str) -> None:
    real = carrier.fp8_scaled_mm

    def fake(a: Tensor, b: Tensor, a_scale: Any, b_scale: Any, bias: Any, dtype: torch.dtype) -> Tensor:
        if product == "without_a_scale":
            return real(a, b, None, b_scale, bias, dtype)
        y = real(a, b, a_scale, b_scale, bias, dtype)
        coarse = y.to(torch.float8_e4m3fn) if product == "rounded_to_fp8" else (y * 8).round() / 8
        return coarse.to(dtype)

    monkeypatch.setattr(carrier, "fp8_scaled_mm", fake)
    with references_run():
        assert_fails(census_of(FP8_ROW, "bf16", compute="native"))


@pytest.mark.parametrize("error", [0.1, 10.0])
def test_sums_of_fp8_may_err_as_tensor_cores_do(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """Within FP8_SUMS of the magnitudes they pass, beyond it they fail, inside of the op."""
    from qtrain_kernels.fp8_scaled_mm import epilogue, fp8_scaled_mm

    def sloppy(a: Tensor, b: Tensor, a_scale: Any, b_scale: Any, bias: Any, dtype: torch.dtype) -> Tensor:
        wide = [t.to(torch.float32) for t in (a, b)]
        sums = wide[0] @ wide[1].t() + error * FP8_SUMS * (wide[0].abs() @ wide[1].abs().t())
        return epilogue(sums, a_scale, b_scale, bias, dtype)

    monkeypatch.setitem(fp8_scaled_mm.kernels, "cpu", "test:sloppy")
    monkeypatch.setattr(op_module, "_load", lambda target: sloppy)
    with references_run(), torch.library._scoped_library("qtrain", "IMPL") as library:
        library.impl("fp8_scaled_mm", fp8_scaled_mm._body("cpu", lambda: sloppy), "CPU")
        census = census_of(FP8_ROW, "fp32", compute="native")
    assert bool(census.failures()) == (error > 1), census.failures()


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
        census_of("int8_reused", compute="native"), text="count 0 executions where 21 products were seen"
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
        self: Any,
        x: Tensor,
        rows: Any,
        columns: Any,
        row_fold: Any = None,
        column_fold: Any = None,
        **more: Any,
    ) -> Any:
        return right(self, x, rows, columns, None, column_fold, **more)

    monkeypatch.setattr(carrier.NativeGemms, "quantized", fake)
    assert_fails(census_of("int8_reused", "bf16", compute="native"), name="dgrad.grad_output")
