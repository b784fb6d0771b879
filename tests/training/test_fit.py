"""A whole run: it learns, leaves its folder, and its table says what its files say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

from qtrain.training.assembly import assemble
from qtrain.training.callbacks.metrics_jsonl import read_metrics
from qtrain.training.checkpoints import MANIFEST, TRAINING, WEIGHTS
from qtrain.training.fit import train
from qtrain.training.report import table_rows
from qtrain.training.resume import StartRefused
from qtrain.training.saved import checkpoint_of, read_checkpoint


@pytest.fixture(scope="module")
def finished(configure, tmp_path_factory):
    """A run of 40 steps, with its folder and its configuration."""
    out = tmp_path_factory.mktemp("finished")
    config = configure(out, "steps=40", "eval_every_steps=16", "run=one", "checkpoint_every_steps=10")
    verdict, folder = train(assemble(config))
    assert verdict.good
    return folder, config


def test_training_lowers_the_loss(finished):
    rows = [r for r in read_metrics(finished[0] / "metrics.jsonl") if r["kind"] == "train"]
    assert [r["step"] for r in rows] == list(range(1, 41))
    assert abs(rows[0]["loss"] - 5.55) < 0.1  # ln 257: nothing known yet
    # The corpus has about 20 letters: 3 nats by frequencies alone
    assert sum(r["loss"] for r in rows[-5:]) / 5 < 3.0


def test_validations_come_when_due_and_at_the_end(finished):
    rows = [r for r in read_metrics(finished[0] / "metrics.jsonl") if r["kind"] == "val"]
    assert [r["step"] for r in rows] == [16, 32, 40]
    assert rows[-1]["val_loss"] == json.loads((finished[0] / "summary.json").read_text())["val_loss"]


def test_the_losses_of_the_windows_are_kept(finished):
    losses = np.load(finished[0] / "window_losses.npy")
    summary = json.loads((finished[0] / "summary.json").read_text())
    assert losses.shape == (summary["data"]["val_windows"],)
    assert losses.dtype == np.float32
    assert np.ptp(losses) > 0
    assert losses.mean(dtype=np.float64) == pytest.approx(summary["val_loss"], rel=1e-12)


def test_the_folder_is_complete(finished):
    folder, config = finished
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        "config.yaml",
        "versions.json",
        "surgery.txt",
        "census.json",
        "metrics.jsonl",
        "instruments.jsonl",
        "loss.png",
        "sample.txt",
        "window_losses.npy",
        "tokenizer/about.json",
        "summary.json",
        "verdict.json",
        "attempts.jsonl",
        ".lock",
        *(f"checkpoints/step-{n}/{f}" for n in ("000030", "000040") for f in PARTS),
    }
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((folder / "verdict.json").read_text())["outcome"] == "completed"
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert len(versions["git_commit"]) == 40


def test_the_table_says_what_the_summary_says(finished, capsys):
    summary = json.loads((finished[0] / "summary.json").read_text())
    rows = dict(table_rows(summary))
    assert f"{summary['val_loss']:.4f} nats/token" in rows["validation loss"]
    assert f"{summary['val_bits_per_byte']:.4f} bits/byte" in rows["validation loss"]
    assert f"{summary['trigram_loss']:.4f}" in rows["trigram, same windows"]
    held = summary["optimizer_state_bytes"]
    assert f"{1 - held['total'] / held['as_float32']:.1%} saved" in rows["optimizer states"]
    assert rows["files"] == str(finished[0])
    assert "optimizer" not in rows, "of the fused kernel nothing is said on a CPU"
    on_gpu = {**summary, "optimizer_fused": {"fused": 148, "tensors": 148, "eager": {}}}
    assert dict(table_rows(on_gpu))["optimizer"] == "148 of 148 tensors in the fused kernel"
    # Bytes: 1 token a byte, but for the end of each document
    assert summary["val_bits_per_byte"] == pytest.approx(summary["val_loss"] / 0.693147, rel=0.01)
    assert 0.6 < 1 - held["total"] / held["as_float32"] < 0.75  # 8-bit codes, 1/8 bit of scales, some float32


def test_checkpoints_hold_plain_containers(finished):
    saved = read_checkpoint(finished[0] / "checkpoints" / "step-000040")
    assert saved["hyper_parameters"] == {"config": finished[1]}
    assert saved["qtrain"]["step"] == 40
    assert saved["qtrain"]["tokens"] == 40 * 4 * 32
    assert {"state_dict", "optimizer_states", "lr_schedulers", "loops"} <= set(saved)
    assert all(key.startswith("model.") for key in saved["state_dict"])


def test_a_second_run_of_that_name_is_refused(finished):
    with pytest.raises(StartRefused, match="choose another run="):
        train(assemble(finished[1]))


def test_the_gap_to_a_baseline(finished, configure):
    folder, config = finished
    more = ["steps=2", "name=other", f"baseline={config['name']}"]
    verdict, other = train(assemble(configure(folder.parents[1], *more)))
    assert verdict.good
    mine = json.loads((other / "summary.json").read_text())
    theirs = json.loads((folder / "summary.json").read_text())
    assert mine["baseline"] == "train/one"
    assert mine["gap_nats"] == mine["val_loss"] - theirs["val_loss"]
    assert f"{mine['gap_percent']:+.2f}%" in dict(table_rows(mine))["gap to train/one"]


def test_a_baseline_on_other_windows_is_refused_before_training(finished, configure):
    folder = finished[0]
    config = configure(folder.parents[1], "name=third", f"baseline={folder}", "eval_windows=4")
    with pytest.raises(ValueError, match=r"val_windows: 8 there, 4 here"):
        train(assemble(config))
    assert not (folder.parents[1] / "third").exists()


def test_a_missing_baseline_is_refused(configure, tmp_path):
    with pytest.raises(ValueError, match="train it first"):
        train(assemble(configure(tmp_path, "baseline=nobody")))


PARTS = (MANIFEST, TRAINING, WEIGHTS)

STRESS = ["recipe=qpt", "w=int8_row_sr", "a=int8_row_sr", "g=int8_column_sr", "micro_batch_sequences=2"]


@pytest.fixture(scope="module")
def straight(configure, tmp_path_factory):
    """12 steps with everything that could depend on history: stochastic rounding, dropout, accumulation, 8-bit
    states, a schedule."""
    out = tmp_path_factory.mktemp("straight")
    more = [*STRESS, "model.dropout=0.1", "schedule=cosine", "schedule.warmup_steps=2", "steps=12"]
    overrides = [*more, "eval_every_steps=5", "name=s"]
    verdict, folder = train(assemble(configure(out, *overrides, "run=one", "checkpoint_every_steps=7")))
    assert verdict.good
    return folder, overrides


def test_resume_is_bitwise(straight, configure):
    folder, overrides = straight
    resume = folder / "checkpoints" / "step-000007"
    config = configure(folder.parents[1], *overrides, "run=two", f"resume={resume}")
    verdict, resumed = train(assemble(config))
    assert verdict.good
    rows = {}
    for run in (folder, resumed):
        found = [r for r in read_metrics(run / "metrics.jsonl") if r["step"] > 7]
        rows[run] = [
            {k: v for k, v in r.items() if not k.startswith(("seconds", "tokens_per"))} for r in found
        ]
    assert len(rows[folder]) == 5 + 2
    assert rows[folder] == rows[resumed]
    a, b = (read_checkpoint(checkpoint_of(run)) for run in (folder, resumed))
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key
    for i, state in a["optimizer_states"][0]["state"].items():
        for key, value in state.items():
            assert torch.equal(value, b["optimizer_states"][0]["state"][i][key]), (i, key)


def test_resume_of_another_run_is_refused(straight, configure):
    folder, overrides = straight
    resume = folder / "checkpoints" / "step-000007"
    config = configure(folder.parents[1], *overrides, f"resume={resume}", "optimizer.lr=1e-4", "seed=3")
    with pytest.raises(ValueError, match=r"optimizer\.\S+: .*seed: 0 there, 3 here"):
        train(assemble(config))


def test_resume_of_a_finished_run_is_refused(straight, configure):
    folder, overrides = straight
    config = configure(folder.parents[1], *overrides, f"resume={folder}")
    with pytest.raises(ValueError, match="nothing is left to do"):
        train(assemble(config))
