"""qtrain verify, by the command line, with claims of its own."""

from __future__ import annotations

import json

import pytest

from qtrain import cli
from qtrain.analysis import claims, verification
from qtrain.analysis.claims import CLAIMS, Claim, Measured
from qtrain.analysis.verification import BEGIN, END


def test_claims_are_measured_once_and_the_page_is_written(tmp_path, capfd, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n{BEGIN}\nold\n{END}\nend\n")
    words = ["verify", "only=[mx_ceil,quest_ternary]", f"out={tmp_path / 'v'}", f"page={page}", "strict=true"]
    assert cli.main(words) == 0
    out = capfd.readouterr().out
    assert "holds          mx_ceil" in out
    assert "2 holds" in out
    text = page.read_text()
    assert "\nold\n" not in text
    assert "### QuEST" in text
    assert "`qtrain verify only=[mx_ceil,quest_ternary]`: 2 holds." in text
    assert text.endswith(f"{END}\nend\n")
    found = json.loads((tmp_path / "v" / "verification.json").read_text())["claims"]
    assert found["mx_ceil"]["measured"]["value"] == 0.0
    assert found["quest_ternary"]["outcome"] == "holds"
    assert cli.main(words) == 0
    assert "holds          mx_ceil" not in capfd.readouterr().out, "measured the first time alone"


def test_exit_codes_say_what_came_of_it(tmp_path, capfd, monkeypatch):
    wrong = Claim(
        name="wrong",
        says="1 > 2",
        source="none",
        quantity="one",
        low=2,
        measure=lambda b: Measured.exactly(1, ""),
    )
    monkeypatch.setitem(CLAIMS, "wrong", wrong)
    monkeypatch.setitem(claims.THEMES, "errors", (wrong,))
    words = ["verify", "only=[wrong]", f"out={tmp_path}"]
    assert cli.main(words) == 0
    assert cli.main([*words, "strict=true"]) == 1
    assert "does not hold" in capfd.readouterr().out
    assert verification.themed([]) == {}


def test_a_budget_that_is_spent_is_said(tmp_path, capfd):
    words = ["verify", "only=[four_six,mx_ceil]", f"out={tmp_path}"]
    assert cli.main([*words, "budget_minutes=1.0e-9"]) == 75
    out = capfd.readouterr().out
    assert "the same command goes on where it was" in out
    assert "2 not yet" in out
    assert cli.main(words) == 0
    assert "2 holds" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("only=[quest_constant]", "no claim or theme 'quest_constant'"),
        ("budget_minutes=0", "budget_minutes=0: must be positive"),
        ("page=nowhere.md", "no such file"),
    ],
)
def test_what_cannot_be_is_refused(word, said, tmp_path, capfd):
    assert cli.main(["verify", word, f"out={tmp_path / 'v'}"]) == 2
    assert said in capfd.readouterr().err
    assert not (tmp_path / "v").exists()
