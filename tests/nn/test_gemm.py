"""The door to the GEMM: how operands enter, what is multiplied, and what the epilogue scales."""

from __future__ import annotations

import pytest
import torch

from qtrain.nn.gemm import GemmOperand, enter, enter_transposed, multiplies_codes, quantized_gemm
from qtrain.quant import QuantSpec

FOLDING = ["int4_row", "int8_tensor", "e4m3_row", "e5m2_tensor", "midrise8_row", "int8_row_asym", "e2m1_row"]
LYING_ON_K = ["int4_column", "int4_group4", "int8_block2x2", "mxfp8", "nvfp4", "e4m3_block4x8"]


def test_codes_are_multiplied_where_scales_fold_and_levels_are_bfloat16_numbers() -> None:
    assert all(multiplies_codes(QuantSpec.parse(s)) for s in [*FOLDING, "linear4_nozero_row"])
    assert not any(multiplies_codes(QuantSpec.parse(s)) for s in [*LYING_ON_K, "dynamic8_row", "nf4_row"])


@pytest.mark.parametrize("text", FOLDING)
def test_every_code_enters_bfloat16_exactly(text: str) -> None:
    spec = QuantSpec.parse(text)
    levels = spec.number_format.levels()
    if not spec.symmetric:  # values have the zero point taken off
        levels = torch.cat([levels, -levels])
    values, scale = levels[None].repeat(2, 1), torch.tensor([[3.0], [0.7]])
    entered = enter(values, scale, spec, torch.bfloat16)
    assert entered.values.dtype == torch.bfloat16
    assert torch.equal(entered.values.float(), values)
    assert entered.scale is scale


def test_operands_whose_scales_lie_on_the_contraction_enter_dequantized() -> None:
    spec = QuantSpec.parse("int4_group2")
    values, scale = torch.tensor([[1.0, -7.0, 3.0]]), torch.tensor([[0.5, 0.1]])
    entered = enter(values, scale, spec, torch.bfloat16)
    assert entered.scale is None
    assert torch.equal(entered.values, torch.tensor([[0.5, -3.5, 0.3]]).to(torch.bfloat16))


def test_reused_operand_with_one_scale_keeps_it() -> None:
    entered = GemmOperand(torch.arange(6.0).reshape(2, 3), torch.tensor([[0.5]]))
    for fold in (False, True):
        other, folded = enter_transposed(entered, fold=fold)
        assert torch.equal(other.values, entered.values.t())
        assert other.scale is entered.scale
        assert folded is None


def test_reused_operand_without_scale_is_transposed() -> None:
    other, folded = enter_transposed(GemmOperand(torch.arange(6.0).reshape(2, 3), None), fold=True)
    assert torch.equal(other.values, torch.arange(6.0).reshape(2, 3).t())
    assert other.scale is None
    assert folded is None


def test_reused_rows_give_their_scales_to_the_other_operand_or_are_dequantized() -> None:
    values, scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]]), torch.tensor([[0.5], [0.3]])
    entered = GemmOperand(values.to(torch.bfloat16), scale)
    other, folded = enter_transposed(entered, fold=True)
    assert torch.equal(other.values, values.t().to(torch.bfloat16))
    assert other.scale is None
    assert torch.equal(folded, scale.t())
    other, folded = enter_transposed(entered, fold=False)
    assert folded is None
    assert other.scale is None
    assert other.values.dtype == torch.bfloat16
    assert torch.equal(other.values, (values * scale).to(torch.bfloat16).t())


