"""Recipes: construction from configs, validation, precedence."""

from __future__ import annotations

import dataclasses

import pytest

from qtrain.quant import (
    DgradRecipe,
    FpropRecipe,
    Hadamard,
    LinearRecipe,
    ModelRecipe,
    QuantSpec,
    Rule,
    WgradRecipe,
)
from qtrain.quant.recipe import GEMMS, as_operand

INT8, INT4 = QuantSpec(format="int8"), QuantSpec(format="int4")
SR = QuantSpec(format="int8", rounding="stochastic")
OPERANDS = [
    "fprop.input",
    "fprop.weight",
    "dgrad.grad_output",
    "dgrad.weight",
    "wgrad.grad_output",
    "wgrad.input",
]
CLASSES = {"fprop": FpropRecipe, "dgrad": DgradRecipe, "wgrad": WgradRecipe}


def linear(**operands: object) -> LinearRecipe:
    """From names like ``fprop_input`` and ``saved``."""
    parts: dict[str, dict[str, object]] = {}
    rest = {}
    for name, value in operands.items():
        gemm, _, field = name.partition("_")
        if gemm in GEMMS:
            parts.setdefault(gemm, {})[field] = value
        else:
            rest[name] = value
    return LinearRecipe(**parts, **rest)  # type: ignore[arg-type]


QUANTIZED = linear(fprop_input="int8_row", fprop_weight="int4_row")

# --- operands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (None, None),
        ("none", None),
        ("int8", INT8),
        ("int8_row_sr", SR),
        (INT8, INT8),
        ({"format": "int8"}, INT8),
        ({"format": "int8", "rounding": "stochastic"}, SR),
    ],
)
def test_as_operand(value, want):
    assert as_operand(value, "x") == want
    assert as_operand(value, "x", reuse=True) == want


def test_fprop_only_where_it_can_be_reused():
    assert as_operand("fprop", "x", reuse=True) == "fprop"
    assert DgradRecipe(weight="fprop").weight == "fprop"
    assert WgradRecipe(input="fprop").input == "fprop"
    for name in ("fprop.input", "fprop.weight", "dgrad.grad_output", "wgrad.grad_output"):
        gemm, _, field = name.partition(".")
        with pytest.raises(ValueError, match="fprop") as raised:
            CLASSES[gemm](**{field: "fprop"})
        assert str(raised.value) == (
            f"{name}='fprop': only dgrad.weight and wgrad.input can reuse the forward's operand; give a spec or none"
        )


@pytest.mark.parametrize("name", OPERANDS)
def test_an_operands_error_names_it(name):
    gemm, _, field = name.partition(".")
    with pytest.raises(ValueError, match=rf"^{name}: spec 'int44': 'int44' is no number format"):
        CLASSES[gemm](**{field: "int44"})
    with pytest.raises(
        TypeError, match=rf"^{name}: a spec is a QuantSpec, its short form or a mapping, not int: 4$"
    ):
        CLASSES[gemm](**{field: 4})
    assert getattr(CLASSES[gemm](**{field: "int8"}), field) == INT8
    assert getattr(CLASSES[gemm](**{field: "none"}), field) is None


def test_defaults_are_high_precision():
    recipe = LinearRecipe()
    assert recipe.fprop == FpropRecipe(input=None, weight=None, transform=None)
    assert recipe.dgrad == DgradRecipe(grad_output=None, weight=None, transform=None)
    assert recipe.wgrad == WgradRecipe(grad_output=None, input=None, transform=None)
    assert recipe.saved == "high_precision"
    assert recipe.operands() == dict.fromkeys(OPERANDS)
    assert recipe.quantizes is False
    assert recipe.stochastic is False


# --- transforms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gemm", GEMMS)
def test_transforms(gemm):
    cls = CLASSES[gemm]
    assert cls(transform="hadamard:32").transform == Hadamard(32)
    assert cls(transform="rht:16").transform == Hadamard(16, True)
    assert cls(transform=Hadamard(8)).transform == Hadamard(8)
    assert cls(transform="none").transform is None
    assert cls(transform=None).transform is None
    with pytest.raises(ValueError, match="transform 'hadamard:3': allowed are"):
        cls(transform="hadamard:3")
    assert cls(transform={"block": 8, "randomized": True}).transform == Hadamard(8, True)
    with pytest.raises(ValueError, match=r"^Hadamard: unknown size; allowed are block, randomized$"):
        cls(transform={"size": 8})
    for value, name in ((5, "int"), (["rht:4"], "list")):
        with pytest.raises(TypeError, match="transform") as raised:
            cls(transform=value)
        assert str(raised.value) == (
            f"{gemm}.transform={value!r}: expected none, hadamard:B, rht:B or package.module:Name, got {name}"
        )


