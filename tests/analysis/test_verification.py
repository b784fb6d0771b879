"""Verifying in several sittings."""

from __future__ import annotations

import json
import time

import pytest

from qtrain.analysis import verification
from qtrain.analysis.claims import CLAIMS, Bench, Claim, Measured, OutOfTime
from qtrain.analysis.verification import BEGIN, END, between_markers, chosen, page, verify


def claim(name: str, measure, **expected) -> Claim:
    return Claim(name=name, says=f"{name} is | so", source="paper", quantity="q", measure=measure, **expected)


class Counted:
    def __init__(self, *values: float | Exception) -> None:
        self.values, self.calls = list(values), 0

    def __call__(self, _: Bench) -> Measured:
        self.calls += 1
        value = self.values[min(self.calls, len(self.values)) - 1]
        if isinstance(value, Exception):
            raise value
        return Measured.mean([value, value + 0.1, value - 0.1], "three")


def test_outcomes_and_what_is_kept(tmp_path):
    measures = [Counted(5.0), Counted(-5.0), Counted(0.0), Counted(RuntimeError("broken"), 5.0)]
    claims = [claim(f"c{i}", m, low=0.0) for i, m in enumerate(measures)]
    first = verify(claims, Bench(tmp_path))
    assert [f.outcome for f in first] == ["holds", "does not hold", "cannot tell", "error"]
    assert "RuntimeError: broken (test_verification.py:" in first[3].problem
    again = verify(claims, Bench(tmp_path))
    assert [f.outcome for f in again] == ["holds", "does not hold", "cannot tell", "holds"]
    assert [m.calls for m in measures] == [1, 1, 1, 2], "an error is tried again, results are kept"
    assert again[0].measured == first[0].measured
    assert not list((tmp_path / "claims").glob(".*"))


def test_a_claim_that_changed_is_measured_again(tmp_path):
    measure = Counted(5.0)
    verify([claim("c", measure, low=0.0)], Bench(tmp_path))
    (found,) = verify([claim("c", measure, low=6.0)], Bench(tmp_path))
    assert (found.outcome, measure.calls) == ("does not hold", 2)


def test_infinite_intervals_survive(tmp_path):
    one = claim("c", lambda b: Measured.mean([1.0], "one"), low=0.0)
    verify([one], Bench(tmp_path))
    json.loads((tmp_path / "claims" / "c.json").read_text(), parse_constant=pytest.fail)
    (found,) = verify([one], Bench(tmp_path))
    assert found.outcome == "cannot tell"
    assert found.measured is not None
    assert found.measured.high == float("inf")


def test_out_of_time_leaves_the_rest_for_later(tmp_path):
    measures = [Counted(5.0), Counted(OutOfTime(), 5.0), Counted(5.0)]
    claims = [claim(f"c{i}", m, low=0.0) for i, m in enumerate(measures)]
    assert [f.outcome for f in verify(claims[:1], Bench(tmp_path))] == ["holds"]
    late = verify(claims, Bench(tmp_path, deadline=time.monotonic() - 1))
    assert [f.outcome for f in late] == ["holds", "not yet", "not yet"]
    assert [m.calls for m in measures] == [1, 0, 0]
    within = verify(claims, Bench(tmp_path))
    assert [f.outcome for f in within] == ["holds", "not yet", "holds"]
    assert [f.outcome for f in verify(claims, Bench(tmp_path))] == ["holds"] * 3


def test_claims_are_chosen_by_name_or_theme():
    assert chosen(None) == list(CLAIMS.values())
    assert [c.name for c in chosen(["mx_ceil", "QuEST", "mx_ceil"])][:2] == ["mx_ceil", "quest_constants"]
    with pytest.raises(ValueError, match="no claim or theme 'quest'; themes are optimizer states"):
        chosen(["quest"])


def test_the_page(tmp_path):
    found = [
        verification.Finding(CLAIMS["mx_ceil"], "does not hold", Measured.exactly(0.25, "")),
        verification.Finding(CLAIMS["quest_constants"], "error", None, 0.0, "ValueError: no"),
        verification.Finding(CLAIMS["four_six"], "holds", Measured(0.5, 0.4, 0.6, "")),
    ]
    text = page(found, "qtrain verify", {"qtrain": "1", "torch": "2", "python": None}, "w64")
    assert "`qtrain verify`: 1 holds, 1 does not hold, 1 error. qtrain 1, torch 2; trainings w64." in text
    assert "| <= 0 | 0.25 | exact | **does not hold** |" in text
    assert "| 0.4 .. 0.6 | holds |" in text
    assert "- `quest_constants`: ValueError: no" in text
    whole = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert between_markers(whole, text) == f"before\n{BEGIN}\n\n{text.strip()}\n\n{END}\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        between_markers("nothing", text)
