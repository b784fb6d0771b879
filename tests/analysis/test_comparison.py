"""Gaps, tokens and spikes of made-up runs, by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_runs import healthy_losses, write_curve_run
from test_arms import QUANTIZED

from qtrain.analysis.arms import NotComparable
from qtrain.analysis.comparison import compare, crossing
from qtrain.analysis.gates import Gates, failures
from qtrain.analysis.run_records import read_run

STEPS = 100
GAPS = {0: 0.02, 1: 0.05, 2: 0.02}


def pair_of_arms(root: Path, gaps: dict[int, float] = GAPS, **more: Any) -> list[Any]:
    """base and arm: losses of seed s end at 2.5 + 0.1 s, and the arm's lie above by its gap throughout."""
    records = []
    for seed, gap in gaps.items():
        validation = {s: 2.5 + 0.1 * seed + 0.01 * (STEPS - s) for s in range(20, STEPS + 1, 20)}
        windows = 2.5 + 0.1 * seed + np.linspace(-1, 1, 8)
        losses = healthy_losses(STEPS, seed)
        records.append(write_curve_run(root, "base", seed, losses, validation=validation, windows=windows))
        higher = {s: v + gap for s, v in validation.items()}
        records.append(
            write_curve_run(
                root,
                "arm",
                seed,
                losses + gap,
                validation=higher,
                windows=windows + gap + [0.01, -0.01] * 4,
                **{**QUANTIZED, **more},
            )
        )
    return [read_run(folder) for folder in records]


def test_gaps_and_their_intervals(tmp_path: Path) -> None:
    comparison = compare(pair_of_arms(tmp_path))
    assert [r.label for r in comparison.arms] == ["base", "arm"]
    base, arm = comparison.arms
    assert base.gap is None
    assert dict(arm.gap.differences) == pytest.approx(GAPS)
    assert arm.gap.mean == pytest.approx(0.03)
    half = 4.302653 * math.sqrt(0.0003) / math.sqrt(3)
    assert (arm.gap.low, arm.gap.high) == pytest.approx((0.03 - half, 0.03 + half), rel=1e-4)
    relative = [0.02 / 2.5, 0.05 / 2.6, 0.02 / 2.7]
    assert list(arm.gap_fraction.differences.values()) == pytest.approx(relative)
    assert (arm.sign.positive, arm.sign.p, arm.sign.attainable) == (3, 0.25, 0.25)
    for seed, (mean, low, high) in arm.windows.items():
        assert mean == pytest.approx(GAPS[seed], abs=1e-6)
        # Eight differences of +-0.01: sd 0.01, of the mean 0.01 / sqrt 8
        assert low == pytest.approx(GAPS[seed] - 1.96 * 0.01 / math.sqrt(8), abs=2e-3)
        assert high == pytest.approx(GAPS[seed] + 1.96 * 0.01 / math.sqrt(8), abs=2e-3)
    assert arm.val_loss == pytest.approx(2.63)
    assert arm.state_bytes == 8000
    assert arm.unstable == (0, 3)
    assert "not tuned" in comparison.notes[0]


def test_tokens_to_the_baselines_loss(tmp_path: Path) -> None:
    worse = compare(pair_of_arms(tmp_path / "a")).arms[1].tokens_to_target
    # The arm of seed 0 lies 0.02 above a curve that falls by 0.01 a step of 32 tokens: the baseline was there 2 steps before
    assert (worse[0].reached, worse[0].extra) == (None, None)
    assert worse[0].overtaken == pytest.approx(32 * 98)
    assert worse[1].overtaken == pytest.approx(32 * 95)
    better = compare(pair_of_arms(tmp_path / "b", {0: -0.03, 1: -0.05})).arms[1]
    assert better.tokens_to_target[0].reached == pytest.approx(32 * 97)
    assert better.tokens_to_target[0].extra == pytest.approx(-32 * 3)
    assert better.extra_tokens == pytest.approx(-32 * 4)


def test_a_crossing_is_found_between_points() -> None:
    tokens, losses = np.array([10.0, 20.0, 30.0]), np.array([5.0, 3.0, 4.0])
    assert crossing(tokens, losses, 4.0) == 15
    assert crossing(tokens, losses, 6.0) == 10
    assert crossing(tokens, losses, 2.9) is None
    assert crossing(tokens, np.array([math.nan, 3.0, 4.0]), 3.5) == 20