@pytest.mark.parametrize(("gemm", "field"), [("dgrad", "weight"), ("wgrad", "input")])
def test_codes_of_the_forward_cannot_be_transformed(gemm, field):
    with pytest.raises(ValueError, match="transformed again") as raised:
        CLASSES[gemm](**{field: "fprop", "transform": "rht:32"})
    assert str(raised.value) == (
        f"{gemm}.transform='rht:32' with an operand 'fprop': codes of the forward cannot be transformed again; use a spec there"
    )
    assert CLASSES[gemm](**{field: "fprop", "transform": "none"}).transform is None
    assert CLASSES[gemm](**{field: "int8", "transform": "rht:32"}).transform == Hadamard(32, True)


# --- a linear layer ---------------------------------------------------------------------------------------------


def test_operands():
    recipe = linear(
        fprop_input="int2",
        fprop_weight="int3",
        dgrad_grad_output="int4",
        dgrad_weight="int5",
        wgrad_grad_output="int6",
        wgrad_input="int7",
    )
    assert list(recipe.operands()) == OPERANDS
    assert [v.format for v in recipe.operands().values()] == [f"int{b}" for b in range(2, 8)]
    for name, value in recipe.operands().items():
        assert recipe.resolved(name) == value
    with pytest.raises(KeyError):
        recipe.resolved("fprop.grad_output")


def test_resolved_follows_fprop():
    recipe = linear(fprop_input="int8", fprop_weight="int4", dgrad_weight="fprop", wgrad_input="fprop")
    assert recipe.operands()["dgrad.weight"] == recipe.operands()["wgrad.input"] == "fprop"
    assert recipe.resolved("dgrad.weight") == INT4
    assert recipe.resolved("wgrad.input") == INT8
    assert recipe.resolved("dgrad.grad_output") is None
    assert recipe.resolved("fprop.weight") == INT4


@pytest.mark.parametrize(
    ("recipe", "where"),
    [
        ({"dgrad_weight": "fprop"}, "dgrad.weight='fprop' but fprop.weight"),
        ({"dgrad_weight": "fprop", "fprop_input": "int8"}, "dgrad.weight='fprop' but fprop.weight"),
        ({"wgrad_input": "fprop"}, "wgrad.input='fprop' but fprop.input"),
        ({"wgrad_input": "fprop", "fprop_weight": "int8"}, "wgrad.input='fprop' but fprop.input"),
    ],
)
def test_nothing_to_reuse(recipe, where):
    with pytest.raises(ValueError, match="to reuse") as raised:
        linear(**recipe)
    assert str(raised.value) == (
        f"{where}=none: there is no quantized operand to reuse; write none there, or quantize the forward"
    )


def test_saved():
    assert linear(wgrad_input="int8", saved="quantized").saved == "quantized"
    assert linear(fprop_input="int8", wgrad_input="fprop", saved="quantized").saved == "quantized"
    with pytest.raises(ValueError, match="saved") as raised:
        LinearRecipe(saved="quantised")
    assert str(raised.value) == "saved='quantised': allowed are high_precision and quantized"
    with pytest.raises(ValueError, match="saved") as raised:
        linear(fprop_input="int8", saved="quantized")
    assert str(raised.value) == (
        "saved='quantized' with wgrad.input=none: a high-precision wgrad needs x itself; quantize wgrad.input or save high_precision"
    )


@pytest.mark.parametrize("name", OPERANDS)
def test_any_operand_quantizes(name):
    recipe = linear(**{name.replace(".", "_", 1): "int8"})
    assert recipe.quantizes is True
    assert recipe.stochastic is False
    assert linear(**{name.replace(".", "_", 1): "int8_sr"}).stochastic is True


@pytest.mark.parametrize("gemm", GEMMS)
def test_any_transform_counts(gemm):
    recipe = linear(**{f"{gemm}_transform": "hadamard:8"})
    assert recipe.quantizes is True
    assert recipe.stochastic is False
    assert linear(**{f"{gemm}_transform": "rht:8"}).stochastic is True


