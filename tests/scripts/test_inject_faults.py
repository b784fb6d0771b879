"""The fault injector: real faults are survived, and a program that is not reliable is found out."""

from __future__ import annotations

import json

import fault_trials
import inject_faults
import pytest
from fault_trials import CORRUPTED, FAULTS, RARE, STEPS, SURVIVED, Lab
from inject_faults import Outcome

from qtrain.training import checkpoints, fit, resume
from qtrain.training.callbacks.checkpoint import CheckpointWriter

AT_A_PLACE = "kill -9 before any sync, rename, removal or write"
NO_SPACE = "disk full: ENOSPC at any sync, rename or write, and ever after"
METRICS = "the metrics: a line altered, missing or twice, or all removed"
# A campaign has them all; of each family one that takes few seconds
KINDS = [
    "kill -9 at any moment", AT_A_PLACE, "SIGTERM", "a batch of NaN", "the same run started twice", NO_SPACE,
    "newest checkpoint: a bit flipped", "half-written lines, files and folders", METRICS,
    "a shard altered while it is read",
]  # fmt: skip
REFUSED = {"the same run started twice", "newest checkpoint: a bit flipped", METRICS}


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("faults"))
    lab.build()
    return lab


def inject(lab, tmp_path, kinds, seed=3):
    """One fault of each of ``kinds``."""
    here = Lab(tmp_path, lab.seconds, lab.places, lab.reference, lab.foreign, lab.wanted)
    for name in ("shards", "corpus"):
        (tmp_path / name).symlink_to(lab.root / name)
    return list(inject_faults.campaign(here, kinds, seed, range(len(kinds))))


def test_real_faults_are_survived(lab, tmp_path):
    found = inject(lab, tmp_path, KINDS)
    assert {o.kind: o.ended for o in found} == dict.fromkeys(KINDS, SURVIVED)
    assert 0 < max(o.lost for o in found) < STEPS
    assert {o.kind for o in found if o.refused} == REFUSED
    assert not list(tmp_path.glob("trial-*"))  # what was survived leaves nothing


def unchecked(path):
    return checkpoints.read_manifest(path)


def late(folder, checkpoint, *, step, tokens):
    """Publishes a checkpoint before it is written: not at once, but file by file."""
    publish = checkpoints._publish
    checkpoints._publish = lambda partial, final: None
    final = folder / checkpoints.checkpoint_name(step)
    final.mkdir(parents=True)
    files = {
        checkpoints.WEIGHTS: checkpoints._write_part(final / checkpoints.WEIGHTS, checkpoint),
        checkpoints.TRAINING: checkpoints._write_part(final / checkpoints.TRAINING, checkpoint),
    }
    checkpoints._publish = publish
    manifest = checkpoints.Manifest(step=step, tokens=tokens, files=files)
    (final / checkpoints.MANIFEST).write_text(manifest.to_json())
    return final


def unrewound(path, step, **_):
    return path.read_text()


def unnoticed(writer, folder, checkpoint):
    facts = checkpoint["qtrain"]
    checkpoints.write_checkpoint(folder, checkpoint, step=facts["step"], tokens=facts["tokens"])
    writer.written(folder)


OF_OTHERS = "newest checkpoint: one of another run"
SABOTAGE = {
    "checksums are not compared": (
        ["newest checkpoint: a file of another step"] * 2,
        lambda patch: patch.setattr(checkpoints, "verify", unchecked),
    ),
    "rows are kept twice": (
        ["half-written lines, files and folders"] * 2,
        lambda patch: patch.setattr(resume, "rewound_metrics", unrewound),
    ),
    "any run's checkpoint will do": ([OF_OTHERS], lambda patch: patch.setattr(resume, "differences", lambda *a: [])),
    "two may write": (
        ["the same run started twice"],
        lambda patch: patch.setattr(resume, "lock_run", lambda folder: (folder / "unlocked").open("w")),
    ),
    "a full disk is a mistake": (
        [NO_SPACE] * 2,
        lambda patch: (patch.setattr(fit, "of_storage", lambda *a: False), patch.setattr(CheckpointWriter, "_write", unnoticed)),
    ),
}  # fmt: skip
"""What is broken -> the faults that must show it, and how it is broken."""


