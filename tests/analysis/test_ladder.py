"""Decisions on made-up runs whose answer is known."""

from __future__ import annotations

import json
import math

import pytest
from made_up_runs import PARAMETERS, write_run

from qtrain.analysis.ladder import ADOPT, HOLD, NOT_YET, Thresholds, climb, recommended
from qtrain.analysis.ladder_page import page, write_ladder
from qtrain.analysis.run_records import read_runs

LIMITS = Thresholds()
REFERENCE = {0: 2.0, 1: 2.2, 2: 2.1, 3: 1.9}


def series(root, name: str, factors, **more) -> None:
    """A run a seed, ``factors[seed]`` times the reference's loss."""
    for seed, factor in enumerate(factors):
        write_run(root, name, seed, REFERENCE[seed] * factor, **more)


def rungs_of(root, *names: str, limits: Thresholds = LIMITS):
    return climb(read_runs(root, ["base", *names]), ["base", *names], limits)


@pytest.fixture
def root(tmp_path):
    series(tmp_path, "base", [1, 1, 1, 1])
    return tmp_path


@pytest.mark.parametrize(
    ("factors", "decision", "says"),
    [
        ([1.001, 1.002, 1.0015, 1.001], ADOPT, "within the margin of 0.5 %"),
        ([0.98, 0.981, 0.979, 0.98], ADOPT, "better than the reference"),
        ([1.02, 1.021, 1.019, 1.02], NOT_YET, "worse by 1.8"),  # 2 % and an interval of 0.13
        ([1.004, 1.0, 1.008, 0.996], HOLD, "cannot tell: the interval holds the margin"),
        ([1.001, 1.001], HOLD, "cannot tell from 2 paired seeds: 3 are needed"),
        ([1.001], HOLD, "cannot tell from 1 paired seed: 3 are needed"),
        ([1.5], HOLD, "cannot tell from 1 paired seed"),  # one run proves nothing in either direction
        ([], HOLD, "missing: no run of this experiment was found"),
    ],
)
def test_decisions(root, factors, decision: str, says: str) -> None:
    series(root, "arm", factors)
    _, rung = rungs_of(root, "arm")
    assert rung.decision == decision
    assert says in rung.reasons[0]


def test_the_gap_is_relative_and_paired(root) -> None:
    series(root, "arm", [1.001, 1.003, 1.002])
    _, rung = rungs_of(root, "arm")
    assert dict(rung.gap.differences) == pytest.approx({0: 0.1, 1: 0.3, 2: 0.2})
    assert rung.gap.mean == pytest.approx(0.2)
    assert rung.gap.high == pytest.approx(0.2 + 0.2484, abs=1e-3)


def test_a_run_that_diverged_is_named_and_decides(root) -> None:
    series(root, "arm", [1.0, 1.0, 1.0])
    write_run(root, "arm", 3, 3.5, best=2.0)
    series(root, "nan", [1.0, 1.0, 1.0])
    write_run(root, "nan", 3, None, outcome="non_finite")
    _, diverged, stopped = rungs_of(root, "arm", "nan")
    assert diverged.decision == stopped.decision == NOT_YET
    assert "seed 3 diverged: its validation loss rose from 2.000 to 3.500" in diverged.reasons[0]
    assert "seed 3 was stopped: non_finite at step 33" in stopped.reasons[0]
    assert diverged.gap.n == 3


def test_a_machine_that_failed_is_no_verdict_on_the_numbers(root) -> None:
    series(root, "arm", [1.001, 1.001, 1.0015])
    write_run(root, "arm", 3, None, outcome="storage_failed")
    write_run(root, "arm", 4, None, outcome=None)
    _, rung = rungs_of(root, "arm")
    assert rung.decision == ADOPT
    assert [run.state for run, _ in rung.left_out] == ["stopped", "unfinished"]


def test_what_cannot_be_compared_is_left_out_by_name(root) -> None:
    series(root, "arm", [1.0, 1.0, 1.0])
    write_run(root, "arm", 3, 1.0, steps=200)
    write_run(root, "arm", 0, 1.0, run="again")
    write_run(root, "arm", 2, 2.1, run="zlonger", optimizer={"lr": 1.0})
    _, rung = rungs_of(root, "arm")
    whys = {run.folder.name: why for run, why in rung.left_out}
    assert set(whys) == {"seed3", "again", "zlonger"}
    assert "steps is 200, there 100" in whys["seed3"]
    assert "another run of seed 0 follows it: seed0" in whys["again"]
    assert "optimizer.lr is 1.0, there 0.003" in whys["zlonger"]
    assert rung.gap.n == 3