def test_from_plain_mappings():
    """As Hydra resolves a config: dicts, lists, strings and None all the way down."""
    recipe = ModelRecipe(
        **{
            "linear": {
                "fprop": {"input": "int8_row", "weight": {"format": "int4", "granularity": "group:32"}},
                "dgrad": {"weight": "fprop", "grad_output": None},
                "wgrad": {"input": "fprop", "grad_output": "int8_row_sr", "transform": None},
                "saved": "quantized",
            },
            "rules": [
                {"pattern": "*.mlp.*", "recipe": {"fprop": {"weight": "int4", "transform": "hadamard:16"}}},
                {"pattern": "*.0.*", "recipe": None},
            ],
            "exclude": ["lm_head"],
            "compute": "simulated",
        }
    )
    want = ModelRecipe(
        linear=LinearRecipe(
            fprop=FpropRecipe(input=INT8, weight=QuantSpec(format="int4", granularity="group:32")),
            dgrad=DgradRecipe(weight="fprop"),
            wgrad=WgradRecipe(input="fprop", grad_output=SR),
            saved="quantized",
        ),
        rules=(
            Rule(
                pattern="*.mlp.*",
                recipe=LinearRecipe(fprop=FpropRecipe(weight=INT4, transform=Hadamard(16))),
            ),
            Rule(pattern="*.0.*", recipe=None),
        ),
        exclude=("lm_head",),
    )
    assert recipe == want
    assert hash(recipe) == hash(want)
    assert isinstance(recipe.rules, tuple)
    assert isinstance(recipe.exclude, tuple)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LinearRecipe(fprop={"inputs": "int8"}),
            "FpropRecipe: unknown inputs; allowed are input, weight, transform",
        ),
        (
            lambda: LinearRecipe(dgrad={"input": "int8", "weigth": "int8"}),
            "DgradRecipe: unknown input, weigth; allowed are grad_output, weight, transform",
        ),
        (
            lambda: LinearRecipe(wgrad={"weight": "int8"}),
            "WgradRecipe: unknown weight; allowed are grad_output, input, transform",
        ),
        (
            lambda: ModelRecipe(linear={"forward": {}}),
            "LinearRecipe: unknown forward; allowed are fprop, dgrad, wgrad, saved",
        ),
        (
            lambda: ModelRecipe(rules=[{"pattern": "*", "recipes": None}]),
            "Rule: unknown recipes; allowed are pattern, recipe",
        ),
    ],
)
def test_unknown_fields(make, message):
    with pytest.raises(ValueError, match="unknown") as raised:
        make()
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: LinearRecipe(fprop="int8"),
            "expected a FpropRecipe or a mapping of its fields, got str: 'int8'",
        ),
        (
            lambda: LinearRecipe(dgrad=None),
            "expected a DgradRecipe or a mapping of its fields, got NoneType: None",
        ),
        (
            lambda: LinearRecipe(wgrad=DgradRecipe()),
            f"expected a WgradRecipe or a mapping of its fields, got DgradRecipe: {DgradRecipe()!r}",
        ),
        (
            lambda: ModelRecipe(linear=INT8),
            f"expected a LinearRecipe or a mapping of its fields, got QuantSpec: {INT8!r}",
        ),
        (lambda: ModelRecipe(rules=["*"]), "expected a Rule or a mapping of its fields, got str: '*'"),
        (
            lambda: Rule(pattern="*", recipe="int8"),
            "expected a LinearRecipe or a mapping of its fields, got str: 'int8'",
        ),
    ],
)
def test_wrong_types(make, message):
    with pytest.raises(TypeError) as raised:
        make()
    assert str(raised.value) == message


# --- a model ----------------------------------------------------------------------------------------------------

MLP = linear(fprop_weight="int2")
LATE = linear(fprop_weight="int3")


def test_model_defaults():
    recipe = ModelRecipe()
    assert (recipe.linear, recipe.rules, recipe.exclude, recipe.compute) == (None, (), (), "simulated")
    assert recipe.for_layer("anything") is None
    assert recipe.patterns() == []


