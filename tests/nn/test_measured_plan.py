"""The measured plan: what is one problem, what is timed, which layer is chosen, how it is kept; what surgery makes of it."""

from __future__ import annotations

import json
from itertools import count

import pytest
import torch
from torch import nn

from qtrain.nn import apply_recipe, measured_plan
from qtrain.nn.linear import QuantizedLayer
from qtrain.nn.measured_plan import Plan, Problem, Timing, of_json, time_problem, to_json
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


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool, bool, tuple[int, ...]]]:
    """(native, compiled, autocast, x's shape) of every forward; a passage's time is then its number."""
    found: list[tuple[bool, bool, bool, tuple[int, ...]]] = []
    numbers = count(1)
    right = QuantizedLayer.forward
    compiling = False

    def forward(self, x):  # type: ignore[no-untyped-def]
        found.append((self.native, compiling, torch.is_autocast_enabled("cpu"), tuple(x.shape)))
        return right(self, x)

    def compiled(layer, **_):  # type: ignore[no-untyped-def]
        def run(x):  # type: ignore[no-untyped-def]
            nonlocal compiling
            compiling = True
            try:
                return layer(x)
            finally:
                compiling = False

        return run

    monkeypatch.setattr(QuantizedLayer, "forward", forward)
    monkeypatch.setattr(measured_plan.torch, "compile", compiled)
    monkeypatch.setattr(measured_plan, "_elapsed_ms", lambda run, device: run() or float(next(numbers)))
    monkeypatch.setattr(measured_plan, "MAX_ROUNDS", 4)
    return found


@pytest.mark.parametrize("compiled", [False, True])
def test_native_and_simulated_are_timed_in_turns_as_the_run_has_them(
    seen, monkeypatch, compiled: bool
) -> None:  # type: ignore[no-untyped-def]
    resets: list[int] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    before = torch.random.get_rng_state()
    timing = time_problem(problem(compiled=compiled), "cpu")
    assert torch.equal(torch.random.get_rng_state(), before)
    native, simulated = ((kind, compiled, True, (64, 40)) for kind in (True, False))
    warmup = [native, simulated] * measured_plan.WARMUP
    assert seen == [*warmup, *[native, simulated, simulated, native] * 2]
    assert len(resets) == compiled
    # Native was 1, 4, 5 and 8, simulated 2, 3, 6 and 7
    assert timing == Timing(native_ms=(1.0, 4.5), simulated_ms=(2.0, 4.5))


def test_fast_layers_run_until_the_time_is_up_and_slow_ones_a_few_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seconds, rounds in ((0.0, measured_plan.MIN_ROUNDS), (100.0, measured_plan.MAX_ROUNDS)):
        runs: list[int] = []
        monkeypatch.setattr(measured_plan, "SECONDS", seconds)
        measured_plan._least_and_median_ms([lambda runs=runs: runs.append(1)], "cpu")  # type: ignore[misc]
        assert len(runs) == rounds


@pytest.mark.parametrize(
    ("native_ms", "simulated_ms", "native"),
    [
        ((1.0, 2.0), (0.89, 1.7), False),  # clearly slower in both
        ((1.0, 2.0), (0.91, 1.7), True),  # within the margin
        ((1.0, 2.0), (0.50, 1.9), True),  # by chance: the medians are alike
        ((1.0, 2.0), (0.95, 1.0), True),
        ((1.0, 2.0), (3.00, 4.0), True),
    ],
)
def test_native_unless_simulated_is_clearly_faster(
    native_ms: tuple[float, float], simulated_ms: tuple[float, float], native: bool
) -> None:
    assert Timing(native_ms, simulated_ms).native is native


def test_real_times_of_compiled_layers() -> None:
    timing = time_problem(problem(compiled=True), "cpu")
    for least, median in (timing.native_ms, timing.simulated_ms):
        assert 0 < least <= median < 10_000


def test_plans_survive_their_file() -> None:
    plans = [
        Plan({"device": "a", "compiled": True}, {"k": Timing((1.0, 2.0), (3.0, 4.0))}),
        Plan({"device": "b", "compiled": False}, {"k": Timing((3.0, 4.0), (1.0, 2.0)), "l": Timing((1, 1), (1, 1))}),
    ]  # fmt: skip
    written = json.loads(json.dumps(to_json(plans)))
    assert of_json(json.dumps(written)) == plans
    assert [row["layers"]["k"]["native"] for row in written] == [True, False]
    before = {"T=1": {"native_ms": 1.0, "plain_ms": 2.0, "native": True}}  # the format before
    for text in ("[1]", '{"a": {}}', "{", "3", json.dumps(written)[:60], json.dumps(before)):
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
    assert nothing.compute == "simulated (by the measured plan)"
    apply_recipe(model, ModelRecipe(linear=INT8, compute="native"), faster=lambda layers: 1 / 0)  # type: ignore[arg-type, return-value]
