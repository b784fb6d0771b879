"""The fault injector: real faults are survived, and a program that is not reliable is found out."""

from __future__ import annotations

import inject_faults
import pytest
from fault_trials import RARE, STEPS, Lab

from qtrain.training import checkpoints, resume

KINDS = {
    "kill": "kill -9 at any moment",
    "flip": "newest checkpoint: a bit flipped",
    "step": "newest checkpoint: a file of another step",
    "lines": "half-written lines and folders",
    "foreign": "newest checkpoint: one of another run",
    "nan": "a batch of NaN",
    "twice": "the same run started twice",
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("faults"))
    lab.build()
    return lab


def campaign(lab, tmp_path, kinds, faults):
    here = Lab(tmp_path, lab.seconds, lab.reference, lab.foreign, lab.wanted)
    for name in ("shards", "corpus"):
        (tmp_path / name).symlink_to(lab.root / name)
    plan = inject_faults.planned([KINDS[k] for k in kinds], faults)
    return inject_faults.campaign(here, plan, 3, lambda done: None)


def test_real_faults_are_survived(lab, tmp_path):
    rows = campaign(lab, tmp_path, KINDS, 14)
    assert {kind: (row.injected, row.survived, row.problems) for kind, row in rows.items()} == {
        kind: (2, 2, []) for kind in KINDS.values()
    }
    text = inject_faults.table(rows, 14, 3)
    assert "| **all** | 14 | 14 |" in text
    assert 0 < max(lost for row in rows.values() for lost in row.lost) < STEPS


def unchecked(path):
    return checkpoints.read_manifest(path)


SABOTAGE = {
    "checksums are not compared": (["step"], lambda patch: patch.setattr(checkpoints, "verify", unchecked)),
    "rows are kept twice": (
        ["lines"],
        lambda patch: patch.setattr(resume, "rewind_metrics", lambda *a, **k: None),
    ),
    "any run's checkpoint will do": (
        ["foreign"],
        lambda patch: patch.setattr(resume, "differences", lambda *a: []),
    ),
}


@pytest.mark.parametrize(("kinds", "sabotage"), SABOTAGE.values(), ids=SABOTAGE)
def test_a_program_that_is_not_reliable_is_found_out(lab, tmp_path, monkeypatch, kinds, sabotage):
    sabotage(monkeypatch)
    rows = campaign(lab, tmp_path, kinds, 3)
    (row,) = rows.values()
    assert row.survived < 3
    assert len(row.problems) == 3 - row.survived


def test_the_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{inject_faults.BEGIN}\nold\n{inject_faults.END}\nafter\n")
    inject_faults.insert(page, "new")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert ("new" in text, "old" in text) == (True, False)
    page.write_text("no place for it")
    with pytest.raises(ValueError, match="has no marks"):
        inject_faults.insert(page, "x")


def test_rare_faults_stay_rare_and_shares_cover_the_plan():
    kinds = [*KINDS.values(), *RARE]
    plan = inject_faults.planned(kinds, 100)
    assert len(plan) == 100
    (rare,) = RARE
    assert plan.count(rare) == RARE[rare]
    with pytest.raises(ValueError, match="at most 4 are injected"):
        inject_faults.planned([rare], 5)


def test_unknown_kinds_are_named(capsys):
    with pytest.raises(SystemExit):
        inject_faults.main(["--only", "nothing like it"])
    assert "kill -9 at any moment" in capsys.readouterr().err
