from __future__ import annotations

from typing import Any

from qtrain.analysis.run_labels import short_labels

BASE: dict[str, Any] = {
    "name": "train", "seed": 0, "steps": 100, "out": "outputs", "run": None, "device": "cpu", "w": "int8_row", "g": "none",
    "recipe": {"linear": {"fprop": {"weight": "int8_row"}}}, "optimizer": {"lr": 0.003, "_target_": "qtrain.optim.AdamW"},
}  # fmt: skip


def labels(*changes: dict[str, Any], runs: tuple[str, ...] = ()) -> list[str]:
    configs = [{**BASE, **change} for change in changes]
    names = [config["name"] for config in configs]
    return short_labels(names, configs, runs or tuple(f"r{i}" for i in range(len(configs))))


def test_only_what_differs_in_its_shortest_form() -> None:
    weights = {"w": "int4_row", "recipe": {"linear": {"fprop": {"weight": "int4_row"}}}}
    assert labels({}, weights) == ["w=int8_row", "w=int4_row"]
    assert labels({}, {**weights, "seed": 1}) == ["w=int8_row seed=0", "w=int4_row seed=1"]
    assert labels({"steps": 50}, {"w": None}) == ["w=int8_row steps=50", "w=none steps=100"]


def test_places_and_how_often_it_is_measured_tell_no_arm_apart() -> None:
    assert labels({"device": "cuda", "out": "a", "eval_every_steps": 5}, {"seed": 1}) == ["seed=0", "seed=1"]


def test_deep_keys_where_there_is_nothing_shorter() -> None:
    other = {"optimizer": {"lr": 1e-4, "_target_": "x.Lion"}}
    assert labels({}, other) == ["lr=0.003", "lr=0.0001"]


def test_experiments_are_named_where_there_are_several() -> None:
    assert labels({}, {"name": "w4", "seed": 0}, {"name": "w4", "seed": 1}) == [
        "train",
        "w4 seed=0",
        "w4 seed=1",
    ]


def test_what_is_the_same_is_told_apart_by_its_folder() -> None:
    assert labels({}, {}, runs=("a", "b")) == ["a", "b"]
    assert labels({}, {}, {"seed": 1}, runs=("a", "b", "c")) == ["seed=0 a", "seed=0 b", "seed=1"]
    assert short_labels(["x"], [{}], ["lost"]) == ["lost"]


def test_many_differences_are_cut() -> None:
    change = {f"k{i}": i for i in range(9)}
    (_, label) = labels({}, {**change, "seed": 7})
    assert label == "k0=0 k1=1 k2=2 k3=3 k4=4 seed=7"