def test_spikes_and_clipping_hold_a_rung_that_the_loss_would_adopt(root) -> None:
    series(root, "spiky", [1.0, 1.0, 1.0], spikes=(60, 80))
    series(root, "clipped", [1.0, 1.0, 1.0], clipped_every=2)
    _, spiky, clipped = rungs_of(root, "spiky", "clipped")
    assert (spiky.decision, clipped.decision) == (HOLD, HOLD)
    assert "6 loss spikes, the reference has 0" in spiky.reasons
    assert "40.0 points more of the steps are clipped than in the reference" in clipped.reasons
    lenient = Thresholds(extra_spikes=6, clip_share_points=40.1)
    assert [rung.decision for rung in rungs_of(root, "spiky", "clipped", limits=lenient)[1:]] == [
        ADOPT,
        ADOPT,
    ]


def test_memory_and_speed_are_those_measured(root) -> None:
    series(root, "arm", [1.0, 1.0, 1.0], state_bytes=2 * PARAMETERS, tokens_per_s=700.0)
    base, arm = rungs_of(root, "arm")
    assert (base.state_bytes_per_parameter, arm.state_bytes_per_parameter) == (8.0, 2.0)
    assert arm.speed == pytest.approx(0.7)


def test_the_advice_stops_below_the_first_that_is_not_adopted(root) -> None:
    series(root, "one", [1.0, 1.0, 1.0])
    series(root, "two", [1.0])
    series(root, "three", [1.0, 1.0, 1.0])
    rungs = rungs_of(root, "one", "two", "three")
    assert recommended(rungs).name == "one"
    assert "Go as far as **one**. The next rung, two, is *hold*: cannot tell from 1 paired" in page(
        rungs, LIMITS, "x"
    )
    assert recommended(rungs_of(root, "two", "three")) is None
    assert "Stay with **base**" in page(rungs_of(root, "two"), LIMITS, "x")
    assert "every rung is adopted" in page(rungs_of(root, "one"), LIMITS, "x")


def test_without_a_reference_nothing_is_decided(tmp_path) -> None:
    for seed in range(3):
        write_run(tmp_path, "arm", seed, 2.0)
    write_run(tmp_path, "base", 0, math.nan)
    base, arm = rungs_of(tmp_path, "arm")
    assert "nothing can be decided" in base.reasons[0]
    assert (arm.decision, arm.gap.n) == (HOLD, 0)
    write_ladder([base, arm], LIMITS, tmp_path / "out", "x")
    assert "validation loss is nan" in (tmp_path / "out" / "ladder.md").read_text()


def test_the_page_names_every_run_that_does_not_count(root) -> None:
    series(root, "arm", [1.001, 1.002])
    write_run(root, "arm", 2, None, outcome=None)
    write_run(root, "arm", 3, 9.0, best=2.0)
    rungs = rungs_of(root, "arm", "absent")
    write_ladder(rungs, LIMITS, root / "out", "qtrain ladder runs=here")
    text = (root / "out" / "ladder.md").read_text()
    unsound = text.split("## Runs that do not count")[1].split("##")[0]
    assert f"{root / 'arm' / 'seed2'} (unfinished): no verdict after step 60" in unsound
    assert f"{root / 'arm' / 'seed3'} (diverged)" in unsound
    assert "absent: no run was found" in unsound
    assert "no run that counts of seed 2, 3, which the reference has" in text
    assert "| arm | **not yet** | 2 (+2 left out) | +0.15 (" in text
    assert "| absent | **hold** | 0 | ? | ? | ? | ? | ? |" in text
    assert "`qtrain ladder runs=here`" in text
    assert (root / "out" / "ladder.png").read_bytes()[:4] == b"\x89PNG"
    found = json.loads((root / "out" / "ladder.json").read_text())["rungs"][1]
    assert found["gap_percent"]["by_seed"] == pytest.approx({"0": 0.1, "1": 0.2})
    assert sorted(p.name for p in (root / "out").iterdir()) == ["ladder.json", "ladder.md", "ladder.png"]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"margin_percent": 0.0}, "margin_percent=0.0"),
        ({"min_seeds": 1}, "min_seeds=1"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"extra_spikes": -1}, "0 or more"),
    ],
)
def test_thresholds_are_checked(values, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Thresholds(**values)


def test_a_ladder_has_two_different_rungs() -> None:
    for names in (["a"], ["a", "a"]):
        with pytest.raises(ValueError, match="two or more different"):
            climb([], names, LIMITS)
