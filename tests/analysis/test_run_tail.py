"""Runs are made up by a generator of curves; ``read_run`` and ``judge`` of whole runs are the reference."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qtrain.analysis import run_tail
from qtrain.analysis.health import judge
from qtrain.analysis.run_records import read_run
from qtrain.analysis.run_tail import TailReader, read_tail

CONFIG = "name: arm\nseed: 3\nsteps: {steps}\nbatch_sequences: 4\nsequence_tokens: 32\nmodel: {{init_from: null}}\n"


def curve(steps: int) -> np.ndarray:
    t = np.arange(1, steps + 1)
    return 2.5 + 3 * np.exp(-t / (0.1 * steps)) + np.random.default_rng(0).normal(0, 0.03, steps)


def rows_of(losses: np.ndarray, every: int = 100) -> list[dict[str, Any]]:
    rows = []
    for i, loss in enumerate(losses.tolist(), start=1):
        axes = {"step": i, "tokens": 128 * i}
        rows.append({
            "kind": "train", **axes, "loss": loss, "grad_norm": 0.5 + 0.1 * (i % 7), "clipped": False, "lr": 3.0e-3,
            "seconds": 10 + 0.25 * i, "tokens_per_s": 512.0,
        })  # fmt: skip
        if i % every == 0:
            rows.append({"kind": "val", **axes, "val_loss": loss + 0.05, "seconds": 10 + 0.25 * i})
    return rows


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """``write(losses, done=..., steps=...)``: the folder of a run."""

    def make(losses: np.ndarray, *, done: bool = False, steps: int | None = None, every: int = 100) -> Path:
        folder = tmp_path / "runs" / "arm" / f"run{len(list(tmp_path.glob('runs/arm/*')))}"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(CONFIG.format(steps=steps or len(losses)))
        rows = rows_of(losses, every)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "attempts.jsonl").write_text('{"attempt": 1, "step": 0, "host": "n3", "slurm": null}\n')
        if done:
            final = rows[-1]["val_loss"]
            (folder / "verdict.json").write_text(
                json.dumps({"outcome": "completed", "step": len(losses), "message": ""})
            )
            (folder / "summary.json").write_text(json.dumps({"val_loss": final, "steps": len(losses)}))
        return folder

    return make


def spiked(losses: np.ndarray, at: int) -> np.ndarray:
    found = losses.copy()
    found[at : at + 2] += 3.0
    return found


@pytest.mark.parametrize(
    "name", ["healthy", "two spikes", "left for good", "came back", "nan", "does not learn"]
)
@pytest.mark.parametrize("done", [True, False])
def test_a_short_run_gets_the_verdict_of_compare(write, name: str, done: bool) -> None:
    losses = curve(500)
    if name == "two spikes":
        losses = spiked(spiked(losses, 300), 400)
    elif name == "left for good":
        losses[380:] += 1.5
    elif name == "came back":
        losses[300:350] += 1.5
    elif name == "nan":
        losses[420] = np.nan
    elif name == "does not learn":
        losses = 5.5 + 0.001 * (losses - losses.mean())
    folder = write(losses, done=done)
    tail = read_tail(folder)
    assert tail.whole
    reference = judge(read_run(folder))
    if done:
        assert (tail.health.verdict, tail.health.sentence.split(",")[0]) == (
            reference.verdict,
            reference.sentence.split(",")[0],
        )
    elif reference.verdict == "incomplete":  # what compare says of the steps until there
        said = reference.sentence.rpartition("until there ")[2]
        assert said == {"healthy": "nothing raised an alarm"}.get(
            tail.health.verdict, f"it was {tail.health.verdict}"
        )
    else:
        assert tail.health.verdict == reference.verdict


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda x: x, "healthy"),
        (lambda x: spiked(spiked(x, 9700), 9900), "noisy"),  # in the last steps
        (
            lambda x: np.concatenate([x[:5000], x[5000:] + 1.5]),
            "diverged",
        ),  # long ago, out of sight of the tail
        (lambda x: np.concatenate([x[:9950], x[9950:] + 1.5]), "diverged"),
        (lambda x: np.concatenate([x[:-5], np.full(5, np.nan)]), "diverged"),
        (lambda x: np.full(len(x), 5.5) + 0.001 * x, "failed"),  # the head says where it began
    ],
)
def test_a_long_run_is_judged_from_its_head_places_and_tail(write, change, verdict: str) -> None:
    folder = write(change(curve(10_000)), done=False, steps=20_000)
    assert (folder / "metrics.jsonl").stat().st_size > 10 * run_tail.WHOLE
    tail = read_tail(folder)
    assert not tail.whole
    assert tail.health.verdict == verdict
    assert (tail.step, tail.steps) == (10_000, 20_000)
    steps = tail.record.curves.step
    assert (np.diff(steps) > 0).all()
    assert steps[0] == 1
    assert len(steps) < 700


def test_no_row_is_read_twice_and_the_tail_holds_two_windows_of_a_score() -> None:
    assert run_tail.HEAD + run_tail.TAIL + run_tail.PLACES * run_tail.PLACE < run_tail.WHOLE
    assert run_tail.TAIL > 2 * 100 * 210


def test_numbers_of_the_last_rows(write) -> None:
    losses = curve(1000)
    folder = write(losses, steps=4000, every=300)
    tail = read_tail(folder)
    assert tail.loss == losses[-1]
    assert tail.val_loss == losses[899] + 0.05
    assert tail.pace == pytest.approx(0.25)
    assert tail.tokens_per_s == 512
    assert tail.written == pytest.approx((folder / "metrics.jsonl").stat().st_mtime, abs=1)
    assert tail.attempts[0]["host"] == "n3"


def test_the_last_validation_is_found_far_back(write) -> None:
    losses = curve(9000)
    tail = read_tail(write(losses, steps=20_000, every=5000))
    assert tail.val_loss == losses[4999] + 0.05
    assert 5000 not in tail.record.curves.val_step.tolist()


@pytest.mark.parametrize("cut", [1, 30, 120])
def test_a_half_written_last_line_is_no_row(write, cut: int) -> None:
    folder = write(curve(50))
    text = (folder / "metrics.jsonl").read_bytes()
    (folder / "metrics.jsonl").write_bytes(text[: len(text) - cut])
    tail = read_tail(folder)
    assert (tail.step, tail.broken) == (50 if cut == 1 else 49, 0)


def test_what_stands_in_the_files_raises_nothing(write) -> None:
    rows = curve(50)
    harms: dict[str, Callable[[Path], object]] = {
        "no config": lambda f: (f / "config.yaml").unlink(),
        "empty config": lambda f: (f / "config.yaml").write_bytes(b""),
        "binary config": lambda f: (f / "config.yaml").write_bytes(b"\xff\x00{"),
        "other rows": lambda f: (f / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n' * 3),
        "numbers are words": lambda f: (f / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "loss": "much"}\n'),
    }  # fmt: skip
    for name, harm in harms.items():
        folder = write(rows)
        harm(folder)
        tail = read_tail(folder)
        assert tail.record.state == "unreadable", name
        assert tail.health.verdict == "failed", name
    softer: dict[str, Callable[[Path], object]] = {
        "no metrics": lambda f: (f / "metrics.jsonl").unlink(),
        "metrics is a folder": lambda f: ((f / "metrics.jsonl").unlink(), (f / "metrics.jsonl").mkdir()),
        "cut verdict": lambda f: (f / "verdict.json").write_text('{"outc'),
        "verdict is a list": lambda f: (f / "verdict.json").write_text("[1]"),
        "garbage attempts": lambda f: (f / "attempts.jsonl").write_bytes(b"\x00\xff\n[]\n7\n"),
        "other instruments": lambda f: (f / "instruments.jsonl").write_text(
            '{"kind": "alert", "step": 1}\n{"kind": "sample", "step": 1, "values": 3}\n{"kind": "sa'
        ),
    }
    for name, harm in softer.items():
        folder = write(rows)
        harm(folder)
        tail = read_tail(folder)
        assert tail.record.state == "unfinished", name
        assert tail.health.verdict == "healthy", name


def test_a_broken_line_in_the_middle_is_counted_and_left_out(write) -> None:
    folder = write(curve(50))
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines[20] = lines[20][:30]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    tail = read_tail(folder)
    assert (tail.step, tail.broken, len(tail.record.curves)) == (50, 1, 49)


def test_a_folder_that_vanishes(write, tmp_path: Path) -> None:
    assert read_tail(tmp_path / "nowhere") is None
    folder = write(curve(50))
    for path in folder.iterdir():
        path.unlink()
    assert read_tail(folder).step == 0  # emptied, and about to go


def test_alerts_and_operands_of_the_instruments(write) -> None:
    folder = write(curve(50))
    values = {"quant/blocks.0.mlp.up/fprop.input": {"sqnr_db": -3.0}}
    rows = [{"kind": "sample", "step": s, "tokens": 1, "values": values} for s in (10, 20, 30)]
    rows.append(
        {
            "kind": "alert",
            "step": 30,
            "tokens": 9,
            "name": "stability/loss_spike",
            "value": 9.0,
            "limit": 8.0,
            "message": "m",
        }
    )
    (folder / "instruments.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    tail = read_tail(folder)
    assert [a.name for a in tail.record.alerts] == ["stability/loss_spike"]
    assert tail.health.verdict == "unstable"  # below 0 dB an operand is more noise than signal
    assert "blocks.0.mlp.up" in tail.health.sentence


def test_who_looks_again_reads_only_what_was_written_since(write, monkeypatch) -> None:
    folder = write(curve(50))
    long_ago = 1_000_000_000
    for path in (*folder.iterdir(), folder):
        os.utime(path, (long_ago, long_ago))
    read = TailReader()
    first = read(folder)
    assert read(folder) is first
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(rows_of(curve(51))[-1]) + "\n")
    second = read(folder)
    assert (first.step, second.step) == (50, 51)
    assert read(folder) is not second  # written this moment: maybe written again within the clock's tick
