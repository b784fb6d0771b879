"""Which runs are one arm, which is the baseline, and what may be held against it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from made_up_runs import healthy_losses, write_curve_run

from qtrain.analysis.arms import NotComparable, allowed_differences, arms_of, find_baseline, learning_rates
from qtrain.analysis.run_records import read_run

STATES = {"lr": 0.003, "betas": [0.9, 0.95], "states": {"exp_avg": "none", "exp_avg_sq": "none"}}
LINEAR = {
    "fprop": {"input": "int8_row", "weight": "int4_row"},
    "dgrad": {"grad_output": None, "weight": None},
}
QUANTIZED = {"recipe": {"_target_": "qtrain.quant.ModelRecipe", "linear": LINEAR}, "w": "int4_row"}


def record(root: Path, name: str, seed: int = 0, **more: Any):
    return read_run(write_curve_run(root, name, seed, healthy_losses(40, seed), **more))


def test_runs_that_differ_in_seed_place_and_machine_are_one_arm(tmp_path: Path) -> None:
    runs = [
        record(tmp_path, "a", 0),
        record(
            tmp_path,
            "a",
            1,
            device="cuda",
            compile=True,
            out="elsewhere",
            data={"folder": "there", "tokenizer": "byte", "num_workers": 3},
        ),
        record(tmp_path, "a", 2, micro_batch_sequences=1, logger={"kind": "none"}),
        record(tmp_path, "a", 1, run="seed1-again"),
        record(tmp_path, "b", 0, **QUANTIZED),
        record(tmp_path, "b", 0, run="other", **{**QUANTIZED, "w": "int8_row"}),
    ]
    arms = arms_of(runs)
    assert [arm.label for arm in arms] == ["a", "b w=int4_row", "b w=int8_row"]
    assert list(arms[0].runs) == [0, 1, 2]
    assert arms[0].runs[1].folder.name == "seed1-again"
    assert [run.folder.name for run in arms[0].earlier] == ["seed1"]


def test_what_travels_in_low_bits_makes_an_arm_and_no_baseline(tmp_path: Path) -> None:
    """Of the trainer nothing else does: another number of processes is the same arm."""
    two = {"devices": 2, "gather_weights": None, "reduce_gradients": None, "error_feedback": "float32"}
    runs = [
        record(tmp_path, "a", 0, trainer={"devices": 1}, optimizer=STATES),
        record(tmp_path, "a", 1, trainer=two, optimizer=STATES),
        record(
            tmp_path, "a", 0, run="low", trainer={**two, "reduce_gradients": "int4_row"}, optimizer=STATES
        ),
        record(
            tmp_path,
            "a",
            0,
            run="forgets",
            trainer={**two, "reduce_gradients": "int4_row", "error_feedback": None},
            optimizer=STATES,
        ),
    ]
    arms = arms_of(runs)
    assert [list(arm.runs) for arm in arms] == [[0, 1], [0], [0]]
    assert "reduce_gradients=int4_row" in arms[1].label
    assert arms[1].label != arms[2].label
    assert find_baseline(arms, None) is arms[0]


def test_the_baseline_is_the_one_in_which_nothing_is_quantized(tmp_path: Path) -> None:
    low = {**STATES, "states": {"exp_avg": "dynamic8", "exp_avg_sq": "none"}}
    nothing = {"recipe": {"linear": {"fprop": {"input": None, "weight": "none"}}}}
    runs = {
        "w4": record(tmp_path, "w4", **QUANTIZED),
        "m8": record(tmp_path, "m8", optimizer=low),
        "base": record(tmp_path, "base", **nothing),
        "rules": record(tmp_path, "rules", recipe={"rules": [{"pattern": "*"}]}),
        "bnb": record(tmp_path, "bnb", optimizer={"_target_": "qtrain.optim.AdamW8bit"}),
    }
    arms = arms_of(runs.values())
    assert find_baseline(arms, None).label == "base"
    # Without it, the one whose linear layers are not
    assert find_baseline(arms_of([runs["w4"], runs["m8"]]), None).label == "m8"
    assert find_baseline(arms, "w4").label == "w4"
    assert find_baseline(arms, str(runs["w4"].folder)).label == "w4"
    assert find_baseline(arms, "m8/seed0").label == "m8"
    with pytest.raises(NotComparable, match="there is none; name one with baseline=, of: w4"):
        find_baseline(arms_of([runs["w4"]]), None)
    with pytest.raises(NotComparable, match="baseline=typo: there is none"):
        find_baseline(arms, "typo")
    with pytest.raises(NotComparable, match="there are 2: m8, bnb"):
        find_baseline(arms_of([runs["m8"], runs["bnb"], runs["w4"]]), None)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"optimizer": {**STATES, "lr": 0.001}}, "optimizer.lr"),
        ({"optimizer": {**STATES, "betas": [0.9, 0.99]}}, "optimizer.betas"),
        ({"schedule": {"warmup_steps": 5}}, "schedule.warmup_steps"),
        ({"batch_sequences": 8}, "tokens_per_step"),
        ({"sequence_tokens": 16}, "sequence_tokens"),
        ({"model": {"layers": 1, "width": 8, "tie_embeddings": True, "init_from": None}}, "tying"),
        ({"model": {"layers": 2, "width": 8, "tie_embeddings": False, "init_from": None}}, "model.layers"),
        ({"model": {"layers": 1, "width": 8, "tie_embeddings": False, "sub_norm": True}}, "model.sub_norm"),
        ({"data": {"tokenizer": "bpe:512"}}, "data.tokenizer"),
        ({"precision": "bf16"}, "precision"),
        ({"summary": {"parameters": 1011}}, "parameters"),
        ({"summary": {"data": {"shards": "a", "fingerprint": "other"}}}, "tokens_read.fingerprint"),
    ],
)
def test_what_differs_is_refused_by_name_and_may_be_allowed(
    tmp_path: Path, changed: dict[str, Any], name: str
) -> None:
    arms = arms_of([record(tmp_path, "base"), record(tmp_path, "arm", **{**QUANTIZED, **changed})])
    with pytest.raises(NotComparable) as refused:
        allowed_differences(arms, arms[0], [])
    assert f"arm cannot be compared with base: {name} is" in str(refused.value) or f"; {name} is" in str(
        refused.value
    )
    allow = str(refused.value).split("allow=[")[1].split("]")[0].split(",")
    accepted = allowed_differences(arms, arms[0], allow)
    assert name in accepted["arm"]
    assert accepted["base"] == {}
    # What is allowed by another name is not
    with pytest.raises(NotComparable):
        allowed_differences(arms, arms[0], ["steps"])


def test_a_recipe_may_differ_and_bring_few_parameters(tmp_path: Path) -> None:
    low = {**STATES, "states": {"exp_avg": "dynamic8", "exp_avg_sq": "dynamic8"}}
    arm = record(tmp_path, "arm", **QUANTIZED, optimizer=low, summary={"parameters": 1009})
    arms = arms_of([record(tmp_path, "base"), arm])
    assert allowed_differences(arms, arms[0], []) == {"base": {}, "arm": {}}
    with pytest.raises(
        NotComparable, match="nonsense is nothing that is compared; known are batch_sequences"
    ):
        allowed_differences(arms, arms[0], ["nonsense"])


def test_any_run_of_an_arm_counts_not_the_first_alone(tmp_path: Path) -> None:
    other = record(tmp_path, "arm", 1, **QUANTIZED, summary={"data": {"shards": "b"}})
    arms = arms_of([record(tmp_path, "base"), record(tmp_path, "arm", 0, **QUANTIZED), other])
    with pytest.raises(NotComparable, match=r"tokens_read\.shards is b, there a"):
        allowed_differences(arms, arms[0], [])


def test_whether_rates_were_tuned_is_said(tmp_path: Path) -> None:
    same = arms_of([record(tmp_path, "a"), record(tmp_path, "b", **QUANTIZED)])
    assert learning_rates(same) == "All arms have the learning rate 0.003; it was not tuned arm by arm."
    more = arms_of([record(tmp_path, "c"), record(tmp_path, "d", optimizer={**STATES, "lr": 0.01})])
    assert "differ (0.003, 0.01)" in learning_rates(more)
