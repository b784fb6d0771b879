"""QuantizedLinear between forward and backward: masks, what is kept, gradients that nobody needs, refusals."""

from __future__ import annotations

from typing import Any

import equations
import pytest
import torch
from layer_recipes import LAYERS
from layer_steps import MOMENT, hostile, make, step
from torch import Tensor, nn

from qtrain.nn import Clock, QuantizedLinear
from qtrain.quant import LinearRecipe, QuantSpec, quantize, quantize_values
from qtrain.quant.qtensor import dequantize


def test_masks_apply_in_the_basis_of_the_forward() -> None:
    """dx = H^T (M * (g W_H)): the mask zeroes coordinates of the rotated gradient, none of the gradient itself."""
    recipe = LinearRecipe(**LAYERS["quest_high_precision_backward"])
    layer, x = make(recipe, 32, 16, bias=False), hostile(16, 32)
    seen = step(layer, x, autocast=False)
    H = torch.from_numpy(equations.rotation(recipe.fprop.transform, MOMENT, "fprop", 32)).float()
    for gradient, tensor, other in ((seen["dx"], x, layer.weight), (seen["dW"], layer.weight, x)):
        spec = recipe.fprop.input
        inside = quantize_values((tensor @ H).detach(), spec).inside
        assert 0.005 < 1 - inside.float().mean() < 0.2
        raw = seen["g"] @ other if tensor is x else seen["g"].t() @ other
        torch.testing.assert_close(
            gradient @ H, torch.where(inside, raw @ H, 0.0).detach(), rtol=1e-4, atol=1e-4
        )
        assert (gradient != 0).float().mean() > 0.9


def test_straight_through_has_no_mask() -> None:
    spec = {"format": "int4", "clip": "rms:1"}
    layer = make(LinearRecipe(fprop={"input": spec, "weight": spec}), 37, 23)
    x = hostile(15, 37)
    seen = step(layer, x, autocast=False)
    torch.testing.assert_close(seen["dx"], (seen["g"] @ layer.weight).detach(), rtol=1e-5, atol=1e-5)


def saved(layer: QuantizedLinear, x: Tensor, *, autocast: bool = False) -> list[Tensor]:
    """The distinct storages that a forward saves, less those of the parameters and of the clock."""
    found: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        layer(x)
    found.pop(layer.weight.untyped_storage().data_ptr())
    assert any(t.dtype == torch.int64 for t in found.values()) == layer.recipe.stochastic
    return [t for t in found.values() if t.dtype != torch.int64]


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_quantized_keeps_the_packed_bytes_and_no_float_of_x(autocast: bool) -> None:
    recipe = LinearRecipe(
        fprop={"input": "int4_row", "weight": "int8_row"},
        wgrad={"grad_output": "int8_row", "input": "fprop"},
        saved="quantized",
    )
    x = hostile(15, 37).requires_grad_()
    kept = saved(make(recipe, 37, 23), x, autocast=autocast)
    packed = quantize(x.detach(), recipe.fprop.input)
    assert sum(t.untyped_storage().nbytes() for t in kept) == packed.nbytes == 15 * 19 + 15 * 4
    assert {(t.dtype, tuple(t.shape)) for t in kept} == {(torch.float32, (15, 1)), (torch.uint8, (15, 19))}


def test_saved_quantized_with_an_own_spec_keeps_codes_along_the_tokens() -> None:
    recipe = LinearRecipe(**LAYERS["saved_own"])
    x = hostile(15, 37).requires_grad_()
    kept = saved(make(recipe, 37, 23), x)
    packed = quantize(x.detach().t().contiguous(), recipe.wgrad.input)
    codes, scale = sorted(kept, key=lambda t: str(t.dtype), reverse=True)
    assert torch.equal(codes, packed.codes)
    assert torch.equal(scale, packed.scale)


@pytest.mark.parametrize("layout", ["nvfp4", "mxfp4", "int4_row_asym"])
def test_saved_quantized_keeps_every_part_of_the_scale(layout: str) -> None:
    recipe = LinearRecipe(fprop={"input": layout}, wgrad={"input": "fprop"}, saved="quantized")
    x = hostile(16, 32).requires_grad_()
    kept = saved(make(recipe, 32, 16), x)
    packed = quantize(x.detach(), recipe.fprop.input)
    assert sum(t.untyped_storage().nbytes() for t in kept) == packed.nbytes


def test_estimators_keep_a_bit_an_element() -> None:
    spec = "midrise4_row_gaussian_trust"
    recipe = LinearRecipe(fprop={"input": spec, "weight": spec})
    x = hostile(15, 37).requires_grad_()
    kept = saved(make(recipe, 37, 23), x)
    assert sorted(tuple(t.shape) for t in kept if t.dtype == torch.uint8) == [(15, 5), (23, 5)]


