"""QuantizedLinear's numbers: forward and every gradient against the equations, on ordinary and on hostile inputs."""

from __future__ import annotations

import math

import equations
import pytest
import torch
from layer_recipes import LAYERS
from layer_steps import MATRICES, MOMENT, assert_follows, hostile, make, sizes, step
from torch import nn

from qtrain.nn.clock import Draws
from qtrain.nn.oracle import linear_oracle
from qtrain.quant import LinearRecipe, QuantSpec


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_fp32_follows_the_equations_up_to_the_order_of_summation(name: str, bias: bool) -> None:
    recipe = LinearRecipe(**LAYERS[name])
    tokens, in_features, out_features = sizes(recipe)
    layer, x = make(recipe, in_features, out_features, bias=bias), hostile(tokens, in_features)
    seen = step(layer, x, autocast=False)
    assert all(t.dtype == torch.float32 for t in seen.values())
    assert_follows(name, recipe, layer, x, seen, "fp32")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("incoming", [torch.float32, torch.bfloat16])
def test_bf16_autocast_lies_within_the_stated_roundings(name: str, incoming: torch.dtype) -> None:
    recipe = LinearRecipe(**LAYERS[name])
    tokens, in_features, out_features = sizes(recipe)
    layer, x = make(recipe, in_features, out_features), hostile(tokens, in_features).to(incoming)
    seen = step(layer, x, autocast=True)
    assert (seen["y"].dtype, seen["dx"].dtype, seen["dW"].dtype) == (torch.bfloat16, incoming, torch.float32)
    assert seen["db"].dtype == torch.float32
    assert_follows(name, recipe, layer, x, seen, "bf16")


@pytest.mark.parametrize("name", ["int8_reused", "quest", "nvfp4"])
def test_bf16_weights_are_quantized_from_what_is_stored(name: str) -> None:
    recipe = LinearRecipe(**LAYERS[name])
    tokens, in_features, out_features = sizes(recipe)
    layer = make(recipe, in_features, out_features).to(torch.bfloat16)
    x = hostile(tokens, in_features).to(torch.bfloat16)
    seen = step(layer, x, autocast=False)
    assert {t.dtype for t in seen.values()} == {torch.bfloat16}
    flat = equations.layer(recipe, x, layer.weight, layer.bias, seen["g"], MOMENT)
    for what in MATRICES:  # dW and db are rounded to the parameter's dtype once more
        off = abs(equations._dense(seen[what]) - flat[what].value)
        assert (off <= flat[what].bf16 + 2.0**-8 * abs(flat[what].value)).all(), what


def test_master_weight_not_its_bf16_copy_is_quantized() -> None:
    recipe = LinearRecipe(fprop={"weight": "int8_tensor"})
    layer = make(recipe, 1, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [0.3033]]))
    assert round(0.3033 * 127) == 39
    assert round(float(torch.tensor(0.3033).to(torch.bfloat16)) * 127) == 38
    seen = step(layer, torch.ones(3, 1), autocast=True)
    assert torch.equal(seen["y"][0], (torch.tensor([127.0, 39.0]) / 127).to(torch.bfloat16))


@pytest.mark.parametrize("name", LAYERS)
def test_oracle_follows_the_equations(name: str) -> None:
    recipe = LinearRecipe(**LAYERS[name])
    tokens, in_features, out_features = sizes(recipe)
    layer, x = make(recipe, in_features, out_features, bias=False), hostile(tokens, in_features)
    g = torch.randn(tokens, out_features, generator=torch.Generator().manual_seed(4))
    gemms = linear_oracle(recipe, Draws(layer.clock.counters, layer.stream), x, layer.weight, g)
    expected = equations.layer(recipe, x, layer.weight, None, g, MOMENT)
    for gemm, what in (("fprop", "y"), ("dgrad", "dx"), ("wgrad", "dW")):
        off = abs(equations._dense(gemms[gemm].result) - expected[what].value)
        assert (off <= expected[what].fp32).all(), what
    assert list(linear_oracle(recipe, Draws(layer.clock.counters, layer.stream), x, layer.weight)) == [
        "fprop"
    ]


def test_recipes_of_the_list_cover_every_operand_alone_and_every_kind() -> None:
    alone = [[k for k, v in LinearRecipe(**kw).operands().items() if v is not None] for kw in LAYERS.values()]
    six = LinearRecipe().operands()
    assert {a[0] for a in alone if len(a) == 1} == set(six)
    specs = [
        s
        for kw in LAYERS.values()
        for s in LinearRecipe(**kw).operands().values()
        if isinstance(s, QuantSpec)
    ]
    assert {s.estimator for s in specs} == {"ste", "clipped", "trust"}
    assert {s.scale_format for s in specs} == {"float32", "e8m0", "e8m0_ceil", "e4m3"}
    assert {s.granularity.split(":")[0] for s in specs} == {"tensor", "row", "column", "group", "block"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 20), (2, 3, 20), (2, 1, 3, 20), (20,), (0, 20), (2, 0, 20)])
def test_all_none_is_nn_linear_bit_for_bit(shape: tuple[int, ...], bias: bool, autocast: bool) -> None:
    layer = make(LinearRecipe(), 20, 9, bias=bias)
    plain = nn.Linear(20, 9, bias=bias)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    g = torch.randn(*shape[:-1], 9, generator=torch.Generator().manual_seed(5))
    ours, theirs = step(layer, x, autocast=autocast, g=g), step(plain, x, autocast=autocast, g=g)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key]), key


