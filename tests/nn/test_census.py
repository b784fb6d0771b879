"""The census passes what is right, and every fake that was thought of must fail it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from equations import LAYERS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import qtrain.nn.linear as carrier
from qtrain.models.gpt import GPT, GPTConfig
from qtrain.nn import Census, CensusError, Clock, QuantizedLinear, apply_recipe, take_census
from qtrain.nn.census import gradients_of_probe
from qtrain.nn.gemm import GemmOperand
from qtrain.nn.observation import Observation
from qtrain.quant import LinearRecipe, ModelRecipe, Quantized, QuantSpec, Rule, quantize_values

TOKENS = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(1))
Probe = Callable[[nn.Module], Tensor]


def loss_of(dtype: str) -> Probe:
    def probe(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16"):
            logits = model(TOKENS[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), TOKENS[:, 1:].flatten())

    return probe


def gpt(name: str = "int8_reused", *, layers: int = 1, **changes: Any) -> tuple[GPT, Any]:
    """A converted model with biases that are not zero, and its report, at some step of its clock."""
    config = GPTConfig(
        vocab_size=64, sequence_tokens=16, layers=layers, heads=2, width=32, **{"bias": True, **changes}
    )
    model = GPT(config, seed=1)
    generator = torch.Generator().manual_seed(3)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    recipe = LAYERS[name] if isinstance(name, str) else name
    report = apply_recipe(model, ModelRecipe(linear=LinearRecipe(**recipe)), seed=5)
    report.clock.set(step=7, token_offset=320)
    return model, report


def census_of(name: str = "int8_reused", dtype: str = "bf16", **changes: Any) -> Census:
    model, report = gpt(name, **changes)
    return take_census(model, report, loss_of(dtype))


def assert_fails(census: Census, *, layer: str = "", name: str = "", text: str = "") -> None:
    found = [o for o in census.observations if o.problem]
    assert found, "the fake passed"
    assert all(layer in o.layer for o in found), found[0]
    assert any(name == o.name or not name for o in found), {o.name for o in found}
    assert any(text in o.problem for o in found), {o.problem for o in found}
    with pytest.raises(CensusError, match="what ran is not what was configured: "):
        census.check()


# --- what is right passes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_recipe_passes(name: str, dtype: str) -> None:
    census = census_of(name, dtype)
    assert census.failures() == []
    census.check()
    recipe = LinearRecipe(**LAYERS[name])
    layers = 7
    # six operands and three results a layer, and db in all but lm_head
    assert len(census.observations) == layers * 9 + layers - 1
    resolved = [recipe.resolved(o) for o in recipe.operands()]
    assert len(census.quantized()) == layers * sum(s is not None for s in resolved)
    for o in census.observations:
        assert o.agreement > 0.998
        if o.levels is not None:
            assert (o.spec, o.levels) == (str(recipe.resolved(o.name)), 2 ** recipe.resolved(o.name).bits)
            assert 1 < o.distinct <= o.levels
            assert o.kernel == "mm"
            assert o.dtype == ("bfloat16" if dtype == "bf16" else "float32")
        elif o.name in recipe.operands():
            assert o.spec == "none"


@pytest.mark.parametrize("name", ["int8_reused", "saved_stochastic", "rht_forward"])
def test_activation_checkpointing_passes_and_recomputed_passages_are_seen(name: str) -> None:
    model, report = gpt(name)
    once = take_census(model, report, loss_of("bf16"))
    model.set_activation_checkpointing(True)
    census = take_census(model, report, loss_of("bf16"))
    assert census.failures() == []
    assert len(census.observations) > len(once.observations)


def test_reentrant_checkpointing_passes() -> None:
    from torch.utils.checkpoint import checkpoint

    body = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
    report = apply_recipe(body, ModelRecipe(linear=LinearRecipe(**LAYERS["saved_stochastic"])))
    x = torch.randn(8, 16, requires_grad=True)
    census = take_census(body, report, lambda m: checkpoint(m, x, use_reentrant=True).square().sum())
    assert census.failures() == []
    assert {o.name for o in census.observations} >= {"y", "dx", "dW"}


@pytest.mark.parametrize("exclude", [(), ("lm_head",)])
def test_tied_weights_pass_and_their_gradients_are_told_apart(exclude: tuple[str, ...]) -> None:
    model, _ = gpt(tie_embeddings=True)
    recipe = ModelRecipe(linear=LinearRecipe(**LAYERS["int8_reused"]), exclude=exclude)
    report = apply_recipe(model, recipe)
    census = take_census(model, report, loss_of("bf16"))
    assert census.failures() == []
    assert (("lm_head", "dW") in {(o.layer, o.name) for o in census.observations}) == (not exclude)
    assert model.lm_head.weight is model.token_embedding.weight


def test_zero_initialised_layers_raise_no_alarm() -> None:
    for name in ("int8_reused", "paper_w8a8g8", "group_reused", "mxfp8", "weight_int8"):
        model, report = gpt(name)
        for layer in (model.lm_head, model.blocks[0].mlp.down):
            layer.weight.data.zero_()
        assert take_census(model, report, loss_of("bf16")).failures() == [], name


def test_evaluation_mode_passes() -> None:
    model, report = gpt("quest", dropout=0.1)
    model.eval()
    assert take_census(model, report, loss_of("bf16")).failures() == []
    assert not model.training


def test_dropout_passes() -> None:
    model, report = gpt("int8_reused", dropout=0.3)
    assert take_census(model, report, loss_of("bf16")).failures() == []


class Twice(nn.Module):
    """One layer that is called twice a step, by keyword once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(input=F.gelu(self.up(x)))


