"""The share of a run's time, on times that were made up."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest

from qtrain.commands.bench_instruments import WARMUP_STEPS, check, measured, median_interval, overhead, table


def test_a_sample_of_three_steps_time_costs_two_per_cent() -> None:
    """A sampled step of 3 s among steps of 1 s: 2 s more in 100."""
    seconds = {step: 3.0 if step % 10 == 0 else 1.0 for step in range(1, 61)}
    seconds |= dict.fromkeys(range(1, WARMUP_STEPS + 1), 500.0)  # which compile
    seconds[33] = 400.0  # a save
    found = overhead(seconds, [1, *range(10, 61, 10)])
    assert found["share_at_100_steps"] == pytest.approx(0.02)
    assert (found["samples"], found["steps"]) == (6, 55)
    assert "2.00% (2.00% .. 2.00%) of the run's time" in table({**found, "themes": ["quant"]})


def test_a_machine_that_slows_down_changes_nothing() -> None:
    """Each sample takes twice the time of its neighbours, on a machine that is at last five times as slow."""
    speed = {step: 1.0 + 4.0 * (step > 44) for step in range(1, 81)}
    seconds = {step: (2.0 if step % 10 == 0 else 1.0) * speed[step] for step in speed}
    found = overhead(seconds, range(10, 81, 10))
    assert found["extra_interval_s"] == (1.0, 5.0)
    assert found["plain_s"] in (1.0, 3.0, 5.0)
    assert found["extra_s"] == 3.0  # four samples of one second more, four of five
    assert (found["share_at_100_steps"], found["share_interval"]) == (0.01, (0.01, 0.01))


def test_the_interval_of_a_median() -> None:
    # Binomial(n, 1/2): 2 P(X < 1) = 2/64 of 6, 2 P(X < 2) = 22/1024 of 10; 2 P(X < 3) would be 0.109
    assert median_interval([5, 1, 4, 2, 3, 6]) == (1, 6)
    assert median_interval(range(1, 11)) == (2, 9)
    draw, covered = random.Random(0), 0
    for _ in range(400):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(11)])
        covered += low <= math.log(2) <= high
    assert covered / 400 > 0.95


def test_too_few_samples_are_no_measurement() -> None:
    with pytest.raises(ValueError, match="2 sampled steps with plain ones"):
        overhead(dict.fromkeys(range(1, 61), 1.0), [1, 10, 20])


def test_a_run_is_needed(tmp_path) -> None:
    for run, message in ((None, "give run=outputs"), (str(tmp_path), r"has no metrics\.jsonl")):
        with pytest.raises(ValueError, match=message):
            check(SimpleNamespace(run=run))


def test_the_times_of_a_run(tmp_path) -> None:
    """Steps of 100 tokens at 50 tokens a second, and sampled ones at 20."""
    rows = [
        {"kind": "train", "step": i, "tokens": 100 * i, "tokens_per_s": 20.0 if i % 4 == 0 else 50.0}
        for i in range(1, 31)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = [
        {"kind": "sample", "step": i, "tokens": 1, "values": {"weights/a": {"flips": 0.1}}}
        for i in range(4, 31, 4)
    ]
    (tmp_path / "instruments.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    found = measured(tmp_path)
    assert (found["plain_s"], found["extra_s"], found["themes"]) == (2.0, 3.0, ["weights"])
    assert found["share_at_100_steps"] == pytest.approx(3 / 200)