@pytest.mark.parametrize(("kinds", "sabotage"), SABOTAGE.values(), ids=SABOTAGE)
def test_a_program_that_is_not_reliable_is_found_out(lab, tmp_path, monkeypatch, kinds, sabotage):
    sabotage(monkeypatch)
    found = inject(lab, tmp_path, kinds)
    wrong = [o.ended for o in found if o.ended != SURVIVED]
    assert wrong, [o.ended for o in found]
    if kinds == [OF_OTHERS]:
        assert set(wrong) == {CORRUPTED}  # complete, with other numbers


def test_half_of_a_checkpoint_is_found_out(lab, tmp_path, monkeypatch):
    """One that is not published at once is refused at the next start: work is lost, and a folder stays."""
    monkeypatch.setattr("qtrain.training.callbacks.checkpoint.write_checkpoint", late)
    assert any(o.refused for o in inject(lab, tmp_path, [AT_A_PLACE] * 4))


def test_a_stack_trace_is_no_way_to_end(lab, tmp_path, monkeypatch):
    monkeypatch.setattr(fault_trials.Trial, "said", lambda self: "Traceback (most recent call last):")
    (found,) = inject(lab, tmp_path, ["newest checkpoint: a file cut"])
    assert "a stack trace where a sentence belongs" in found.ended


def test_the_table():
    outcomes = [
        Outcome(0, "a", SURVIVED, (-9,), False, 3),
        Outcome(1, "b", CORRUPTED, (3,), True, 0),
        Outcome(2, "a", "stuck", (-9, 1), True, 0),
    ]
    text = inject_faults.table(outcomes, "command", "c (none here)")
    assert "| a | 2 | 1 | 1 | 1.5 | 3 | 0 | killed 2, exit code 1 1 |" in text
    assert "| b | 1 | 0 | 1 | 0.0 | 0 | 1 | verdict 1 |" in text
    assert "| **all** | 3 | 1 | 2 | 1.0 | 3 | 1 | |" in text
    assert "Left out: c (none here)." in text
    assert text.startswith("`command`, commit ")


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


def test_rare_faults_stay_rare_and_all_kinds_have_turns():
    plan = inject_faults.planned(list(FAULTS), 500)
    assert len(plan) == 500
    assert {k: plan.count(k) for k in RARE} == RARE
    assert {plan.count(k) for k in FAULTS if k not in RARE} <= {12, 13, 14, 15}
    rare = next(iter(RARE))
    with pytest.raises(ValueError, match=f"at most {RARE[rare]} are injected"):
        inject_faults.planned([rare], RARE[rare] + 1)


def test_an_interrupted_campaign_goes_on(tmp_path, monkeypatch):
    """The journal says what is left to do; another campaign's is refused."""
    plan, folder = ["a", "b", "a"], tmp_path / "journal"
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps({"plan": plan, "seed": 1}))
    done = json.dumps(
        {"number": 1, "kind": "b", "ended": SURVIVED, "codes": [3], "refused": False, "lost": 2}
    )
    (folder / "1.jsonl").write_text(f'{done}\n{{"number": 2, "ki')
    asked = []

    class Worker:
        returncode = 0

        def __init__(self, command, **_):
            self.stdin = self

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, text):
            asked.append(json.loads(text))

        def poll(self):
            return 0

        terminate = wait = poll

    monkeypatch.setattr(inject_faults.subprocess, "Popen", Worker)
    found = inject_faults.shared_campaign(plan, 1, 2, folder)
    assert [task["numbers"] for task in asked] == [[0], [2]]
    assert found == [Outcome(1, "b", SURVIVED, (3,), False, 2)]
    with pytest.raises(ValueError, match="the journal of another campaign"):
        inject_faults.shared_campaign(plan, 2, 2, folder)


def test_unknown_kinds_are_named(capsys):
    with pytest.raises(SystemExit):
        inject_faults.main(["--only", "nothing like it"])
    assert "kill -9 at any moment" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        inject_faults.main(["--override", "trainer=ddp"])