def twice_loss(model: nn.Module) -> Tensor:
    return model(torch.linspace(-1, 1, 128).reshape(8, 16)).square().sum()


def test_a_layer_that_is_called_twice_is_seen_twice() -> None:
    model = Twice()
    report = apply_recipe(model, ModelRecipe(linear=LinearRecipe(**LAYERS["int8_reused"])))
    census = take_census(model, report, twice_loss)
    assert census.failures() == []
    assert [o.name for o in census.observations].count("dW") == 2
    assert [o.name for o in census.observations].count("dx") == 1  # the first input needs no gradient


def test_one_wrong_passage_of_two_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Twice()
    report = apply_recipe(model, ModelRecipe(linear=LinearRecipe(**LAYERS["int8_reused"])))
    right, calls = QuantizedLinear.forward, []

    def forward(self: QuantizedLinear, input: Tensor) -> Tensor:
        calls.append(1)
        return right(self, input) if len(calls) == 1 else F.linear(input, self.weight, self.bias)

    monkeypatch.setattr(QuantizedLinear, "forward", forward)
    assert_fails(take_census(model, report, twice_loss))


def test_hooks_of_others_do_not_disturb() -> None:
    model, report = gpt("int8_reused")
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.lm_head.register_forward_hook(lambda module, args, output: output * 3)
    assert take_census(model, report, loss_of("bf16")).failures() == []


def test_frozen_weights_and_inputs_without_gradient_have_no_such_gemm() -> None:
    model, report = gpt("int8_reused")
    model.lm_head.weight.requires_grad_(False)
    model.blocks[0].mlp.up.bias.requires_grad_(False)
    census = take_census(model, report, loss_of("bf16"))
    assert census.failures() == []
    names = {(o.layer, o.name) for o in census.observations}
    assert ("lm_head", "wgrad.input") not in names
    assert ("lm_head", "dx") in names
    assert ("blocks.0.mlp.up", "db") not in names
    assert ("blocks.0.mlp.up", "dW") in names


def test_rows_of_zeros_do_not_blind_the_census() -> None:
    """A padding token, say: nothing divided by nothing must not turn the SQNR of the operand into nan."""
    layer = nn.Sequential(nn.Linear(16, 16))
    report = apply_recipe(layer, ModelRecipe(linear=LinearRecipe(**LAYERS["int8_reused"])))
    x = torch.randn(8, 16)
    x[3] = 0.0
    census = take_census(layer, report, lambda m: m(x)[:6].square().sum())
    assert census.failures() == []
    assert all(30 < o.sqnr_db < 60 for o in census.quantized())


