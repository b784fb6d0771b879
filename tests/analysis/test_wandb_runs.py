"""Runs out of W&B are the runs of their folders: whole, resumed, killed; offline as wandb itself writes, online by a fake."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from made_up_runs import healthy_losses

from qtrain.analysis.health import judge
from qtrain.analysis.run_sources import places, read_all
from qtrain.analysis.wandb_runs import merged, read_offline, read_online

CONFIG = {
    "name": "arm",
    "seed": 4,
    "steps": 60,
    "batch_sequences": 4,
    "sequence_tokens": 8,
    "optimizer": {"lr": 0.01},
}


# Longer than three blocks of the log: its message comes in parts
CONFIG["long"] = "long " * 20_000


def rows_of(losses: np.ndarray, first: int, every: int = 20) -> list[dict[str, Any]]:
    """As MetricsJSONL logs them: a step's training and validation in one row of W&B."""
    rows = []
    for step, loss in enumerate(losses.tolist(), start=first):
        row = {
            "step": step,
            "tokens": 32 * step,
            "train/loss": loss,
            "train/grad_norm": 0.5,
            "train/clipped": 0.0,
        }
        if step % every == 0:
            row |= {"val/loss": loss + 0.1, "quant/blocks.0.mlp.up/fprop.weight/sqnr_db": 12.0}
        rows.append(row)
    return rows


def log(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    run_id: str,
    finish: bool = True,
    final: float | None = None,
    alerts: Sequence[tuple[str, str]] = (),
) -> Path:
    """An offline run by wandb itself; its folder."""
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", disable_git=True, x_disable_meta=True, x_disable_stats=True
    )
    run = wandb.init(
        id=run_id,
        resume="allow",
        mode="offline",
        dir=folder,
        project="p",
        group="group",
        config=CONFIG,
        settings=settings,
    )
    for row in rows:
        run.log(row, step=row["step"])
    for name, text in alerts:
        run.alert(title=name, text=text)
    if final is not None:
        run.summary.update({"final/val_loss": final, "final/steps": 60, "final/parameters": 1000})
    place = Path(run.dir).parent
    run.finish(exit_code=0 if finish else 1)
    return place


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """whole: one run; resumed: a run of two attempts; both in one folder."""
    root, losses = tmp_path_factory.mktemp("wandb"), healthy_losses(60, 0)
    whole = log(root, rows_of(losses, 1), run_id="whole", final=2.5)
    # The first attempt was killed after step 40, the second went on from a checkpoint of step 30, with other noise
    cried = [("stability/loss_spike", "step 12: the loss is 9"), ("stability/diverged", "step 35: too high")]
    first = log(root, rows_of(losses[:40] + 1.0, 1), run_id="resumed", finish=False, alerts=cried)
    other = [
        ("quant/noise_floor", "step 50: the rounding of\na/dW outweighs it"),
        ("of the user", "anything"),
    ]
    second = log(root, rows_of(losses[30:], 31), run_id="resumed", final=2.5, alerts=other)
    return {"root": root, "whole": whole, "first": first, "second": second, "losses": losses}  # type: ignore[dict-item]


def test_a_run_that_wandb_wrote(offline: dict[str, Any]) -> None:
    (run,) = read_offline([offline["whole"]])
    assert (run.state, run.name, run.seed, run.val_loss, run.summary["parameters"]) == (
        "completed",
        "arm",
        4,
        2.5,
        1000,
    )
    assert run.config["optimizer"] == {"lr": 0.01}
    assert run.config["long"] == CONFIG["long"]
    np.testing.assert_array_equal(run.curves.loss, offline["losses"])
    np.testing.assert_array_equal(run.curves.tokens, 32 * np.arange(1, 61))
    np.testing.assert_array_equal(run.curves.val_loss, offline["losses"][[19, 39, 59]] + 0.1)
    ((operand, (steps, values)),) = run.curves.sqnr.items()
    assert (str(operand), steps.tolist(), values.tolist()) == (
        "blocks.0.mlp.up fprop.weight",
        [20, 40, 60],
        [12.0] * 3,
    )
    assert run.window_losses is None
    assert judge(run).verdict == "healthy"