def test_what_diverged_or_died_is_named_and_in_no_average(tmp_path: Path) -> None:
    records = pair_of_arms(tmp_path, {0: 0.02, 1: 0.03})
    losses = healthy_losses(STEPS, 2)
    risen = losses.copy()
    risen[50:] += 4.0
    for name, curve, more in (("base", losses, {}), ("arm", risen, QUANTIZED)):
        records.append(read_run(write_curve_run(tmp_path, name, 2, curve, **more)))
    records.append(
        read_run(
            write_curve_run(tmp_path, "base", 3, healthy_losses(STEPS, 3), validation={20: 3.5, 100: 2.9})
        )
    )
    killed = write_curve_run(
        tmp_path,
        "arm",
        3,
        healthy_losses(STEPS, 3)[:60],
        steps=STEPS,
        validation={20: 3.75, 40: 3.2},
        **QUANTIZED,
    )
    (tmp_path / "arm" / "lost").mkdir()
    records += [read_run(killed), read_run(tmp_path / "arm" / "lost")]
    comparison = compare(records)
    base, arm = comparison.arms
    assert set(arm.gap.differences) == {0, 1}
    assert arm.unstable == (1, 3)
    assert [arm.health[s].verdict for s in range(4)] == ["healthy", "healthy", "diverged", "incomplete"]
    assert arm.at_common_tokens[3] == (640, pytest.approx(0.25))
    assert any("no sound run of seed 2, 3" in note for note in arm.notes)
    assert base.val_loss == pytest.approx(np.mean([r.val_loss for r in base.arm.runs.values()]))
    assert [run.folder.name for run in comparison.unreadable] == ["lost"]
    with pytest.raises(NotComparable, match=r"none of these runs can be read: .*lost"):
        compare([records[-1]])


def test_a_diverged_baseline_gives_no_gap(tmp_path: Path) -> None:
    risen = healthy_losses(STEPS, 0)
    risen[50:] += 4.0
    runs = [
        write_curve_run(tmp_path, "base", 0, risen),
        write_curve_run(tmp_path, "arm", 0, healthy_losses(STEPS, 0), **QUANTIZED),
    ]
    comparison = compare([read_run(run) for run in runs])
    assert comparison.arms[1].gap.n == 0
    assert "no run that completed without diverging: there are no gaps" in comparison.notes[-1]


def test_allowed_differences_are_noted(tmp_path: Path) -> None:
    other = {
        "optimizer": {"lr": 0.01, "betas": [0.9, 0.95], "states": {"exp_avg": "none", "exp_avg_sq": "none"}}
    }
    records = pair_of_arms(tmp_path, **other)
    with pytest.raises(NotComparable, match=r"allow=\[optimizer.lr\]"):
        compare(records)
    comparison = compare(records, allow=["optimizer.lr"])
    assert "optimizer.lr is 0.01, in the baseline 0.003 (allowed)" in comparison.arms[1].notes


@pytest.mark.parametrize(
    ("gates", "fails"),
    [
        ({}, 0),
        ({"max_loss_gap_fraction": 0.02}, 0),
        ({"max_loss_gap_fraction": 0.01}, 1),  # the mean is 0.0115
        ({"max_loss_gap_fraction": 0.02, "confident": True}, 1),  # its upper end 0.028
        ({"max_loss_gap_fraction": 0.03, "confident": True}, 0),
        ({"verdicts": ["healthy", "noisy"]}, 0),
        ({"verdicts": ["noisy"]}, 6),
        ({"max_spikes": 0}, 0),
    ],
)
def test_gates(tmp_path: Path, gates: dict[str, Any], fails: int) -> None:
    comparison = compare(pair_of_arms(tmp_path))
    assert len(failures(comparison, Gates(**gates))) == fails


def test_what_cannot_be_measured_does_not_pass(tmp_path: Path) -> None:
    losses = healthy_losses(STEPS, 0)
    spiky = losses.copy()
    spiky[95] += 40.0
    runs = [
        write_curve_run(tmp_path, "base", 0, losses),
        write_curve_run(tmp_path, "arm", 1, spiky, **QUANTIZED),
        tmp_path / "lost" / "run",
    ]
    comparison = compare([read_run(run) for run in runs])
    found = failures(comparison, Gates(max_loss_gap_fraction=0.5, max_spikes=0))
    assert "its gap is not known from 0 pairs" in found[0]
    assert "arm seed 1: loss spikes: 1, the gate is 0" in found[1]
    assert "lost" in found[2]
    alone = compare([read_run(runs[0])])
    assert failures(alone, Gates(max_loss_gap_fraction=0.5)) == ["there is no arm beside the baseline"]


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        ({"max_loss_gap_fraction": 50}, "a share of the baseline's loss"),
        ({"max_loss_gap_fraction": math.nan}, "a share"),
        ({"max_spikes": -1}, "0 or more"),
        ({"verdicts": ["good"]}, "good is none of healthy, noisy, unstable, diverged, incomplete, failed"),
    ],
)
def test_gates_that_cannot_be(gates: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Gates(**gates)


def test_a_run_that_was_lost_before_its_first_validation_is_in_no_average(tmp_path: Path) -> None:
    """Its final loss is its best: what its folder says is "completed"."""
    records = pair_of_arms(tmp_path, {0: 0.02, 1: 0.03})
    lost = healthy_losses(STEPS, 2) + np.where(np.arange(STEPS) < 4, 0.0, 500.0)
    for name, losses, more in (("base", healthy_losses(STEPS, 2), {}), ("arm", lost, QUANTIZED)):
        records.append(read_run(write_curve_run(tmp_path, name, 2, losses, **more)))
    assert records[-1].state == "completed"
    arm = compare(records).arms[1]
    assert arm.health[2].verdict == "diverged"
    assert set(arm.gap.differences) == {0, 1}
    assert arm.val_loss < 3