@pytest.mark.parametrize("name", ["int8_reused", "saved_own", "stochastic_column"])
def test_a_layer_that_gets_no_tokens_passes(name: str) -> None:
    layer = nn.Sequential(nn.Linear(16, 16))
    report = apply_recipe(layer, ModelRecipe(linear=LinearRecipe(**LAYERS[name])))
    x = torch.zeros(0, 16, requires_grad=True)
    assert take_census(layer, report, lambda m: m(x).square().sum()).failures() == []


def test_bf16_parameters_pass() -> None:
    model, report = gpt("int8_reused")
    assert take_census(model.to(torch.bfloat16), report, loss_of("fp32")).failures() == []


# --- what is left behind ------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    model, report = gpt("saved_stochastic", dropout=0.2)
    kept = torch.randn_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    torch.manual_seed(11)
    state, counters = torch.get_rng_state(), report.clock.counters
    ticks = counters.clone()

    def probe(m: nn.Module) -> Tensor:
        report.clock.set(step=0)
        return loss_of("bf16")(m)

    take_census(model, report, probe)
    assert report.clock.counters is counters
    assert torch.equal(counters, ticks)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.lm_head.weight.grad is kept
    for n, p in model.named_parameters():
        assert p is before[n][0]
        assert torch.equal(p, before[n][1])
        assert p is model.lm_head.weight or p.grad is None
        assert not p._backward_hooks
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert isinstance(model.lm_head._parameters["weight"], nn.Parameter)


def test_nothing_is_left_behind_when_the_probe_raises() -> None:
    model, report = gpt("int8_reused")
    kept = torch.zeros_like(model.lm_head.weight)
    model.lm_head.weight.grad = kept

    def probe(m: GPT) -> Tensor:
        m(TOKENS[:, :-1])
        report.clock.set(step=1)
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        take_census(model, report, probe)
    broken = nn.Linear(3, 3)
    model.blocks[0].mlp.up.register_forward_hook(lambda *a: broken(torch.ones(1, 5)))
    with pytest.raises(RuntimeError, match="shapes"):
        take_census(model, report, loss_of("bf16"))
    assert int(report.clock.counters[1]) == 7
    assert model.lm_head.weight.grad is kept
    assert all(isinstance(m.weight, nn.Parameter) for m in model.modules() if isinstance(m, nn.Linear))
    assert not model.lm_head._forward_hooks
    assert not model.lm_head._forward_pre_hooks


def test_compiled_code_is_left_in_place_and_the_probe_runs_eagerly() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(16, 16))
    report = apply_recipe(model, ModelRecipe(linear=LinearRecipe(**LAYERS["w4a8"])))
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, fullgraph=True)
    x = torch.randn(4, 16)
    model(x)
    assert counter.frame_count == 1
    census = take_census(model, report, lambda m: m(x).square().sum())
    assert census.failures() == []
    model(x)
    assert counter.frame_count == 1


def test_gradients_of_a_probe_are_given_out_and_put_back() -> None:
    layer = nn.Linear(2, 1, bias=False)
    old = torch.full((1, 2), 9.0)
    layer.weight.grad = old
    loss, found = gradients_of_probe(layer, lambda m: m(torch.tensor([[3.0, 5.0]])).sum() * 2)
    assert loss == pytest.approx(2 * float(layer.weight.detach() @ torch.tensor([3.0, 5.0])))
    assert torch.equal(found["weight"], torch.tensor([[6.0, 10.0]]))
    assert layer.weight.grad is old
    assert torch.equal(old, torch.full((1, 2), 9.0))
    layer.bias = nn.Parameter(torch.zeros(1), requires_grad=False)
    assert set(gradients_of_probe(layer, lambda m: m(torch.ones(1, 2)).sum())[1]) == {"weight"}


# --- fakes --------------------------------------------------------------------------------------------------------


