"""Surgery in place: which layers, in what order of rules, and what stays as it was."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor, nn

from qtrain.models.gpt import GPT, GPTConfig
from qtrain.nn import Clock, QuantizedLinear, SurgeryReport, apply_recipe
from qtrain.quant import LinearRecipe, ModelRecipe, Rule

W8 = LinearRecipe(fprop={"weight": "int8_row"})
W4 = LinearRecipe(fprop={"weight": "int4_row"})
W4A8 = LinearRecipe(fprop={"input": "int8_row", "weight": "int4_row"})


def gpt(**changes) -> GPT:
    return GPT(GPTConfig(vocab_size=61, sequence_tokens=8, layers=2, heads=2, width=16, **changes))


def recipes(model: nn.Module) -> dict[str, LinearRecipe]:
    return {n: m.recipe for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def test_every_linear_layer_gets_the_recipe() -> None:
    model = gpt()
    report = apply_recipe(model, ModelRecipe(linear=W8))
    names = [
        f"blocks.{i}.{n}"
        for i in (0, 1)
        for n in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")
    ]
    assert [layer.name for layer in report.layers] == [*names, "lm_head"]
    assert recipes(model) == report.plan == dict.fromkeys([*names, "lm_head"], W8)
    assert report.quantized_fraction == 1.0
    assert {m.name for m in model.modules() if isinstance(m, QuantizedLinear)} == {*names, "lm_head"}
    assert {id(m.clock) for m in model.modules() if isinstance(m, QuantizedLinear)} == {id(report.clock)}


def test_exclude_beats_rules_and_the_last_rule_wins() -> None:
    model = gpt()
    recipe = ModelRecipe(
        linear=W8,
        rules=[
            Rule(pattern="*.mlp.*", recipe=W4),
            Rule(pattern="*.down", recipe=W4A8),
            Rule(pattern="blocks.1.*", recipe=None),
            Rule(pattern="blocks.1.attn.q", recipe=W4),
        ],
        exclude=["lm_head", "blocks.0.attn.k"],
    )
    report = apply_recipe(model, recipe)
    assert report.plan == {
        "blocks.0.attn.q": W8,
        "blocks.0.attn.v": W8,
        "blocks.0.attn.o": W8,
        "blocks.0.mlp.up": W4,
        "blocks.0.mlp.down": W4A8,
        "blocks.1.attn.q": W4,
    }
    assert recipes(model) == report.plan
    assert type(model.lm_head) is nn.Linear
    # 16 x 16 attention matrices, 64 x 16 MLP ones, lm_head 61 x 16
    quantized, total = 3 * 256 + 2 * 1024 + 256, 2 * (4 * 256 + 2 * 1024) + 61 * 16
    assert report.quantized_fraction == pytest.approx(quantized / total)


def test_a_pattern_that_matches_nothing_names_near_layers_and_changes_nothing() -> None:
    model = gpt()
    with pytest.raises(
        ValueError, match=r"'blocks.0.mlp.dwn' of the recipe matches no linear layer.*blocks\.0\.mlp\.down"
    ):
        apply_recipe(model, ModelRecipe(linear=W8, rules=[Rule(pattern="blocks.0.mlp.dwn", recipe=W4)]))
    assert recipes(model) == {}
    with pytest.raises(ValueError, match=r"the pattern 'head'.*shell wildcards against the whole name"):
        apply_recipe(model, ModelRecipe(linear=W8, exclude=["head"]))
    assert recipes(model) == {}
    with pytest.raises(ValueError, match=r"'@@@'.*Near: (blocks\.\d\.\w+\.\w+, ){7}blocks\.1\.attn\.k;"):
        apply_recipe(model, ModelRecipe(linear=W8, exclude=["@@@"]))
    with pytest.raises(ValueError, match=r"'BLOCKS\.\*'"):  # names are told apart by case
        apply_recipe(model, ModelRecipe(linear=W8, exclude=["BLOCKS.*"]))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("blocks.0.mlp.dwn", "blocks.0.mlp.down, blocks.1.mlp.down, blocks.0.mlp.up"),
        ("head", "lm_head"),  # alike by 0.73 of their letters
        ("lm", "lm_head"),  # by 0.44
    ],
)
def test_the_three_nearest_names_are_shown(pattern: str, near: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"matches no linear layer. Near: {near};")):
        apply_recipe(gpt(), ModelRecipe(linear=W8, exclude=[pattern]))


def test_reports_are_frozen_and_an_empty_one_has_no_quantized_fraction() -> None:
    report = apply_recipe(gpt(), ModelRecipe(linear=W8))
    assert report.clock.counters.tolist() == [0, 0, 0]
    with pytest.raises(FrozenInstanceError):
        report.layers = ()
    with pytest.raises(FrozenInstanceError):
        report.layers[0].recipe = None
    assert SurgeryReport(Clock(), ()).quantized_fraction == 0.0


def test_long_specs_are_folded_and_not_cut() -> None:
    long = {"format": "int4", "clip": "percentile:99.5", "rounding": "stochastic", "estimator": "clipped"}
    recipe = LinearRecipe(
        fprop={"input": long, "weight": long},
        dgrad={"grad_output": long},
        wgrad={"grad_output": long, "input": long},
    )
    text = str(apply_recipe(gpt(), ModelRecipe(linear=recipe)))
    assert "…" not in text
    assert text.count("percentile:99.5") + text.count("percentile:99.") >= 5 * 13


def test_a_transform_that_does_not_fit_one_layer_changes_none() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 12), nn.Linear(12, 16))
    with pytest.raises(ValueError, match=r"^2 \(fprop\)"):
        apply_recipe(
            model, ModelRecipe(linear=LinearRecipe(fprop={"input": "int8_row", "transform": "hadamard:16"}))
        )
    assert recipes(model) == {}


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear: there is nothing to quantize"):
        apply_recipe(nn.Sequential(nn.GELU()), ModelRecipe(linear=W8))


def test_subclasses_are_refused_unless_excluded() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "up": nn.Linear(8, 8)})
    with pytest.raises(TypeError, match=r"attention\.out_proj is a NonDynamicallyQuantizableLinear.*exclude"):
        apply_recipe(model, ModelRecipe(linear=W8))
    assert recipes(model) == {}
    report = apply_recipe(model, ModelRecipe(linear=W8, exclude=["attention.*"]))
    assert recipes(model) == {"up": W8}
    # in_proj_weight is a matrix outside of any linear layer: listed, in high precision
    assert [layer.name for layer in report.layers] == ["attention.out_proj", "up", "attention.in_proj_weight"]
    assert report.layers[2].recipe is None
    assert report.quantized_fraction == 64 / (64 + 64 + 3 * 64)


def test_another_recipe_replaces_the_first_and_none_reverts() -> None:
    model = gpt()
    first = apply_recipe(model, ModelRecipe(linear=W8), seed=1)
    second = apply_recipe(model, ModelRecipe(linear=W4, exclude=["lm_head"]), seed=2)
    assert recipes(model) == second.plan
    assert set(second.plan.values()) == {W4}
    assert type(model.lm_head) is nn.Linear
    assert model.blocks[0].attn.q.clock is second.clock
    assert (int(first.clock.counters[0]), int(second.clock.counters[0])) == (1, 2)
    third = apply_recipe(model, ModelRecipe())
    assert recipes(model) == third.plan == {}
    assert third.quantized_fraction == 0.0
    assert {type(m) for m in model.modules() if isinstance(m, nn.Linear)} == {nn.Linear}


@pytest.mark.parametrize("exclude", [[], ["lm_head"]])
def test_tied_weights_stay_the_same_parameter(exclude: list[str]) -> None:
    model = gpt(tie_embeddings=True)
    weight, state = model.token_embedding.weight, list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    report = apply_recipe(model, ModelRecipe(linear=W8, exclude=exclude))
    assert model.lm_head.weight is model.token_embedding.weight is weight
    assert list(model.state_dict()) == state
    assert [id(p) for p in model.parameters()] == parameters
    assert ("lm_head" in report.plan) == (not exclude)


def test_a_module_under_two_names_is_converted_once_under_its_first() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": shared})
    report = apply_recipe(model, ModelRecipe(linear=W8))
    assert [layer.name for layer in report.layers] == ["a", "b"]
    assert model["c"] is model["a"] is shared
    assert shared.name == "a"
    with pytest.raises(ValueError, match=r"the pattern 'c'"):
        apply_recipe(model, ModelRecipe(linear=W8, exclude=["c"]))


def test_hooks_and_parameters_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    fired: list[str] = []
    model[0].register_forward_hook(lambda *_: fired.append("forward"))
    model[2].weight.register_hook(lambda g: fired.append("gradient"))
    apply_recipe(model, ModelRecipe(linear=W8))
    model(torch.ones(2, 4)).sum().backward()
    assert fired == ["forward", "gradient"]


def test_a_layer_is_the_model_itself() -> None:
    """A model that is one nn.Linear has the empty name."""
    model = nn.Linear(4, 4)
    report = apply_recipe(model, ModelRecipe(linear=W8))
    assert list(report.plan) == [""]
    assert isinstance(model, QuantizedLinear)


def test_a_transform_alone_counts_as_a_recipe_and_an_empty_recipe_does_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert apply_recipe(model, ModelRecipe(linear=LinearRecipe(fprop={"transform": "hadamard:4"}))).plan
    assert not apply_recipe(model, ModelRecipe(linear=LinearRecipe())).plan


def test_simulated_only_lists_exactly_the_column_operands() -> None:
    recipe = LinearRecipe(
        fprop={"input": "int8_column", "weight": "int8_row"},
        dgrad={"grad_output": "int8_group4", "weight": "fprop"},
        wgrad={"grad_output": "int8_column", "input": "fprop"},
    )
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    report = apply_recipe(
        model, ModelRecipe(linear=W8, rules=[Rule(pattern="1", recipe=recipe)], exclude=["2"])
    )
    assert report.simulated_only() == ["1/fprop.input", "1/wgrad.grad_output", "1/wgrad.input"]
    said = "3 operands have a scale per contraction index and can only be simulated: fprop.input, wgrad.grad_output, wgrad.input"
    assert said in " ".join(str(report).split())
    folding = apply_recipe(model, ModelRecipe(linear=W4A8))
    assert folding.simulated_only() == []
    assert "can only be simulated" not in str(folding)


def test_the_table_shows_every_layer_and_spec() -> None:
    recipe = LinearRecipe(
        fprop={"input": "int8_row", "weight": "int4_group4", "transform": "hadamard:4"},
        dgrad={"grad_output": "e5m2_tensor_sr", "weight": "fprop"},
        wgrad={"input": "int4_column"},
        saved="quantized",
    )
    model = gpt()
    text = str(apply_recipe(model, ModelRecipe(linear=recipe, exclude=["lm_head"])))
    row = next(line for line in text.splitlines() if "blocks.1.mlp.down" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells == [
        "blocks.1.mlp.down",
        "16 x 64",
        "int8 row | int4 group:4 [hadamard:4]",
        "e5m2 tensor sr | fprop",
        "- | int4 column",
        "quantized",
    ]
    head = [
        cell.strip() for cell in next(x for x in text.splitlines() if "lm_head" in x).strip("│").split("│")
    ]
    assert head == ["lm_head", "61 x 16", "high precision", "high precision", "high precision", ""]
    assert all(
        f"blocks.{i}.{n}" in text for i in (0, 1) for n in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up")
    )
    fraction = 2 * (4 * 256 + 2 * 1024) / (2 * (4 * 256 + 2 * 1024) + 61 * 16)
    assert f"{100 * fraction:.1f}% of the linear weights are quantized" in text
    header = next(line for line in text.splitlines() if "out x in" in line)
    # the mark between columns of the header is heavier than the one that belongs to their names
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == [
        "layer",
        "out x in",
        "fprop x | W",
        "dgrad g | W",
        "wgrad g | x",
        "saved",
    ]


def test_the_quantized_model_trains_like_its_parts() -> None:
    """A converted model computes what its layers compute one by one."""
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    x = torch.randn(4, 6)
    apply_recipe(model, ModelRecipe(linear=W4A8))

    def by_hand(layer: nn.Linear, x: Tensor) -> Tensor:
        sx = x.abs().amax(1, keepdim=True) / 127
        sw = layer.weight.abs().amax(1, keepdim=True) / 7
        return (x / sx).round() * sx @ ((layer.weight / sw).round() * sw).t() + layer.bias

    expected = by_hand(model[2], nn.functional.gelu(by_hand(model[0], x)))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