def test_the_last_match_wins_and_exclude_beats_rules():
    recipe = ModelRecipe(
        linear=QUANTIZED,
        rules=[
            Rule(pattern="*.mlp.*", recipe=MLP),
            Rule(pattern="blocks.3.*", recipe=LATE),
            Rule(pattern="blocks.1.mlp.down", recipe=None),
        ],
        exclude=["lm_head", "blocks.3.attn.*"],
    )
    assert recipe.for_layer("blocks.0.attn.q") == QUANTIZED
    assert recipe.for_layer("blocks.0.mlp.up") == MLP
    assert recipe.for_layer("blocks.3.mlp.up") == LATE
    assert recipe.for_layer("blocks.1.mlp.down") is None
    assert recipe.for_layer("blocks.1.mlp.downward") == MLP
    assert recipe.for_layer("lm_head") is None
    assert recipe.for_layer("lm_head2") == QUANTIZED
    assert recipe.for_layer("blocks.3.attn.q") is None
    assert recipe.patterns() == ["*.mlp.*", "blocks.3.*", "blocks.1.mlp.down", "lm_head", "blocks.3.attn.*"]
    swapped = ModelRecipe(linear=QUANTIZED, rules=recipe.rules[1::-1])
    assert swapped.for_layer("blocks.3.mlp.up") == MLP


def test_a_rule_may_quantize_where_the_model_does_not():
    recipe = ModelRecipe(rules=[{"pattern": "*.up", "recipe": MLP}])
    assert recipe.for_layer("a.up") == MLP
    assert recipe.for_layer("a.down") is None


def test_a_rule_after_none_quantizes_again():
    recipe = ModelRecipe(
        linear=QUANTIZED, rules=[Rule(pattern="*", recipe=None), Rule(pattern="a.*", recipe=MLP)]
    )
    assert recipe.for_layer("a.b") == MLP
    assert recipe.for_layer("b.b") is None


def test_patterns_match_the_whole_name_and_its_case():
    recipe = ModelRecipe(linear=QUANTIZED, exclude=["up", "*.Down", "a.[01].x"])
    assert recipe.for_layer("a.up") == QUANTIZED
    assert recipe.for_layer("up") is None
    assert recipe.for_layer("a.down") == QUANTIZED
    assert recipe.for_layer("a.Down") is None
    assert recipe.for_layer("a.1.x") is None
    assert recipe.for_layer("a.2.x") == QUANTIZED


def test_a_recipe_that_quantizes_nothing_is_none():
    assert ModelRecipe(linear=LinearRecipe()).for_layer("a") is None
    assert ModelRecipe(linear=QUANTIZED, rules=[{"pattern": "a", "recipe": {}}]).for_layer("a") is None
    assert ModelRecipe(linear=linear(fprop_transform="hadamard:4")).for_layer("a") is not None


def test_one_pattern_may_be_a_string():
    assert ModelRecipe(exclude="lm_head").exclude == ("lm_head",)
    assert ModelRecipe(exclude=["a", "b"]).patterns() == ["a", "b"]


@pytest.mark.parametrize("compute", ["natve", "", None])
def test_compute(compute):
    with pytest.raises(ValueError, match="compute") as raised:
        ModelRecipe(compute=compute)
    assert str(raised.value) == (
        f"compute={compute!r}: allowed are simulated (grid values in bf16 or fp32 GEMMs), native (codes in int8 or fp8 GEMMs) "
        "and auto (native where it is fast)"
    )


def test_frozen_hashable_and_by_keyword():
    for value, field in (
        (FpropRecipe(), "input"),
        (DgradRecipe(), "weight"),
        (WgradRecipe(), "input"),
        (QUANTIZED, "saved"),
        (Rule(pattern="*", recipe=QUANTIZED), "pattern"),
        (ModelRecipe(linear=QUANTIZED), "linear"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)
        assert hash(value) == hash(dataclasses.replace(value))
        assert value == dataclasses.replace(value)
        with pytest.raises(TypeError):
            type(value)(None)  # fields are named


def test_round_trip_through_plain_containers():
    """dataclasses.asdict gives what a saved config holds; specs come back from their mappings."""
    recipe = ModelRecipe(
        linear=linear(
            fprop_input="int8", fprop_weight="nvfp4", dgrad_weight="fprop", wgrad_input="int4_group8_asym"
        ),
        rules=[Rule(pattern="*.up", recipe=MLP)],
        exclude="head",
    )
    assert ModelRecipe(**dataclasses.asdict(recipe)) == recipe
