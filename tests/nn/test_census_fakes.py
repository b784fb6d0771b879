"""Every fake that was thought of must fail the census."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from census_models import assert_fails, census_of, gpt, loss_of
from layer_recipes import LAYERS
from torch import Tensor, nn

import qtrain.nn.simulated as carrier
from qtrain.nn import Census, Clock, QuantizedLinear, apply_recipe, take_census
from qtrain.nn.gemm import GemmOperand
from qtrain.quant import LinearRecipe, ModelRecipe, Quantized, QuantSpec, Rule, quantize_values


def test_a_bf16_matmul_of_the_unquantized_tensors_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, counters and quantizers stay; only what is multiplied is not what was quantized."""
    monkeypatch.setattr(
        carrier.SimulatedGemms,
        "_entered",
        lambda self, view, q, operand: GemmOperand(view.to(self.dtype), None),
    )
    recipe = {"fprop": LAYERS["int8_reused"]["fprop"]}
    for dtype in ("bf16", "fp32"):
        assert_fails(census_of(recipe, dtype), name="fprop.input", text="too good")


def _decoy(monkeypatch: pytest.MonkeyPatch, beside: Callable[..., Tensor]) -> None:
    right = carrier.quantized_gemm
    raw: list[Tensor] = []
    enter = carrier.SimulatedGemms._entered

    def entered(self: Any, view: Tensor, q: Quantized | None, operand: str) -> GemmOperand:
        raw.append(view)
        return enter(self, view, q, operand)

    def fake(a: GemmOperand, b: GemmOperand, out_dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        y = right(a, b, out_dtype, bias)
        return beside(raw[-2:], a, b, y, bias)

    monkeypatch.setattr(carrier.SimulatedGemms, "_entered", entered)
    monkeypatch.setattr(carrier, "quantized_gemm", fake)


@pytest.mark.parametrize("name", ["w4a8", "paper_w8a8g8", "int8_group"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_right_product_beside_the_real_one_fails(monkeypatch, name: str, dtype: str) -> None:
    """The quantized GEMM runs, counters and all, and its result is thrown away."""
    specs = {"fprop": {"input": "int8_group8", "weight": "int8_group8"}}
    recipe = {"fprop": (LAYERS.get(name) or specs)["fprop"]}

    def beside(raw: list[Tensor], a: GemmOperand, b: GemmOperand, y: Tensor, bias: Tensor | None) -> Tensor:
        fitting = [t for t in raw if t.shape[1] == a.values.shape[1]]
        if len(fitting) < 2 or fitting[0].shape[0] != y.shape[0] or fitting[1].shape[0] != y.shape[1]:
            return y
        left, right = (t.to(a.values.dtype).float() for t in fitting)
        product = (left[:, None] * right[None]).sum(-1)  # no matrix product that could be seen
        return (product + (0 if bias is None else bias)).to(y.dtype)

    _decoy(monkeypatch, beside)
    assert_fails(census_of(recipe, dtype), name="y", text="do not follow from the product")


def test_identity_as_the_quantizer_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(x: Tensor, spec: QuantSpec, noise: Tensor | None = None, given: Any = None) -> Quantized:
        q = quantize_values(x, spec, noise, given)
        return q._replace(values=x.float() / spec.blocks.expand(q.scale, tuple(x.shape)))

    monkeypatch.setattr(carrier, "quantize_values", identity)
    assert_fails(census_of("int8_reused"), text="too good")
    assert_fails(census_of("fp8_block"), text="too good")


def test_an_algebra_that_does_not_quantize_fails_by_its_distinct_values(monkeypatch) -> None:
    """The oracle shares the algebra; that a b-bit operand has 2^b values under one scale, it does not."""
    from qtrain.nn import oracle

    def identity(x: Tensor, spec: QuantSpec, noise: Tensor | None = None, given: Any = None) -> Quantized:
        q = quantize_values(x, spec, noise, given)
        return q._replace(values=x.float() / spec.blocks.expand(q.scale, tuple(x.shape)))

    monkeypatch.setattr(carrier, "quantize_values", identity)
    monkeypatch.setattr(oracle, "quantize_values", identity)
    assert_fails(census_of("int4_own_specs"), text="distinct values under one scale, 16 allowed")


def test_the_plain_linear_under_the_name_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("int8_reused", "weight_int8", "dgrad_grad_output", "wgrad_input", "saved_stochastic"):
        with monkeypatch.context() as patched:
            patched.setattr(
                QuantizedLinear, "forward", lambda self, input: F.linear(input, self.weight, self.bias)
            )
            assert_fails(census_of(name))


def run_as(actual: dict[str, Any], configured: dict[str, Any], dtype: str = "bf16", **changes: Any) -> Census:
    """A census of layers that follow ``actual`` where ``configured`` is the plan."""
    model, report = gpt(actual, **changes)
    recipe = LinearRecipe(**configured)
    layers = tuple(replace(layer, recipe=recipe) for layer in report.layers)
    return take_census(model, replace(report, layers=layers), loss_of(dtype))


OPERANDS = [("fprop", "input"), ("fprop", "weight"), ("dgrad", "grad_output"), ("dgrad", "weight"), ("wgrad", "grad_output"), ("wgrad", "input")]  # fmt: skip


@pytest.mark.parametrize(("gemm", "which"), OPERANDS)
@pytest.mark.parametrize(
    ("actual", "configured"),
    [
        ("int4_row", "int8_row"),
        ("int8_row", "int4_row"),
        ("int8_row", None),
        ("int8_group8", None),
        (None, "int8_row"),
        ("int8_tensor", "int8_row"),
        ("int8_row", "int8_tensor"),
        ("int8_group8", "int8_row"),
        ("int8_row_sr", "int8_row"),
        ("int4_row_mse", "int4_row"),
        ("e4m3_row", "int8_row"),
        ("int8_row_asym", "int8_row"),
    ],
)
def test_another_spec_than_configured_fails(gemm: str, which: str, actual: Any, configured: Any) -> None:
    census = run_as(
        {gemm: {which: actual}}, {gemm: {which: configured}}, "bf16" if which != "input" else "fp32"
    )
    found = [o for o in census.observations if o.problem]
    # where nothing is quantized the layer is a plain one
    assert {o.name for o in found} & {f"{gemm}.{which}" if actual else "layer"}, found


def test_swapped_specs_fail() -> None:
    pair = {"input": "int8_row", "weight": "int4_row"}
    swapped = {"input": "int4_row", "weight": "int8_row"}
    assert_fails(run_as({"fprop": swapped}, {"fprop": pair}), name="fprop.input", text="too bad")
    assert_fails(run_as({"fprop": swapped}, {"fprop": pair}), name="fprop.weight", text="too good")


def test_a_dropped_scale_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = carrier.quantized_gemm
    for keep in (
        lambda a, b: (GemmOperand(a.values, None), b),
        lambda a, b: (a, GemmOperand(b.values, None)),
        lambda a, b: (GemmOperand(a.values, a.scale if a.scale is None else a.scale * 1.02), b),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(
                carrier,
                "quantized_gemm",
                lambda a, b, dtype, bias=None, keep=keep: right(*keep(a, b), dtype, bias),
            )
            for name in ("int8_reused", "int4_own_specs", "fp8_tensor"):
                assert_fails(census_of(name), text="do not follow from the product")


def test_a_wrong_group_scale_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that enter dequantized are part of the operand: half a percent in one of them shows."""
    right = carrier.enter

    def fake(values: Tensor, scale: Tensor, spec: QuantSpec, dtype: torch.dtype) -> GemmOperand:
        scale = scale.clone()
        scale[:, 0] *= 1.01
        return right(values, scale, spec, dtype)

    monkeypatch.setattr(carrier, "enter", fake)
    assert_fails(census_of({"fprop": {"input": "int4_group8"}}), name="fprop.input", text="are not those")


@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_an_unquantized_gradient_fails(monkeypatch: pytest.MonkeyPatch, gemm: str) -> None:
    right = carrier.SimulatedGemms._quantized

    def fake(self: Any, view: Tensor, operand: str, **kwargs: Any) -> Quantized | None:
        q = right(self, view, operand, **kwargs)
        if operand != f"{gemm}.grad_output" or q is None:
            return q
        return q._replace(values=view.float() / q.scale)

    monkeypatch.setattr(carrier.SimulatedGemms, "_quantized", fake)
    assert_fails(census_of("int8_reused"), name=f"{gemm}.grad_output", text="too good")


@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_a_backward_gemm_in_high_precision_fails(monkeypatch: pytest.MonkeyPatch, gemm: str) -> None:
    right = getattr(carrier.SimulatedGemms, gemm)

    def dgrad(self: Any, g: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, None]:
        right(self, g, weight, *rest)
        return g @ weight.to(g.dtype), None

    def wgrad(self: Any, g: Tensor, kept: list[Any], *rest: Any) -> tuple[Tensor, None]:
        right(self, g, kept, *rest)
        return g.t() @ kept[0].to(g.dtype), None

    monkeypatch.setattr(carrier.SimulatedGemms, gemm, dgrad if gemm == "dgrad" else wgrad)
    for dtype in ("bf16", "fp32"):
        assert_fails(census_of("int8_reused", dtype))
        assert_fails(census_of("int8_reused", dtype, tie_embeddings=True))


@pytest.mark.parametrize("name", ["saved_stochastic", "stochastic_column"])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer, clock: setattr(layer, "clock", Clock(5)),  # its own, which nobody advances
        lambda layer, clock: setattr(layer, "stream", layer.stream + 1),  # another layer's bits
        lambda layer, clock: setattr(layer, "clock", _at(clock, step=8)),
        lambda layer, clock: setattr(layer, "clock", _at(clock, token_offset=0)),
        lambda layer, clock: setattr(layer, "clock", _at(clock, seed=6)),
    ],
)
def test_stale_or_foreign_noise_fails(name: str, change: Callable[[Any, Any], None]) -> None:
    model, report = gpt(name)
    change(model.blocks[0].mlp.up, report.clock)
    census = take_census(model, report, loss_of("bf16"))
    assert_fails(census, layer="blocks.0.mlp.up", text="elements are not those")


def _at(clock: Clock, *, seed: int = 5, step: int = 7, token_offset: int = 320) -> Clock:
    other = copy.deepcopy(clock)
    other.counters.copy_(torch.tensor([seed, step, token_offset]))
    return other


def test_one_noise_for_all_operands_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = carrier.Draws.noise

    class Same(carrier.Draws):
        def noise(self, spec: QuantSpec, operand: str, shape: Any, *, tokens: bool) -> Tensor | None:
            return right(self, spec, "fprop.input", shape, tokens=tokens)

    monkeypatch.setattr(carrier, "Draws", Same)
    assert_fails(census_of("saved_stochastic"), name="fprop.weight", text="are not those")


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("quest", {"fprop": {"transform": None}}),
        ("rht_forward", {"fprop": {"transform": "hadamard:16"}}),
        ("nvfp4", {"wgrad": {"transform": None}}),
        ("transforms_alone", {"dgrad": {"transform": None}}),
        ("transforms_alone", {"fprop": {"transform": "hadamard:8"}}),
    ],
)
def test_a_dropped_or_another_transform_fails(name: str, without: dict[str, Any]) -> None:
    actual = {k: ({**v, **without.get(k, {})} if isinstance(v, dict) else v) for k, v in LAYERS[name].items()}
    assert_fails(run_as(actual, LAYERS[name]))


@pytest.mark.parametrize(
    "name", ["quest", "quest_high_precision_backward", "clipped", "clipped_own_backward"]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_dropped_mask_fails(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    monkeypatch.setattr(carrier, "_masked", lambda d, bits: d)
    census = census_of(name, dtype)
    assert_fails(census, name="dx", text="do not follow")
    assert_fails(census, name="dW", text="do not follow")


def test_a_mask_of_one_in_two_hundred_that_is_dropped_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"format": "int4", "clip": "percentile:99", "granularity": "tensor", "estimator": "clipped"}
    recipe = {"fprop": {"input": spec}, "dgrad": {"grad_output": "int4_row"}}
    assert census_of(recipe).failures() == []
    monkeypatch.setattr(carrier, "_masked", lambda d, bits: d)
    assert_fails(census_of(recipe), name="dx")


def test_a_mask_in_the_wrong_basis_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(self: Any, d: Tensor, bits: Tensor | None, *_: Any, rotated: bool) -> tuple[Tensor, None]:
        transform = self.recipe.fprop.transform
        return carrier._masked(transform.inverse(d) if rotated else d, bits), None

    monkeypatch.setattr(carrier.SimulatedGemms, "_to_parameter_basis", fake)
    for name in ("quest", "quest_high_precision_backward"):
        assert_fails(census_of(name), name="dx", text="do not follow")


def test_a_layer_that_gives_no_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = carrier.SimulatedLinear.backward
    for lost, text in ((0, "no dx was given out"), (2, "no dW was given out"), (3, "no db was given out")):
        with monkeypatch.context() as patched:

            def backward(ctx: Any, *grads: Tensor, lost: int = lost) -> tuple[Any, ...]:
                return tuple(None if i == lost else d for i, d in enumerate(right(ctx, *grads)))

            patched.setattr(carrier.SimulatedLinear, "backward", staticmethod(backward))
            assert_fails(census_of("int8_reused"), text=text)


@pytest.mark.parametrize(("which", "name"), [(0, "dx"), (2, "dW"), (3, "db")])
def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, which: int, name: str) -> None:
    right = carrier.SimulatedLinear.backward

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return tuple(d if i != which or d is None else d * 1.02 for i, d in enumerate(right(ctx, *grads)))

    monkeypatch.setattr(carrier.SimulatedLinear, "backward", staticmethod(backward))
    assert_fails(census_of("int8_reused"), name=name)


def test_a_lost_bias_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = carrier.quantized_gemm
    monkeypatch.setattr(carrier, "quantized_gemm", lambda a, b, dtype, bias=None: right(a, b, dtype))
    assert_fails(census_of("int8_reused"), name="y", text="do not follow")


def test_a_layer_that_does_not_run_fails() -> None:
    model = nn.ModuleDict({"used": nn.Linear(16, 16), "idle": nn.Linear(16, 16)})
    report = apply_recipe(model, ModelRecipe(linear=LinearRecipe(**LAYERS["w4a8"])))
    x = torch.randn(4, 16)
    census = take_census(model, report, lambda m: m["used"](x).square().sum())
    assert_fails(census, layer="idle", text="did not run forward and backward in the probe")
    used_without_gradient = take_census(
        model, report, lambda m: m["used"](x).square().sum() + m["idle"](x).detach().sum()
    )
    assert_fails(used_without_gradient, layer="idle", text="did not run forward and backward in the probe")


def test_a_layer_that_became_plain_again_fails() -> None:
    model, report = gpt("int8_reused")
    model.blocks[0].mlp.up.revert()
    assert_fails(
        take_census(model, report, loss_of("bf16")), layer="blocks.0.mlp.up", text="is no QuantizedLinear"
    )
    model.blocks[0].mlp.up = nn.Sequential(nn.Linear(32, 128))
    census = take_census(model, report, loss_of("bf16"))
    assert_fails(census, layer="blocks.0.mlp.up", text="is no QuantizedLinear")


def test_a_model_without_the_planned_layers_fails() -> None:
    """A report of another model, or a wrapper that renames: nothing would be observed, and nothing is not right."""
    model, report = gpt("int8_reused")
    wrapped = nn.ModuleDict({"module": model})
    census = take_census(wrapped, report, lambda m: loss_of("bf16")(m["module"]))
    assert_fails(census, layer="lm_head", text="") if len(census.observations) == 1 else None
    assert len(census.failures()) == 7
    assert (
        "lm_head layer: is no module of the model (there is module.lm_head: pass the model that"
        in census.failures()[-1]
    )
    _, other = gpt("int8_reused", layers=2)
    assert_fails(
        take_census(model, other, loss_of("bf16")), layer="blocks.1", text="is no module of the model in"
    )


def test_the_wrapper_of_torch_compile_is_seen_through() -> None:
    model, report = gpt("int8_reused")
    census = take_census(torch.compile(model, backend="eager"), report, loss_of("bf16"))
    assert census.failures() == []
    assert len(census.quantized()) == 42


def test_a_layer_that_quantizes_against_the_plan_fails() -> None:
    model, report = gpt("int8_reused")
    layers = tuple(replace(x, recipe=None) if x.name == "lm_head" else x for x in report.layers)
    census = take_census(model, replace(report, layers=layers), loss_of("bf16"))
    assert_fails(census, layer="lm_head", text="configured as high precision and was quantized")


def test_rules_are_observed_layer_by_layer() -> None:
    model, _ = gpt()
    rules = [
        Rule(pattern="*.mlp.*", recipe=LinearRecipe(**LAYERS["quest"])),
        Rule(pattern="*.q", recipe=None),
    ]
    recipe = ModelRecipe(linear=LinearRecipe(**LAYERS["w4a8"]), rules=rules)
    census = take_census(model, apply_recipe(model, recipe), loss_of("bf16"))
    assert census.failures() == []
    specs = {(o.layer, o.spec) for o in census.observations if o.name == "fprop.weight"}
    assert ("blocks.0.mlp.up", "midrise4 row gaussian trust") in specs
    assert ("blocks.0.attn.k", "int4 row") in specs
    assert not [o for o in census.observations if o.layer == "blocks.0.attn.q"]


def test_nothing_planned_is_nothing_to_observe() -> None:
    model, _ = gpt()
    census = take_census(model, apply_recipe(model, ModelRecipe()), loss_of("bf16"))
    assert census.observations == ()
    assert census.summary() == "no quantized operand, 0 failures"
    census.check()
