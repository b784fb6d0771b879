"""Runs that were built to fail in known ways are told so, with step and operand; healthy ones are left alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_runs import healthy_losses, write_curve_run

from qtrain.analysis.health import judge
from qtrain.analysis.run_records import read_run

STEPS = 600
KEY = "quant/{}/{}/sqnr_db"


def health_of(root: Path, losses: Any, **more: Any):
    return judge(read_run(write_curve_run(root, "arm", 0, losses, **more)))


def sqnr(values: dict[str, list[float]], every: int = 100) -> list[dict[str, Any]]:
    """Rows of instruments: "layer gemm.operand" -> dB at steps every, 2 every, ..."""
    n = len(next(iter(values.values())))
    return [
        {"step": every * (i + 1), **{KEY.format(*name.split(" ")): v[i] for name, v in values.items()}}
        for i in range(n)
    ]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("steps", [80, STEPS])
def test_no_false_alarm_in_healthy_runs(tmp_path: Path, seed: int, steps: int) -> None:
    good = {"blocks.0.mlp.up fprop.weight": [16.0, 15.5], "blocks.0.mlp.up wgrad.grad_output": [9.0, 8.0]}
    norms = np.exp(0.2 * np.random.default_rng(seed).standard_normal(steps))  # many of them are clipped
    health = health_of(
        tmp_path, healthy_losses(steps, seed), grad_norms=norms, instruments=sqnr(good, steps // 2)
    )
    assert (health.verdict, health.evidence, health.blame) == ("healthy", (), None), health
    assert f"{steps} steps without an alarm" in health.sentence


def test_one_odd_batch_is_no_alarm_and_is_told(tmp_path: Path) -> None:
    losses = healthy_losses(STEPS, 0)
    losses[300] += 3.0
    health = health_of(tmp_path, losses)
    assert health.verdict == "healthy"
    assert any("1 loss spike without one of the gradient, at step 301" in note for note in health.notes)


def test_spikes(tmp_path: Path) -> None:
    losses = healthy_losses(STEPS, 0)
    norms = 0.5 + 0.02 * np.random.default_rng(0).standard_normal(STEPS)
    losses[[250, 400]] += 3.0
    norms[400] += 5.0
    health = health_of(tmp_path, losses, grad_norms=norms)
    assert (health.verdict, health.first_step) == ("noisy", 251)
    assert "2 loss spikes, 1 of loss and gradient norm together, the first at step 251" in health.sentence


def test_spikes_that_the_baseline_has_too_are_the_datas(tmp_path: Path) -> None:
    losses = healthy_losses(STEPS, 0)
    losses[[250, 400]] += 3.0
    run = read_run(write_curve_run(tmp_path, "arm", 0, losses))
    twin = read_run(write_curve_run(tmp_path, "base", 0, losses + 0.01))
    other = read_run(write_curve_run(tmp_path, "other", 0, healthy_losses(STEPS, 0)))
    assert judge(run, twin).verdict == "healthy"
    assert any(
        "2 loss spikes in steps where the baseline has them" in note for note in judge(run, twin).notes
    )
    assert judge(run, other).verdict == judge(run, run).verdict == judge(run).verdict == "noisy"


@pytest.mark.parametrize("from_start", [False, True])
def test_a_loss_that_rises_for_good(tmp_path: Path, from_start: bool) -> None:
    losses = healthy_losses(STEPS, 0)
    at = 3 if from_start else 350
    losses[at:] = losses[at:] + np.linspace(1.0, 6.0, STEPS - at)
    health = health_of(tmp_path, losses)
    assert (health.verdict, health.first_step) == ("diverged", at + 1)
    assert f"rose from step {at + 1} on" in health.sentence
    assert "did not come back" in health.sentence


def test_a_loss_that_rises_and_comes_back(tmp_path: Path) -> None:
    losses = healthy_losses(STEPS, 0)
    losses[350:420] += 2.0
    health = health_of(tmp_path, losses)
    assert (health.verdict, health.first_step) == ("unstable", 351)
    assert "came back" in health.sentence
    assert "did not" not in health.sentence


def test_nan_names_step_and_parameter(tmp_path: Path) -> None:
    verdict = {"outcome": "non_finite", "step": 201, "message": "the loss of step 201 is nan", "quantity": "loss",
               "value": "nan", "parameter": "blocks.1.attn.o.weight"}  # fmt: skip
    health = health_of(tmp_path, healthy_losses(STEPS, 0)[:200], steps=STEPS, verdict=verdict)
    assert (health.verdict, health.first_step) == ("diverged", 201)
    assert health.sentence.startswith("diverged: the loss of step 201 is nan")
    assert "blocks.1.attn.o.weight" in health.sentence
    assert health.blame is not None
    assert health.blame.operand == "blocks.1.attn.o.weight"


@pytest.mark.parametrize("what", ["loss", "gradient norm", "validation loss"])
def test_nan_without_a_verdict_is_seen_in_the_curve(tmp_path: Path, what: str) -> None:
    losses, norms = healthy_losses(300, 0), np.full(300, 0.5)
    validation = {100: 3.0, 200: 2.9, 300: 2.8}
    if what == "loss":
        losses[200] = math.nan
    elif what == "gradient norm":
        norms[200] = math.inf
    else:
        validation[200] = math.nan
    health = health_of(tmp_path, losses, steps=STEPS, grad_norms=norms, validation=validation)
    assert (health.verdict, health.first_step) == ("diverged", 200 if what.startswith("val") else 201)
    assert what in health.sentence
    assert any("no verdict after step 300 of 600" in note for note in health.notes)


def test_the_operand_that_fell_is_to_blame(tmp_path: Path) -> None:
    losses = healthy_losses(STEPS, 0)
    losses[350:] += 3.0
    logged = {
        "blocks.0.mlp.up fprop.weight": [15.0] * 6,
        "blocks.1.attn.o fprop.input": [18.0, 18.0, 17.0, 12.0, 1.0, 1.0],
        "blocks.1.attn.q fprop.input": [13.0, 13.0, 12.0, 12.0, 12.0, 12.0],
    }
    # What came after step 351 is not its cause
    health = health_of(tmp_path, losses, instruments=sqnr(logged, 87))
    assert (health.verdict, health.first_step) == ("diverged", 351)
    assert (
        "look at blocks.1.attn.o fprop.input first: its SQNR had fallen by 6.0 dB to 12.0 at step 348"
        in health.sentence
    )


def test_a_low_sqnr_of_one_operand(tmp_path: Path) -> None:
    logged = {
        "blocks.0.mlp.up fprop.weight": [15.0] * 6,
        "blocks.1.attn.o fprop.input": [15.0, 2.0, 2.0, 1.5, 2.0, 2.0],
    }
    health = health_of(tmp_path, healthy_losses(STEPS, 0), instruments=sqnr(logged))
    assert health.verdict == "noisy"
    assert "the SQNR of blocks.1.attn.o fprop.input is 2.0 dB from step 200 on, below 3.0" in health.sentence
    assert "more operands" not in health.sentence
    assert str(health.blame.operand) == "blocks.1.attn.o fprop.input"


@pytest.mark.parametrize(
    ("operand", "db", "verdict"),
    [
        ("fprop.input", 4.0, "healthy"),  # a gradient's limit is not a forward operand's
        ("wgrad.grad_output", 4.0, "noisy"),
        ("fprop.input", -0.5, "unstable"),
        ("dgrad.grad_output", -3.0, "unstable"),
    ],
)
def test_limits_by_operand(tmp_path: Path, operand: str, db: float, verdict: str) -> None:
    logged = {f"blocks.0.mlp.up {operand}": [db] * 6}
    assert health_of(tmp_path, healthy_losses(STEPS, 0), instruments=sqnr(logged)).verdict == verdict


def test_one_dip_of_the_sqnr_is_none(tmp_path: Path) -> None:
    logged = {"a fprop.input": [15.0, 15.0, 1.0, 15.0, 15.0, 15.0]}
    assert health_of(tmp_path, healthy_losses(STEPS, 0), instruments=sqnr(logged)).verdict == "healthy"


def test_the_census_serves_where_nothing_was_logged(tmp_path: Path) -> None:
    rows = [
        {"layer": "blocks.0.mlp.up", "name": "fprop.weight", "levels": 4, "sqnr_db": 2.5},
        {"layer": "blocks.0.mlp.up", "name": "fprop.input", "levels": None, "sqnr_db": -5.0},  # not quantized
        {"layer": "blocks.0.mlp.up", "name": "dgrad.weight", "levels": 4, "sqnr_db": None},  # exact
    ]
    health = health_of(tmp_path, healthy_losses(STEPS, 0), observations=rows)
    assert health.verdict == "noisy"
    assert "blocks.0.mlp.up fprop.weight is 2.5 dB from step 0 on" in health.sentence


@pytest.mark.parametrize("how", ["the loss never falls", "weights stand still"])
def test_a_stalled_optimizer(tmp_path: Path, how: str) -> None:
    draw = np.random.default_rng(0)
    if how == "the loss never falls":
        health = health_of(tmp_path, 5.55 + 0.02 * draw.standard_normal(STEPS))
        assert "does not learn: the loss is 5.5" in health.sentence
    else:
        losses = healthy_losses(STEPS, 0)
        validation = {100: 3.0, 200: 2.8, 300: 2.71, 400: 2.71, 500: 2.71, 600: 2.71}
        health = health_of(tmp_path, losses, validation=validation)
        assert "the same, 2.710000, at steps 300 and 400" in health.sentence
        assert health.first_step == 300
    assert health.verdict == "failed"


def test_a_pretrained_model_may_stay_where_it_is(tmp_path: Path) -> None:
    losses = 2.5 + 0.02 * np.random.default_rng(0).standard_normal(STEPS)
    assert health_of(tmp_path, losses, model={"init_from": "folder"}).verdict == "healthy"


def test_other_instruments_are_notes(tmp_path: Path) -> None:
    rows = [{"step": 100, "quant/a/dW/noise_floor": 0.7, "optim/a.weight/exp_avg.unchanged": 0.999,
             "optim/a.weight/exp_avg_sq.zero_bin": 0.25, "attention/b/max_logit": 340.0, "quant/a/y/sqnr_db": -9.0}]  # fmt: skip
    health = health_of(tmp_path, healthy_losses(STEPS, 0), instruments=rows)
    assert health.verdict == "healthy"
    text = " ".join(health.notes)
    for part in (
        "noise_floor is 0.70 at step 100",
        "unchanged is 0.999",
        "zero_bin is 25.0%",
        "max_logit is 340",
    ):
        assert part in text
    losses = healthy_losses(STEPS, 0)
    losses[350:] += 3.0
    blamed = judge(read_run(write_curve_run(tmp_path, "b", 0, losses, instruments=rows)))
    assert "look at a.weight/exp_avg_sq first: 25.0% of its second moments are stored as 0" in blamed.sentence


def test_trouble_that_lasts_makes_a_run_noisy(tmp_path: Path) -> None:
    floors = [{"step": s, "quant/a/dW/noise_floor": 0.8} for s in (100, 200, 300)]
    health = health_of(tmp_path / "floor", healthy_losses(STEPS, 0), instruments=floors)
    assert health.sentence.startswith("noisy: quant/a/dW/noise_floor is 0.80 from step 100 on")
    logits = [{"step": s, "attention/b/max_logit": 700.0} for s in (100, 200, 300)]
    health = health_of(tmp_path / "logit", healthy_losses(STEPS, 0), instruments=logits)
    assert (health.verdict, health.blame) == ("noisy", None)
    assert "attention is saturated" in health.sentence


def _cut(folder: Path, name: str, keep: int) -> None:
    lines = (folder / name).read_text().splitlines(keepends=True)
    (folder / name).write_text("".join(lines[:keep]) + lines[keep][:9])


def test_killed_interrupted_stopped(tmp_path: Path) -> None:
    losses = healthy_losses(STEPS, 0)[:300]
    killed = write_curve_run(tmp_path, "killed", 0, losses, steps=STEPS)
    _cut(killed, "metrics.jsonl", 200)
    health = judge(read_run(killed))
    assert health.verdict == "incomplete"
    assert "killed, or still running; until there nothing raised an alarm" in health.sentence
    bad = losses.copy()
    bad[200:] += 3.0
    assert judge(read_run(write_curve_run(tmp_path, "bad", 0, bad, steps=STEPS))).verdict == "diverged"
    for outcome, expected in (
        ("interrupted", "incomplete"),
        ("storage_failed", "failed"),
        ("census_failed", "failed"),
    ):
        verdict = {"outcome": outcome, "step": 300, "message": "why it was"}
        health = judge(read_run(write_curve_run(tmp_path, outcome, 0, losses, steps=STEPS, verdict=verdict)))
        assert health.verdict == expected
        assert f"{outcome} at step 300: why it was" in health.sentence


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda f: _cut(f, "metrics.jsonl", 200), "metrics.jsonl has 197 rows up to step 197"),
        (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl has 0 rows"),
        (lambda f: (f / "summary.json").unlink(), "has no summary.json"),
        (lambda f: (f / "config.yaml").unlink(), "config.yaml"),
        (lambda f: (f / "config.yaml").write_text("just words"), "holds no configuration"),
        (lambda f: (f / "verdict.json").write_text("{"), "not those of a run"),
        (lambda f: (f / "metrics.jsonl").write_text('{"a": 1}\n' * 3), "not those of a run"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, harm, says: str) -> None:
    folder = write_curve_run(tmp_path, "arm", 0, healthy_losses(STEPS, 0))
    harm(folder)
    health = judge(read_run(folder))
    assert health.verdict == "failed"
    assert says in health.sentence
