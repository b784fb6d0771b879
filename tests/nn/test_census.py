"""The census: what is right passes, nothing is left behind, and what it says. The fakes: ``test_census_fakes``."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from census_models import TOKENS, assert_fails, census_of, gpt, loss_of
from layer_recipes import LAYERS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from qtrain.models.gpt import GPT
from qtrain.nn import Census, CensusError, QuantizedLinear, apply_recipe, take_census
from qtrain.nn.census import gradients_of_probe
from qtrain.nn.observation import Observation
from qtrain.quant import LinearRecipe, ModelRecipe


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
            assert (o.spec, o.kernel) == ("none", "mm")
        else:
            assert (o.spec, o.kernel, o.distinct) == ("", "", None)


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
    assert set(found) == {"summary", "failures", "flops", "flops_summary", "observations"}
    assert found["flops_summary"] == "none seen"
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