A, B = torch.tensor([[1.0, 2.0], [3.0, -4.0], [0.0, 5.0]]), torch.tensor([[2.0, 1.0], [-3.0, 6.0]])
ROWS, COLUMNS = torch.tensor([[0.5], [2.0], [4.0]]), torch.tensor([[3.0], [0.25]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.tensor([10.0, -20.0])])
@pytest.mark.parametrize("a_scale", [None, ROWS, torch.tensor([[0.5]])])
@pytest.mark.parametrize("b_scale", [None, COLUMNS, torch.tensor([[4.0]])])
def test_gemm_scales_rows_and_columns_and_adds_the_bias(dtype, bias, a_scale, b_scale) -> None:
    y = quantized_gemm(GemmOperand(A.to(dtype), a_scale), GemmOperand(B.to(dtype), b_scale), dtype, bias)
    expected = torch.empty(3, 2)
    for m in range(3):
        for n in range(2):
            expected[m, n] = float(A[m] @ B[n])
            if a_scale is not None:
                expected[m, n] *= float(a_scale[min(m, len(a_scale) - 1), 0])
            if b_scale is not None:
                expected[m, n] *= float(b_scale[min(n, len(b_scale) - 1), 0])
            if bias is not None:
                expected[m, n] += float(bias[n])
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))  # small integers and powers of two: exact in bfloat16


def test_bias_and_scales_are_applied_in_float32() -> None:
    """257 is no bfloat16 number: 256.5 + 0.5 = 257 rounds to 256, but 2 * 128 + 1.5 = 257.5 to 258."""
    a, b = torch.tensor([[2.0]]).bfloat16(), torch.tensor([[128.0]]).bfloat16()
    y = quantized_gemm(GemmOperand(a, None), GemmOperand(b, None), torch.float32, torch.tensor([1.5]))
    assert y.dtype == torch.float32
    assert float(y) == 257.5
    y = quantized_gemm(GemmOperand(a, torch.tensor([[1.00390625]])), GemmOperand(b, None), torch.float32)
    assert float(y) == 257.0


def test_a_bfloat16_bias_is_added_in_float32() -> None:
    a, b = torch.tensor([[1.0]]).bfloat16(), torch.tensor([[256.0]]).bfloat16()
    bias = torch.tensor([1.0]).bfloat16()
    assert float(quantized_gemm(GemmOperand(a, None), GemmOperand(b, None), torch.float32, bias)) == 257.0


def test_the_stated_error_of_a_rounding_is_reached_and_not_passed() -> None:
    """257 rounds to 256: 2^-8 of the result, the most that rounding to bfloat16 does."""
    a, b = torch.tensor([[1.0, 1.0]]).bfloat16(), torch.tensor([[256.0, 1.0]]).bfloat16()
    y = quantized_gemm(GemmOperand(a, None), GemmOperand(b, None), torch.bfloat16)
    assert float(y) == 256.0
    assert 2.0**-9 < 1 / 257 <= 2.0**-8


def test_output_dtype_is_the_asked_one() -> None:
    a = GemmOperand(torch.ones(2, 3).bfloat16(), None)
    assert quantized_gemm(a, a, torch.float32).dtype == torch.float32
    assert quantized_gemm(a, a, torch.bfloat16).dtype == torch.bfloat16


def test_integer_codes_give_exact_products_in_bf16_below_256() -> None:
    torch.manual_seed(0)
    a, b = torch.randint(-7, 8, (5, 4)).float(), torch.randint(-7, 8, (6, 4)).float()
    y = quantized_gemm(GemmOperand(a.bfloat16(), None), GemmOperand(b.bfloat16(), None), torch.bfloat16)
    assert torch.equal(y.float(), a @ b.t())


def test_empty_contraction_sums_to_zero() -> None:
    empty = GemmOperand(torch.zeros(2, 0), torch.zeros(2, 0))
    other = GemmOperand(torch.zeros(3, 0), torch.zeros(3, 0))
    assert torch.equal(quantized_gemm(empty, other, torch.float32), torch.zeros(2, 3))
    bias = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(quantized_gemm(empty, other, torch.float32, bias), bias.expand(2, 3))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3).bfloat16()),
        (torch.zeros(2, 3), torch.zeros(4, 5)),
    ],
)
def test_mismatched_operands_are_named(a: torch.Tensor, b: torch.Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"operands \(2, 3\) torch\.float32 and \(4, .*one dtype and one contraction"
    ):
        quantized_gemm(GemmOperand(a, None), GemmOperand(b, None), torch.float32)
