"""Who is to blame, on series of one's own: in what order suspects are asked, and that nothing after the step is a cause."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtrain.analysis.blame import (
    failing_operand,
    lasting_trouble,
    low_operands,
    lowest_sqnr,
    sqnr_series,
    worst_instruments,
)
from qtrain.analysis.curves import curves_of
from qtrain.analysis.limits import LOW_FORWARD_DB, LOW_GRADIENT_DB
from qtrain.analysis.run_records import RunRecord

UP, OUT, GRAD = "quant/b.up/fprop.weight", "quant/b.o/fprop.input", "quant/b.o/wgrad.grad_output"


def record(
    series: Mapping[str, Sequence[float]] | None = None,
    *,
    steps: Sequence[int] = (100, 200, 300),
    verdict: Mapping[str, Any] | None = None,
    census: Sequence[Mapping[str, Any]] = (),
) -> RunRecord:
    """A run whose instruments logged these series at ``steps``; names without a metric are SQNR."""
    samples: dict[int, dict[str, float]] = {step: {} for step in steps}
    for name, values in (series or {}).items():
        full = (
            name
            if name.rsplit("/", 1)[1].split(".")[-1] in ("noise_floor", "zero_bin", "unchanged", "max_logit")
            else f"{name}/sqnr_db"
        )
        for step, value in zip(steps, values, strict=True):
            samples[step][full] = value
    return RunRecord(
        Path("run"), "arm", 0, "completed", None, {}, {}, curves_of([], 1, samples), verdict or {}, observations=tuple(census)
    )  # fmt: skip


EVERYTHING = {
    UP: [20.0, 19.0, 2.0],  # below its limit at the end
    OUT: [30.0, 29.0, 20.0],  # fell most
    "optim/b.up.weight/exp_avg_sq.zero_bin": [0.0, 0.2, 0.4],
}


def blamed(run: RunRecord, step: int | None = None) -> tuple[str, int] | None:
    found = failing_operand(run, step)
    return None if found is None else (str(found.operand), found.step)


def test_suspects_are_asked_in_their_order() -> None:
    """The parameter that was not finite, the operand below its limit, the zeroed moment, the greatest fall, the lowest."""
    left = dict(EVERYTHING)
    poisoned = {"outcome": "non_finite", "parameter": "b.up.weight", "step": 250}
    assert blamed(record(left, verdict=poisoned)) == ("b.up.weight", 250)
    assert blamed(record(left)) == ("b.up fprop.weight", 300)
    left[UP] = [20.0, 19.0, 18.0]
    assert blamed(record(left)) == ("b.up.weight/exp_avg_sq", 300)
    del left["optim/b.up.weight/exp_avg_sq.zero_bin"]
    assert blamed(record(left)) == ("b.o fprop.input", 300)
    left[OUT] = [30.0, 29.0, 28.0]
    assert blamed(record(left)) == ("b.up fprop.weight", 300)
    assert blamed(record()) is None


def test_what_came_after_the_step_is_no_cause() -> None:
    run = record(EVERYTHING)
    assert blamed(run, 250) == ("b.up.weight/exp_avg_sq", 200)
    assert blamed(run, 199) == ("b.up fprop.weight", 100)  # the lowest of then
    assert blamed(run, 99) is None


def test_a_fall_counts_from_the_median_before_and_from_half_a_bit_on() -> None:
    # 25 would be the fall from the highest
    why = failing_operand(record({OUT: [40.0, 18.0, 15.0], UP: [29.0, 22.0, 22.0]}), None)
    assert why is not None
    assert (str(why.operand), why.why) == (
        "b.o fprop.input",
        "its SQNR had fallen by 14.0 dB to 15.0 at step 300",
    )
    # A fall of 3 dB is none; then the lowest is named
    assert blamed(record({OUT: [23.0, 23.0, 20.0], UP: [19.0, 19.0, 19.5]})) == ("b.up fprop.weight", 100)
    # What is exact has no fall, and is nobody's lowest
    assert blamed(record({OUT: [math.inf, math.inf, 20.0]})) == ("b.o fprop.input", 300)
    assert blamed(record({OUT: [math.inf] * 3})) is None


def test_an_operand_that_recovered_is_not_below_its_limit() -> None:
    run = record({OUT: [20.0, 2.0, 20.0], UP: [30.0, 29.0, 20.0]})
    assert blamed(run) == ("b.up fprop.weight", 300)
    assert blamed(run, 250) == ("b.o fprop.input", 200)


def test_samples_that_are_nan_are_passed_over() -> None:
    assert blamed(record({OUT: [20.0, 2.0, math.nan]})) == ("b.o fprop.input", 200)
    assert blamed(record({OUT: [math.nan] * 3})) is None
    assert lowest_sqnr(record({OUT: [math.nan] * 3})) is None


@pytest.mark.parametrize(
    ("name", "limit"), [(OUT, LOW_FORWARD_DB), (UP, LOW_FORWARD_DB), (GRAD, LOW_GRADIENT_DB)]
)
def test_each_operand_has_its_limit(name: str, limit: float) -> None:
    assert low_operands(record({name: [limit + 0.01] * 3})) == []
    ((db, text),) = low_operands(record({name: [9.0, limit - 0.01, limit - 0.01]}))
    assert db == pytest.approx(limit - 0.01)
    assert f"from step 200 on, below {limit:.1f}" in text
    assert "more" not in text


def test_a_dip_is_not_low_and_the_worst_of_several_is_named() -> None:
    assert low_operands(record({OUT: [20.0, 1.0, 20.0]})) == []
    ((db, text),) = low_operands(record({OUT: [2.0] * 3, UP: [1.0] * 3, GRAD: [4.0] * 3}))
    assert db == 1.0
    assert text.startswith("the SQNR of b.up fprop.weight is 1.0 dB from step 100 on")
    assert text.endswith("(and 2 more operands)")


def test_the_lowest_of_all() -> None:
    found = lowest_sqnr(record({OUT: [20.0, 11.0, 12.0], GRAD: [12.0, math.nan, 13.0]}))
    assert found is not None
    assert (found[0], str(found[1]), found[2]) == (11.0, "b.o fprop.input", 200)


def test_the_census_where_nothing_was_logged() -> None:
    """A layer that was called twice has two rows of an operand: the worse counts. Exact ones and results say nothing."""
    rows = [
        {"layer": "b.o", "name": "fprop.input", "sqnr_db": 9.0},
        {"layer": "b.o", "name": "fprop.input", "sqnr_db": 7.0},
        {"layer": "b.o", "name": "fprop.input", "sqnr_db": 8.0},
        {"layer": "b.o", "name": "fprop.weight", "sqnr_db": None},
        {"layer": "b.o", "name": "fprop", "sqnr_db": 1.0},
    ]
    series = sqnr_series(record(census=rows))
    assert {str(o): (s.tolist(), v.tolist()) for o, (s, v) in series.items()} == {
        "b.o fprop.input": ([0.0], [7.0])
    }
    assert blamed(record(census=rows), 50) == ("b.o fprop.input", 0)
    logged = sqnr_series(record({UP: [20.0] * 3}, census=rows))
    assert [str(o) for o in logged] == ["b.up fprop.weight"]
    np.testing.assert_array_equal(next(iter(logged.values()))[0], [100, 200, 300])


def test_the_moment_that_lost_most_is_named_and_a_chance_share_is_none() -> None:
    bins = {
        "optim/a.weight/exp_avg_sq.zero_bin": [0.3, 0.1, 0.1],
        "optim/b.weight/exp_avg_sq.zero_bin": [0.2, 0.2, 0.2],
    }
    found = failing_operand(record(bins), None)
    assert found is not None
    assert (
        str(found)
        == "look at a.weight/exp_avg_sq first: 30.0% of its second moments are stored as 0 at step 100"
    )
    assert failing_operand(record({"optim/a.weight/exp_avg_sq.zero_bin": [0.001] * 3}), None) is None


def test_trouble_that_lasts_is_more_than_a_note() -> None:
    floor, logit = "quant/a/dW/noise_floor", "attention/a/max_logit"
    assert lasting_trouble(record({floor: [0.5, 1.0, 3.0], logit: [500.0, 100.0, 9.0]})) == []
    assert lasting_trouble(record({floor: [0.5, 0.5]}, steps=(1, 2))) == []
    assert lasting_trouble(record({floor: [0.5, math.nan, 0.5]})) == []
    found = lasting_trouble(
        record(
            {floor: [3.0, 0.9, 0.9], "quant/b/dW/noise_floor": [0.7, 2.0, 0.8], logit: [9.0, 101.0, 300.0]}
        )
    )
    assert found == [
        "quant/b/dW/noise_floor is 0.80 from step 100 on, below 1: quantization noise hides the gradient",
        "attention/a/max_logit is 101 from step 200 on, above 100: attention is saturated",
    ]


def test_notes_name_the_worst_of_each_kind() -> None:
    notes = worst_instruments(
        record({
            "quant/a/dW/noise_floor": [2.0, 0.9, 0.8], "quant/b/dW/noise_floor": [1.5, 0.7, 1.5],
            "optim/a/exp_avg.unchanged": [0.98, 0.999, 0.9], "optim/a/exp_avg_sq.zero_bin": [0.0005, 0.0, 0.0],
            "attention/a/max_logit": [99.0, 100.0, 101.0],
        })
    )  # fmt: skip
    assert notes == [
        "quant/b/dW/noise_floor is 0.70 at step 200, below 1: quantization noise hides the gradient",
        "attention/a/max_logit is 101 at step 300: attention saturates",
        "optim/a/exp_avg.unchanged is 0.999 at step 200: the state stalls",
    ]