def test_all_none_takes_every_dtype_that_nn_linear_takes() -> None:
    layer = make(LinearRecipe(), 20, 9).to(torch.float64)
    assert layer(torch.ones(2, 20, dtype=torch.float64)).dtype == torch.float64


def test_gradient_of_a_high_precision_gemm_equals_nn_linear_in_fp32() -> None:
    """One operand quantized must not touch the GEMMs that it does not enter."""
    plain = nn.Linear(37, 23)
    for name, exact in (
        ("dgrad_weight", ("y", "dW", "db")),
        ("wgrad_input", ("y", "dx", "db")),
        ("weight_int8", ("dx", "dW", "db")),
    ):
        layer = make(LinearRecipe(**LAYERS[name]), 37, 23)
        plain.load_state_dict(layer.state_dict())
        x = hostile(15, 37)
        ours, theirs = step(layer, x, autocast=False), step(plain, x, autocast=False)
        for what in exact:
            torch.testing.assert_close(ours[what], theirs[what], rtol=1e-5, atol=1e-5)
        changed = {"y", "dx", "dW"} - set(exact)
        assert all((ours[c] - theirs[c]).norm() > 1e-4 * theirs[c].norm() for c in changed), name


@pytest.mark.parametrize("name", ["int8_reused", "saved_own", "group_reused", "asymmetric_saved"])
@pytest.mark.parametrize("shape", [(3, 5, 37), (1, 37), (37,), (2, 2, 2, 37)])
def test_leading_dimensions_are_tokens(name: str, shape: tuple[int, ...]) -> None:
    recipe = LinearRecipe(**LAYERS[name])
    layer = make(recipe, 37, 23)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    g = torch.randn(*shape[:-1], 23, generator=torch.Generator().manual_seed(8))
    seen = step(layer, x, autocast=False, g=g)
    assert seen["y"].shape == (*shape[:-1], 23)
    assert seen["dx"].shape == shape
    assert_follows(name, recipe, layer, x, seen, "fp32")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
@pytest.mark.parametrize("autocast", [False, True])
def test_empty_batch_gives_empty_outputs_and_zero_gradients(
    name: str, shape: tuple[int, ...], autocast: bool
) -> None:
    layer = make(LinearRecipe(**LAYERS[name]), 32, 16)
    seen = step(layer, torch.zeros(shape), autocast=autocast, g=torch.zeros(*shape[:-1], 16))
    assert seen["y"].shape == (*shape[:-1], 16)
    assert seen["dx"].shape == shape
    assert torch.equal(seen["dW"], torch.zeros(16, 32))
    assert torch.equal(seen["db"], torch.zeros(16))


@pytest.mark.parametrize("name", ["int8_reused", "saved_own", "quest", "nvfp4"])
def test_strides_do_not_matter(name: str) -> None:
    recipe = LinearRecipe(**LAYERS[name])
    layer, x = make(recipe, 32, 16), torch.randn(16, 32)
    g = torch.randn(16, 16)
    straight = step(layer, x, autocast=False, g=g)
    strided = torch.randn(32, 48)[:, ::3].t()
    strided.copy_(x)
    assert not strided.is_contiguous()
    leaf = strided.detach().requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    y.backward(torch.as_strided(g.t().contiguous(), (16, 16), (1, 16)))
    for a, b in ((y, straight["y"]), (leaf.grad, straight["dx"]), (layer.weight.grad, straight["dW"])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["int8_reused", "saved_reused", "saved_own", "group_reused", "mxfp8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_in_x_reaches_y_and_dW(name: str, bad: float) -> None:
    layer, x = make(LinearRecipe(**LAYERS[name]), 37, 23), hostile(15, 37)
    x[6, 5] = bad
    g = torch.ones(15, 23)
    seen = step(layer, x, autocast=False, g=g)
    assert not seen["y"][6].isfinite().any()
    assert seen["y"][:6].isfinite().all()
    assert seen["y"][7:].isfinite().all()
    assert not seen["dW"][:, 5].isfinite().any()


@pytest.mark.parametrize(
    "name", ["int8_reused", "saved_own", "mxfp8", "dgrad_grad_output", "wgrad_grad_output"]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_in_g_reaches_dx_dW_and_db(name: str, bad: float) -> None:
    layer, x = make(LinearRecipe(**LAYERS[name]), 37, 23), hostile(15, 37)
    g = torch.ones(15, 23)
    g[6, 5] = bad
    seen = step(layer, x, autocast=False, g=g)
    assert not seen["dx"][6].isfinite().any()
    assert seen["dx"][:6].isfinite().all()
    assert not seen["dW"][5].isfinite().any()
    assert not seen["db"][5].isfinite()


def test_what_is_not_finite_in_W_reaches_y_and_dx() -> None:
    layer, x = make(LinearRecipe(**LAYERS["int8_reused"]), 37, 23), hostile(15, 37)
    with torch.no_grad():
        layer.weight[2, 3] = math.nan
    seen = step(layer, x, autocast=False, g=torch.ones(15, 23))
    assert not seen["y"][:, 2].isfinite().any()
    assert seen["y"][:, :2].isfinite().all()
    assert not seen["dx"].isfinite().any()


@pytest.mark.parametrize("name", [n for n in LAYERS if "midrise" not in str(LAYERS[n])])
def test_zero_input_gives_the_bias_and_no_weight_gradient(name: str) -> None:
    layer = make(LinearRecipe(**LAYERS[name]), 32, 16)
    seen = step(layer, torch.zeros(16, 32), autocast=False)
    assert torch.equal(seen["y"], layer.bias.detach().expand(16, 16))
    assert torch.equal(seen["dW"], torch.zeros(16, 32))