def test_a_bf16_matmul_of_the_unquantized_tensors_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, counters and quantizers stay; only what is multiplied is not what was quantized."""
    monkeypatch.setattr(
        carrier._Gemms, "_entered", lambda self, view, q, operand: GemmOperand(view.to(self.dtype), None)
    )
    recipe = {"fprop": LAYERS["int8_reused"]["fprop"]}
    for dtype in ("bf16", "fp32"):
        assert_fails(census_of(recipe, dtype), name="fprop.input", text="too good")


def _decoy(monkeypatch: pytest.MonkeyPatch, beside: Callable[..., Tensor]) -> None:
    right = carrier.quantized_gemm
    raw: list[Tensor] = []
    enter = carrier._Gemms._entered

    def entered(self: Any, view: Tensor, q: Quantized | None, operand: str) -> GemmOperand:
        raw.append(view)
        return enter(self, view, q, operand)

    def fake(a: GemmOperand, b: GemmOperand, out_dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
        y = right(a, b, out_dtype, bias)
        return beside(raw[-2:], a, b, y, bias)

    monkeypatch.setattr(carrier._Gemms, "_entered", entered)
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
    def identity(x: Tensor, spec: QuantSpec, noise: Tensor | None = None) -> Quantized:
        q = quantize_values(x, spec, noise)
        return q._replace(values=x.float() / spec.blocks.expand(q.scale, tuple(x.shape)))

    monkeypatch.setattr(carrier, "quantize_values", identity)
    assert_fails(census_of("int8_reused"), text="too good")
    assert_fails(census_of("fp8_block"), text="too good")


def test_an_algebra_that_does_not_quantize_fails_by_its_distinct_values(monkeypatch) -> None:
    """The oracle shares the algebra; that a b-bit operand has 2^b values under one scale, it does not."""
    from qtrain.nn import oracle

    def identity(x: Tensor, spec: QuantSpec, noise: Tensor | None = None) -> Quantized:
        q = quantize_values(x, spec, noise)
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
    right = carrier._Gemms._quantized

    def fake(self: Any, view: Tensor, operand: str, **kwargs: Any) -> Quantized | None:
        q = right(self, view, operand, **kwargs)
        if operand != f"{gemm}.grad_output" or q is None:
            return q
        return q._replace(values=view.float() / q.scale)

    monkeypatch.setattr(carrier._Gemms, "_quantized", fake)
    assert_fails(census_of("int8_reused"), name=f"{gemm}.grad_output", text="too good")


@pytest.mark.parametrize("gemm", ["dgrad", "wgrad"])
def test_a_backward_gemm_in_high_precision_fails(monkeypatch: pytest.MonkeyPatch, gemm: str) -> None:
    right = getattr(carrier._Gemms, gemm)

    def dgrad(self: Any, g: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        right(self, g, weight, *rest)
        return g @ weight.to(g.dtype)

    def wgrad(self: Any, g: Tensor, kept: list[Any], *rest: Any) -> Tensor:
        right(self, g, kept, *rest)
        return g.t() @ kept[0].to(g.dtype)

    monkeypatch.setattr(carrier._Gemms, gemm, dgrad if gemm == "dgrad" else wgrad)
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
    def fake(self: Any, d: Tensor, bits: Tensor | None, *, rotated: bool) -> Tensor:
        transform = self.recipe.fprop.transform
        return carrier._masked(transform.inverse(d) if rotated else d, bits)

    monkeypatch.setattr(carrier._Gemms, "_to_parameter_basis", fake)
    for name in ("quest", "quest_high_precision_backward"):
        assert_fails(census_of(name), name="dx", text="do not follow")


def test_a_layer_that_gives_no_gradient_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = carrier._QuantizedLinear.backward
    for lost, text in ((0, "no dx was given out"), (1, "no dW was given out"), (2, "no db was given out")):
        with monkeypatch.context() as patched:

            def backward(ctx: Any, *grads: Tensor, lost: int = lost) -> tuple[Any, ...]:
                return tuple(None if i == lost else d for i, d in enumerate(right(ctx, *grads)))

            patched.setattr(carrier._QuantizedLinear, "backward", staticmethod(backward))
            assert_fails(census_of("int8_reused"), text=text)


@pytest.mark.parametrize(("which", "name"), [(0, "dx"), (1, "dW"), (2, "db")])
def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, which: int, name: str) -> None:
    right = carrier._QuantizedLinear.backward

    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return tuple(d if i != which or d is None else d * 1.02 for i, d in enumerate(right(ctx, *grads)))

    monkeypatch.setattr(carrier._QuantizedLinear, "backward", staticmethod(backward))
    assert_fails(census_of("int8_reused"), name=name)


def test_a_lost_bias_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = carrier.quantized_gemm
    monkeypatch.setattr(carrier, "quantized_gemm", lambda a, b, dtype, bias=None: right(a, b, dtype))
    assert_fails(census_of("int8_reused"), name="y", text="do not follow")


# --- layers that are not there ------------------------------------------------------------------------------------


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


# --- what it says -------------------------------------------------------------------------------------------------


def one(name: str = "fprop.input", **changes: Any) -> Observation:
    values = {
        "layer": "up",
        "name": name,
        "spec": "int8 row",
        "kernel": "mm",
        "dtype": "bfloat16",
        "distinct": 200,
        "levels": 256,
        "sqnr_db": 44.0,
        "expected_db": 44.1,
        "problem": "",
    }
    return Observation(**{**values, **changes})


def test_summary_and_failures() -> None:
    census = Census(
        (
            one(),
            one("fprop.weight", layer="down", sqnr_db=31.26, problem="too bad"),
            one("wgrad.input", layer="down", sqnr_db=math.nan),
            one("y", levels=None, distinct=None, sqnr_db=3.0),
        )
    )
    assert census.failures() == ["down fprop.weight: too bad"]
    assert [o.name for o in census.quantized()] == ["fprop.input", "fprop.weight", "wgrad.input"]
    assert census.summary() == (
        "3 quantized operands in 2 layers seen in their GEMMs, 1 failures; lowest SQNR 31.3 dB (down fprop.weight)"
    )
    with pytest.raises(
        CensusError, match=r"^what ran is not what was configured: down fprop\.weight: too bad$"
    ):
        census.check()


def test_many_failures_are_counted() -> None:
    census = Census(tuple(one(layer=f"l{i}", problem="bad") for i in range(7)))
    with pytest.raises(CensusError, match=r"l4 fprop\.input: bad \(and 2 more\)$"):
        census.check()
    with pytest.raises(CensusError, match=r"l4 fprop\.input: bad$"):
        Census(census.observations[:5]).check()


def test_to_dict_is_json() -> None:
    census = Census((one(), one(sqnr_db=math.nan, expected_db=math.inf, agreement=0.5, problem="x")))
    found = json.loads(json.dumps(census.to_dict(), allow_nan=False))
    assert set(found) == {"summary", "failures", "observations"}
    assert found["summary"] == census.summary()
    assert found["failures"] == ["up fprop.input: x"]
    first, second = found["observations"]
    assert (first["sqnr_db"], first["distinct"], first["spec"], first["agreement"]) == (
        44.0,
        200,
        "int8 row",
        None,
    )
    assert (second["sqnr_db"], second["expected_db"], second["agreement"]) == (None, None, 0.5)
    assert json.dumps(census_of("w4a8").to_dict(), allow_nan=False)


def test_the_table_groups_equal_operands() -> None:
    census = Census(
        (
            *(one(layer=f"l{i}", sqnr_db=40.0 + i, distinct=100 + i) for i in range(3)),
            one("y", spec="", levels=None, distinct=None, sqnr_db=math.nan, kernel="", dtype="float32"),
        )
    )
    rows = [
        [c.strip() for c in line.strip("│").split("│")] for line in str(census).splitlines() if "│" in line
    ]
    assert rows == [
        ["fprop.input", "int8 row", "3", "mm", "bfloat16", "102 of 256", "40.0", "41.0", "42.0"],
        ["y", "", "1", "", "float32", "", "nan", "nan", "nan"],
    ]
    header = str(census)
    assert all(
        w in header
        for w in ("operand", "spec", "layers", "kernel", "dtype", "distinct", "SQNR dB: min", "median", "max")
    )
    assert "3 quantized operands in 3 layers" in header
