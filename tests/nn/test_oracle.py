"""The oracle's parts: operands in both layouts, and results through masks and transforms.

That its numbers follow the equations for every recipe is in ``test_linear``.
"""

from __future__ import annotations

import pytest
import torch
from layer_recipes import LAYERS

from qtrain.nn import Clock
from qtrain.nn.clock import Draws
from qtrain.nn.oracle import OracleGemm, linear_oracle
from qtrain.quant import LinearRecipe, dequantize_values, quantize_values

X, W, G = (torch.randn(s, generator=torch.Generator().manual_seed(7)) for s in ((16, 32), (24, 32), (16, 24)))


def gemms(name: str) -> tuple[LinearRecipe, dict[str, OracleGemm]]:
    recipe = LinearRecipe(**LAYERS[name])
    return recipe, linear_oracle(recipe, Draws(Clock(3).counters, 11), X, W, G)


@pytest.mark.parametrize("name", ["w4a8", "int8_reused", "group_reused", "tensor_reused", "nvfp4", "quest"])
def test_names_and_shapes(name: str) -> None:
    _, found = gemms(name)
    assert {k: g.names for k, g in found.items()} == {
        "fprop": ("fprop.input", "fprop.weight"),
        "dgrad": ("dgrad.grad_output", "dgrad.weight"),
        "wgrad": ("wgrad.grad_output", "wgrad.input"),
    }
    shapes = {"fprop": ((16, 32), (24, 32)), "dgrad": ((16, 24), (32, 24)), "wgrad": ((24, 16), (32, 16))}
    for key, gemm in found.items():
        a, b = shapes[key]
        assert gemm.a.source.shape == gemm.a.multiplied.shape == a
        assert gemm.b.source.shape == gemm.b.multiplied.shape == b
        assert gemm.result.shape == (a[0], b[0])
        assert gemm.result.dtype == torch.float32


def test_high_precision_operands_are_their_source() -> None:
    _, found = gemms("weight_int8")
    assert found["fprop"].a.spec is None
    assert torch.equal(found["fprop"].a.multiplied, X)
    assert torch.equal(found["dgrad"].b.multiplied, W.t())
    assert not any(g.mixes for g in found.values())


def test_a_reused_operand_gives_its_scales_to_the_gradient_where_it_can() -> None:
    recipe, found = gemms("int8_reused")
    q = quantize_values(W, recipe.fprop.weight)
    b = found["dgrad"].b
    assert (b.transposed, b.folded) == (True, True)
    assert torch.equal(b.multiplied, q.values.t())
    assert torch.equal(found["dgrad"].a.source, G * q.scale.t())
    for name in ("group_reused", "reused_below_high_precision_gradient"):
        recipe, found = gemms(name)
        q = quantize_values(W, recipe.fprop.weight)
        assert (found["dgrad"].b.transposed, found["dgrad"].b.folded) == (True, False)
        assert torch.equal(
            found["dgrad"].b.multiplied, dequantize_values(q.values, q.scale, recipe.fprop.weight).t()
        )
        assert torch.equal(found["dgrad"].a.source, G)
    _, found = gemms("tensor_reused")
    assert not found["dgrad"].b.folded
    assert torch.equal(found["dgrad"].a.source, G)


@pytest.mark.parametrize(("rows", "folded"), [(1, False), (2, True)])
def test_one_scale_factors_out_and_two_do_not(rows: int, folded: bool) -> None:
    recipe = LinearRecipe(**LAYERS["int8_reused"])
    found = linear_oracle(recipe, Draws(None, 0), X, W[:rows], G[:, :rows])
    assert found["dgrad"].b.folded == folded


def test_results_are_given_out_through_mask_and_transform() -> None:
    recipe, found = gemms("quest")
    transform = recipe.fprop.transform
    inside = quantize_values(transform.forward(X), recipe.fprop.input).inside
    d = torch.randn(16, 32)
    assert found["dgrad"].mixes
    assert torch.equal(found["dgrad"].given_out(d), transform.inverse(torch.where(inside, d, 0.0)))
    recipe, found = gemms("quest_high_precision_backward")
    transform = recipe.fprop.transform
    inside = quantize_values(transform.forward(W), recipe.fprop.weight).inside
    d = torch.randn(24, 32)
    expected = transform.inverse(torch.where(inside, transform.forward(d), 0.0))
    assert torch.equal(found["wgrad"].given_out(d), expected)
    assert found["fprop"].given_out(d) is d
    assert not found["fprop"].mixes


def test_inputs_of_any_float_dtype_are_read_as_float32() -> None:
    recipe = LinearRecipe(**LAYERS["int8_reused"])
    draws = Draws(None, 0)
    b = linear_oracle(recipe, draws, X.bfloat16(), W.bfloat16().requires_grad_(), G.bfloat16())
    f = linear_oracle(recipe, draws, X.bfloat16().float(), W.bfloat16().float(), G.bfloat16().float())
    for key, gemm in b.items():
        assert torch.equal(gemm.result, f[key].result)
        assert not gemm.result.requires_grad