@pytest.mark.parametrize(("autocast", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_high_precision_keeps_x_itself_where_the_dtype_agrees(autocast: bool, dtype: torch.dtype) -> None:
    for name in ("w4a8", "int8_reused", "wgrad_input"):
        x = hostile(15, 37).to(dtype).requires_grad_()
        kept = saved(make(LinearRecipe(**LAYERS[name]), 37, 23), x, autocast=autocast)
        assert x.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in kept}, name
        copies = [t for t in kept if t.numel() == x.numel()]
        assert len(copies) == 1


def test_high_precision_wgrad_keeps_the_compute_dtype_and_a_quantized_one_x_as_it_arrived() -> None:
    x = hostile(15, 37).requires_grad_()
    (kept,) = saved(make(LinearRecipe(**LAYERS["w4a8"]), 37, 23), x, autocast=True)
    assert kept.dtype == torch.bfloat16
    (kept,) = saved(make(LinearRecipe(**LAYERS["wgrad_input"]), 37, 23), x, autocast=True)
    assert kept.data_ptr() == x.data_ptr()


def test_saved_recipes_give_the_gradients_of_the_unsaved_ones() -> None:
    for name in ("saved_reused", "saved_own", "saved_stochastic", "mxfp4_saved", "asymmetric_saved"):
        layers = [
            make(LinearRecipe(**{**LAYERS[name], "saved": s}), 37, 23)
            for s in ("quantized", "high_precision")
        ]
        a, b = (step(layer, hostile(15, 37), autocast=False) for layer in layers)
        assert all(torch.equal(a[k], b[k]) for k in a), name


def test_evaluation_keeps_nothing_of_x_and_takes_any_number_of_tokens() -> None:
    layer = make(LinearRecipe(**LAYERS["nvfp4"]), 32, 16)
    with torch.no_grad():
        y = layer(torch.randn(1, 32))
    assert y.shape == (1, 16)
    layer.weight.requires_grad_(False)
    x = torch.randn(5, 32, requires_grad=True)
    assert not [t for t in saved(layer, x) if t.shape[0] in (5, 32) and t.dtype == torch.uint8]
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("name", ["int8_reused", "quest", "saved_own"])
def test_each_gradient_can_be_switched_off(name: str) -> None:
    layer, x = make(LinearRecipe(**LAYERS[name]), 32, 16), hostile(16, 32)
    full = step(layer, x, autocast=False)
    for off in ("x", "weight", "bias"):
        layer.zero_grad()
        leaf = x.clone().requires_grad_(off != "x")
        for parameter in ("weight", "bias"):
            getattr(layer, parameter).requires_grad_(off != parameter)
        y = layer(leaf)
        y.backward(full["g"])
        found = {"x": leaf.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
        for key, what in (("x", "dx"), ("weight", "dW"), ("bias", "db")):
            if key == off:
                assert found[key] is None
            else:
                assert torch.equal(found[key], full[what]), (off, key)


def test_no_backward_gemm_runs_for_a_gradient_that_nobody_needs() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = make(LinearRecipe(**LAYERS["int8_reused"]), 37, 23), hostile(15, 37)
    gemm = 2 * 15 * 37 * 23
    for x_needs, w_needs in ((True, True), (True, False), (False, True)):
        layer.weight.requires_grad_(w_needs)
        with FlopCounterMode(display=False) as counter:
            layer(x.clone().requires_grad_(x_needs)).sum().backward()
        assert counter.get_total_flops() == gemm * (1 + x_needs + w_needs)


def test_a_second_derivative_is_refused() -> None:
    layer = make(LinearRecipe(**LAYERS["int8_reused"]), 37, 23)
    x = hostile(15, 37).requires_grad_()
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_float16_is_refused() -> None:
    layer = make(LinearRecipe(**LAYERS["int8_reused"]), 37, 23)
    text = r"blocks\.0\.up: compute dtype torch\.float16; quantized layers compute in bfloat16 or float32"
    with pytest.raises(TypeError, match=text):
        layer(torch.zeros(2, 37, dtype=torch.float16))
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(TypeError, match=text):
        layer(torch.zeros(2, 37))
    with pytest.raises(TypeError, match=r"compute dtype torch\.float64"):
        layer(torch.zeros(2, 37, dtype=torch.float64))


def test_tokens_that_the_transform_of_wgrad_does_not_divide_are_refused_in_the_forward() -> None:
    layer = make(LinearRecipe(**LAYERS["nvfp4"]), 32, 16)
    with pytest.raises(ValueError, match=r"blocks\.0\.up \(wgrad, over tokens\).*divisible by 16, got 24"):
        layer(torch.zeros(2, 12, 32))
    layer(torch.zeros(2, 8, 32))


@pytest.mark.parametrize(
    ("in_features", "out_features", "text"),
    [
        (40, 16, r"up \(fprop\): the transform hadamard:16.*got 40"),
        (32, 18, r"up \(dgrad\): .*rht:4.*got 18"),
    ],
)
def test_widths_that_a_transform_does_not_divide_are_refused(
    in_features: int, out_features: int, text: str
) -> None:
    recipe = LinearRecipe(fprop={"transform": "hadamard:16"}, dgrad={"transform": "rht:4"})
    linear = nn.Linear(in_features, out_features)
    with pytest.raises(ValueError, match=text):
        QuantizedLinear.convert(linear, recipe, name="up", clock=Clock())
    assert type(linear) is nn.Linear


def test_subclasses_of_nn_linear_are_refused() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    linear = Own(4, 4)
    with pytest.raises(
        TypeError, match=r"^up is a Own, whose own forward .* add 'up' to the recipe's exclude"
    ):
        QuantizedLinear.convert(linear, LinearRecipe(), name="up", clock=Clock())
    assert type(linear) is Own


def test_the_sum_of_dequantized_products_is_what_a_weight_only_layer_gives() -> None:
    """The plainest reading: y = x dequantize(quantize(W))^T + b."""
    layer, x = make(LinearRecipe(**LAYERS["weight_int8"]), 37, 23), hostile(15, 37)
    w: Any = dequantize(quantize(layer.weight.detach(), QuantSpec.parse("int8_row")))
    torch.testing.assert_close(layer(x), x @ w.t() + layer.bias, rtol=1e-5, atol=1e-5)
