"""QuantizedLinear's numbers: forward and every gradient against the equations, on ordinary and on hostile inputs."""

from __future__ import annotations

import math
from typing import Any

import equations
import pytest
import torch
from equations import LAYERS
from torch import Tensor, nn

from qtrain.nn import Clock, QuantizedLinear
from qtrain.nn.clock import Draws
from qtrain.nn.oracle import linear_oracle
from qtrain.quant import LinearRecipe, QuantSpec, quantize, quantize_values
from qtrain.quant.qtensor import dequantize

SEED, STEP, OFFSET = 2**33 + 5, 11, 70
MOMENT = equations.Moment(SEED, STEP, OFFSET, "blocks.0.up")
MATRICES = {"y": 0, "dx": 1, "dW": 2, "db": 3}


def make(
    recipe: LinearRecipe, in_features: int, out_features: int, *, bias: bool = True, seed: int = SEED
) -> QuantizedLinear:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias)
    quantized = QuantizedLinear.convert(linear, recipe, name="blocks.0.up", clock=Clock(seed))
    quantized.clock.set(step=STEP, token_offset=OFFSET)
    return quantized


def sizes(recipe: LinearRecipe) -> tuple[int, int, int]:
    """(T, I, O): odd ones, unless a transform must divide them."""
    transforms = (recipe.fprop.transform, recipe.dgrad.transform, recipe.wgrad.transform)
    return (16, 32, 16) if any(transforms) else (15, 37, 23)


def hostile(tokens: int, width: int) -> Tensor:
    """Gaussian, with a row of zeros and one huge outlier."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    x[3] = 0.0
    x[1, 4] = 30.0
    return x


def step(layer: nn.Module, x: Tensor, *, autocast: bool, g: Tensor | None = None) -> dict[str, Tensor]:
    """y, dx, dW, db and g of one forward and backward."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = layer(x)
    if g is None:
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
        g[..., 2, :] = 0.0 if y.dim() > 1 else g[..., 2, :]
    g = g.to(y.dtype)
    y.backward(g)
    out = {"y": y.detach(), "dx": x.grad, "dW": layer.weight.grad, "g": g}
    return out if layer.bias is None else {**out, "db": layer.bias.grad}


def assert_follows(
    name: str,
    recipe: LinearRecipe,
    layer: QuantizedLinear,
    x: Tensor,
    seen: dict[str, Tensor],
    dtype: str,
    moment: equations.Moment = MOMENT,
) -> None:
    flat = {k: v.reshape(-1, v.shape[-1]) if k in ("y", "dx", "g") else v for k, v in seen.items()}
    x = x.reshape(-1, x.shape[-1])
    expected = equations.layer(recipe, x, layer.weight, layer.bias, flat["g"], moment)
    for what in ("y", "dx", "dW") if layer.bias is None else MATRICES:
        off = abs(equations._dense(flat[what]) - expected[what].value)
        bound = getattr(expected[what], dtype)
        assert (off <= bound).all(), (
            f"{name} {dtype} {what}: off by {(off / (bound + 1e-300)).max():.3g} bounds"
        )


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


# --- nothing quantized: nn.Linear, bit for bit --------------------------------------------------------------------


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


# --- shapes and strides -------------------------------------------------------------------------------------------


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


# --- not a number, infinity, zero ---------------------------------------------------------------------------------


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


# --- estimators ---------------------------------------------------------------------------------------------------


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


# --- what the forward keeps ---------------------------------------------------------------------------------------


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


# --- gradients that nobody needs ----------------------------------------------------------------------------------


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


# --- refusals -----------------------------------------------------------------------------------------------------


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