def test_the_attempts_of_a_run_are_one_curve(offline: dict[str, Any]) -> None:
    runs = {run.folder: run for run in read_all(places([str(offline["root"])]))}
    assert set(runs) == {offline["whole"], offline["second"]}
    run = runs[offline["second"]]
    assert run.state == "completed"
    expected = offline["losses"] + np.where(np.arange(60) < 30, 1.0, 0.0)
    np.testing.assert_array_equal(run.curves.loss, expected)
    # Step 35 was done again, without that alert; texts that are not the instruments' are left to W&B
    assert [(a.name, a.step, a.message) for a in run.alerts] == [
        ("stability/loss_spike", 12, "the loss is 9"),
        ("quant/noise_floor", 50, "the rounding of\na/dW outweighs it"),
    ]
    assert any("alert stability/loss_spike while it trained, at step 12" in note for note in judge(run).notes)
    alone = read_offline([offline["first"]])[0]
    assert (alone.state, alone.curves.last_step) == ("unfinished", 40)
    assert judge(alone).verdict == "incomplete"


def test_a_file_cut_anywhere_gives_the_rows_before(offline: dict[str, Any], tmp_path: Path) -> None:
    (log_file,) = offline["whole"].glob("*.wandb")
    data = log_file.read_bytes()
    begin = len(CONFIG["long"]) + 4000  # after the configuration, without which a run says nothing
    before = -1
    for share in (0.3, 0.6, 0.9):
        cut = tmp_path / f"{share}" / "run-cut.wandb"
        cut.parent.mkdir()
        cut.write_bytes(data[: begin + int(share * (len(data) - begin))])
        (run,) = read_offline([cut])
        assert run.state == "unfinished"
        assert before < len(run.curves) <= 60
        np.testing.assert_array_equal(run.curves.loss, offline["losses"][: len(run.curves)])
        before = len(run.curves)


def test_altered_and_foreign_files_are_records_that_say_so(offline: dict[str, Any], tmp_path: Path) -> None:
    (log_file,) = offline["whole"].glob("*.wandb")
    data = bytearray(log_file.read_bytes())
    data[len(data) // 2] ^= 1
    altered, foreign = tmp_path / "run-a.wandb", tmp_path / "run-b.wandb"
    altered.write_bytes(data)
    foreign.write_bytes(b"something else")
    runs = read_offline([altered, foreign])
    assert [run.state for run in runs] == ["unreadable"] * 2
    assert "was altered" in str(runs[0].problem)
    assert "no file of W&B" in str(runs[1].problem)


def test_merging_keeps_what_a_later_attempt_did_not_reach() -> None:
    early = [{"step": s, "tokens": s, "train/loss": 1.0, "note": "x"} for s in range(1, 6)]
    late = [{"step": s, "tokens": s, "train/loss": 2.0} for s in range(3, 5)]
    rows = merged([early, late])
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 1.0)]
    assert merged([[{"_step": 3, "train/loss": 1.0}]]) == []


class FakeApi:
    """What ``wandb.Api`` answers, for a project of three runs."""

    asked: tuple[Any, ...] = ()

    def runs(self, path: str, filters: dict[str, str]) -> list[Any]:
        FakeApi.asked = (path, filters)
        if path == "me/forbidden":
            raise RuntimeError("permission denied")
        if path == "me/empty":
            return []
        rows = rows_of(healthy_losses(60, 0), 1)
        summary = {"final": {"val_loss": 2.5, "steps": 60, "parameters": 1000}, "_wandb": {"runtime": 3}}

        def run(name: str, state: str, rows: list[Any], config: dict[str, Any]) -> Any:
            return SimpleNamespace(
                id=name, name=name, group="g", state=state, config=config, summary=summary,
                scan_history=lambda: iter(rows),
            )  # fmt: skip

        return [
            run("done", "finished", rows, CONFIG),
            run("died", "crashed", rows[:33], CONFIG),
            run("alien", "finished", rows, {"lr": 1}),
        ]


def test_a_project_online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wandb.Api", FakeApi)
    done, died, alien = read_all(places(["wandb:me/project/first try"]))
    assert FakeApi.asked == ("me/project", {"group": "first try"})
    assert (done.state, done.val_loss, len(done.curves), str(done.folder)) == (
        "completed",
        2.5,
        60,
        "wandb:me/project/done",
    )
    assert (died.state, died.curves.last_step) == ("unfinished", 33)
    assert alien.state == "unreadable"
    assert "no seed or steps" in str(alien.problem)
    read_online("wandb:me/project")
    assert FakeApi.asked == ("me/project", {})
    for address, says in (
        ("wandb:me", "ENTITY/PROJECT"),
        ("wandb:me/empty", "no run"),
        ("wandb:me/forbidden", "denied"),
    ):
        with pytest.raises(ValueError, match=says):
            read_online(address)
