"""The measured plan: what is one problem, what is timed, how it is kept; what surgery makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from qtrain.nn import apply_recipe
from qtrain.nn.measured_plan import Problem, Timing, describe, measured, of_json, time_problem, to_json
from qtrain.quant import LinearRecipe, ModelRecipe

INT8 = LinearRecipe(
    fprop={"input": "int8_row", "weight": "int8_row"},  # type: ignore[arg-type]
    dgrad={"grad_output": "int8_row", "weight": "fprop"},  # type: ignore[arg-type]
    wgrad={"grad_output": "int8_row", "input": "fprop"},  # type: ignore[arg-type]
)


def problem(tokens: int = 60, **changes: object) -> Problem:
    return Problem(**{"shape": (24, 40), "recipe": INT8, "tokens": tokens, "dtype": "bfloat16", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128), (16384, 16384)])
def test_tokens_are_bucketed(tokens: int, bucket: int) -> None:
    assert problem(tokens).bucket == bucket


def test_keys_tell_problems_apart() -> None:
    assert problem(60).key == problem(64).key
    others = [
        problem(65), problem(shape=(40, 24)), problem(dtype="float32"), problem(recipe=LinearRecipe()),
        problem(recipe=LinearRecipe(fprop=INT8.fprop, dgrad=INT8.dgrad, wgrad=INT8.wgrad, saved="quantized")),
    ]  # fmt: skip
    assert len({problem().key, *(other.key for other in others)}) == 6
    assert problem().key == (
        "T=64 I=40 O=24 bfloat16: fprop.input=int8 row, fprop.weight=int8 row, dgrad.grad_output=int8 row, "
        "dgrad.weight=fprop, wgrad.grad_output=int8 row, wgrad.input=fprop, saved=high_precision"
    )


def test_both_layers_are_timed_in_turns_and_by_their_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool, tuple[int, ...]]] = []
    monkeypatch.setattr("qtrain.nn.measured_plan._elapsed_ms", lambda run, device: run() or float(len(seen)))
    for cls in (
        nn.Linear,
        type(apply_recipe) and __import__("qtrain.nn.linear", fromlist=["x"]).QuantizedLayer,
    ):
        right = cls.forward

        def forward(self, x, right=right, name=cls.__name__):  # type: ignore[no-untyped-def]
            seen.append((name, torch.is_autocast_enabled("cpu"), tuple(x.shape)))
            return right(self, x)

        monkeypatch.setattr(cls, "forward", forward)
    before = torch.random.get_rng_state()
    timing = time_problem(problem(), "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert seen == [("QuantizedLayer", True, (64, 40)), ("Linear", True, (64, 40))] * 9
    assert timing == Timing(native_ms=5.0, plain_ms=6.0)  # of 5, 7 .. 17 and 6, 8 .. 18, after two
    assert timing.native
    assert not Timing(2.0, 2.0).native


def test_real_times_are_positive() -> None:
    timing = time_problem(problem(dtype="float32"), "cpu")
    assert 0 < timing.native_ms < 10_000
    assert 0 < timing.plain_ms < 10_000


def test_what_is_known_is_not_measured_again() -> None:
    asked: list[str] = []

    def measure(problem: Problem, device: str) -> Timing:
        asked.append(f"{problem.tokens} on {device}")
        return Timing(1.0, 2.0)

    problems = {p.key: p for p in (problem(60), problem(500))}
    known = {problem(64).key: Timing(5.0, 4.0), "another": Timing(1.0, 1.0)}
    plan = measured(problems, "cpu", known, measure)
    assert asked == ["500 on cpu"]
    assert plan == {problem(64).key: Timing(5.0, 4.0), problem(512).key: Timing(1.0, 2.0)}
    assert of_json(json.dumps(to_json(plan))) == plan
    assert describe(plan).splitlines()[0].startswith("simulated     5.000 ms native     4.000 ms plain  T=64")
    for text in ("[1]", '{"a": {}}', "{", "3"):
        with pytest.raises(ValueError, match=r"."):
            of_json(text)


def test_surgery_asks_for_the_layers_that_could_be_native() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8))
    rules = [{"pattern": "2", "recipe": {"fprop": {"weight": "int8_group4", "input": "int8_row"}}}]
    recipe = ModelRecipe(linear=INT8, rules=rules, compute="auto")  # type: ignore[arg-type]
    asked: list[dict[str, tuple[tuple[int, int], LinearRecipe]]] = []

    def faster(layers):  # type: ignore[no-untyped-def]
        asked.append(dict(layers))
        return {"1"}

    report = apply_recipe(model, recipe, faster=faster)
    assert asked == [{"0": ((16, 8), INT8), "1": ((8, 16), INT8)}]
    assert [layer.native for layer in report.layers] == [False, True, False]
    assert report.compute.startswith("native, int8 on ")
    assert report.compute.endswith(", 2 layers simulated")
    nothing = apply_recipe(model, recipe, faster=lambda layers: set())
    assert nothing.compute == "simulated (measured: native is slower than a plain layer)"
    apply_recipe(model, ModelRecipe(linear=INT8, compute="native"), faster=lambda layers: 1 / 0)  # type: ignore[arg-type, return-value]
