"""Runs whose weights and gradients travel in low bits: real processes, started by the launcher."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qtrain.quant import QuantSpec
from qtrain.training.assembly import assemble
from qtrain.training.callbacks.metrics_jsonl import read_metrics
from qtrain.training.fit import train
from qtrain.training.launcher import launch
from qtrain.training.low_bit import communication_of
from qtrain.training.processes import ProcessSettings
from qtrain.training.report import table_rows
from qtrain.training.saved import checkpoint_of, read_checkpoint

STEPS = 4
COMMON = [
    "precision=fp32",
    f"steps={STEPS}",
    "batch_sequences=4",
    "micro_batch_sequences=1",
    "eval_windows=3",
    "eval_every_steps=3",
    "model.layers=1",
    "model.width=32",
    "optimizer.states.min_numel=1024",
    "sample.max_new_tokens=1",
    "checkpoint_every_steps=2",
    "~callbacks.census",
]
CODES = ["recipe=all_gemms", "w=int8_row", "a=int8_row", "g=int8_row"]
FSDP2, DDP = "trainer.strategy=fsdp2", "trainer.strategy=ddp"
RUNS = {
    # The layers' own codes travel: nothing changes, with a census before and a validation between
    "whole": [FSDP2, *CODES],
    "gathered": [FSDP2, *CODES, "trainer.gather_weights=int8_row", "+callbacks.census._target_=qtrain.training.callbacks.census.CensusAtStart"],
    "compiled": [FSDP2, *CODES, "trainer.gather_weights=int8_row", "compile=true"],
    "lossy": [FSDP2, *CODES, "trainer.gather_weights=int4_group64_sr"],
    "fsdp2": [FSDP2, *CODES, "trainer.gather_weights=int4_group64_sr", "trainer.reduce_gradients=int4_group64_sr"],
    "ddp": [DDP, *CODES, "trainer.reduce_gradients=int4_group64_sr", "trainer.error_feedback=bfloat16"],
    "exact": [DDP, *CODES],
    "ddp_compiled": [DDP, *CODES, "trainer.reduce_gradients=int8_group128", "compile=true"],
    "int8": [DDP, *CODES, "trainer.reduce_gradients=int8_group128"],
    "poisoned": [DDP, *CODES, "trainer.reduce_gradients=int8_group128"],
}  # fmt: skip
RESUMED = ("lossy", "fsdp2", "ddp")


@pytest.fixture(scope="module")
def out(configure, tmp_path_factory) -> Path:
    """All of RUNS in two processes; then, from their checkpoints of step 2, those of RESUMED."""
    out = tmp_path_factory.mktemp("low-bit")
    jobs = []

    def add(*overrides: str, callback: str | None = None) -> None:
        config = configure(out, *COMMON, "trainer.devices=2", "trainer.timeout_seconds=60", *overrides)
        if callback is not None:
            config["callbacks"]["mine"] = {"_target_": f"ranks.{callback}"}
        jobs.append({"config": config, "reload": None})

    for name, more in RUNS.items():
        add(*more, f"name={name}", "run=first", callback="PoisonRankOne" if name == "poisoned" else None)
    for name in RESUMED:
        middle = out / name / "first" / "checkpoints" / "step-000002"
        add(*RUNS[name], f"name={name}", "run=resumed", f"resume={middle}")
    assert launch({"jobs": jobs, "out": str(out), "backend": "eager"}, "ranks:work", 2) == 0
    return out


def saved(folder: Path) -> dict:
    return read_checkpoint(checkpoint_of(folder))


def losses(folder: Path) -> list[tuple]:
    return [
        (r["step"], r.get("loss"), r.get("grad_norm"), r.get("val_loss"))
        for r in read_metrics(folder / "metrics.jsonl")
    ]


def weights_equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a["state_dict"][n], b["state_dict"][n]) for n in a["state_dict"])


def test_gathering_the_codes_of_the_layers_changes_no_bit(out):
    whole, gathered = out / "whole" / "first", out / "gathered" / "first"
    assert losses(gathered) == losses(whole)
    assert weights_equal(saved(gathered), saved(whole))
    summary = json.loads((gathered / "summary.json").read_text())
    assert (summary["communication"]["gathered"], summary["communication"]["exact"]) == (6, 6)
    assert "0 failures" in summary["census"]
    # And it isn't because nothing was done: 4 bits of which the layers know nothing move the first loss
    assert losses(out / "lossy" / "first")[0] != losses(whole)[0]


@pytest.mark.parametrize(("whole", "compiled"), [("whole", "compiled"), ("int8", "ddp_compiled")])
def test_compiled_too(out, whole, compiled):
    """Traced as any backend has it, and run as it is: the same bits as eager."""
    whole, compiled = out / whole / "first", out / compiled / "first"
    assert losses(compiled) == losses(whole)
    assert weights_equal(saved(compiled), saved(whole))
    assert saved(compiled)["hyper_parameters"]["config"]["compile"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_bit_for_bit_where_the_undisturbed_one_does(out, name):
    first, resumed = out / name / "first", out / name / "resumed"
    assert losses(resumed) == [row for row in losses(first) if row[0] > 2]
    a, b = saved(first), saved(resumed)
    assert weights_equal(a, b)
    assert ("communication" in a) == (name != "lossy")
    if "communication" in a:
        for part in ("owed", "owed_mean"):
            assert a["communication"][part].keys() == b["communication"][part].keys()
            assert all(
                torch.equal(t, b["communication"][part][n]) for n, t in a["communication"][part].items()
            )
        owed = a["communication"]["owed"]["blocks.0.mlp.up.weight"]
        assert owed.shape[0] == 2
        assert owed.dtype == (torch.bfloat16 if name == "ddp" else torch.float32)
        assert float(owed.float().abs().max()) > 0


@pytest.mark.parametrize("name", ["fsdp2", "ddp"])
def test_a_run_goes_on_alone_where_it_is_told_to(configure, out, tmp_path, name, capsys):
    """2 -> 1: a checkpoint's weights and states are those of one process; what was owed is dropped, and said."""
    middle = out / name / "first" / "checkpoints" / "step-000002"
    alone = [*COMMON, *CODES, "name=alone", f"run={name}", f"resume={middle}"]
    with pytest.raises(
        ValueError,
        match=r"trainer.reduce_gradients: int4 group:64 sr there, None here \(allow_changed=\[comm",
    ):
        train(assemble(configure(tmp_path, *alone)))
    verdict, folder = train(assemble(configure(tmp_path, *alone, "allow_changed=[communication]")))
    assert verdict.good
    assert "what the checkpoint's processes owed each other is dropped" in capsys.readouterr().out
    undisturbed = [row for row in losses(out / "exact" / "first") if row[0] > 2]
    # 4 bits of two steps before, and of gathered weights: near, not equal
    for here, there in zip(losses(folder), undisturbed, strict=True):
        assert here[0] == there[0]
        assert (here[1] or here[3]) == pytest.approx(there[1] or there[3], rel=0.02)


def test_a_non_finite_gradient_of_one_process_ends_the_run_on_all(out):
    ends = [json.loads((out / f"ends-{rank}.json").read_text()) for rank in range(2)]
    assert str(ends[0]) == str(ends[1])
    folder = out / "poisoned" / "first"
    verdict = json.loads((folder / "verdict.json").read_text())
    assert (verdict["outcome"], verdict["step"]) == ("non_finite", 2)
    parts = assemble(saved(folder)["hyper_parameters"]["config"])
    assert verdict["parameters"] == len(list(parts.make_model().parameters()))
    assert saved(folder)["qtrain"]["step"] == 1
    assert all(bool(t.isfinite().all()) for t in saved(folder)["communication"]["owed"].values())


def test_the_bytes_are_in_the_metrics_and_in_the_table(out):
    rows = [r for r in read_metrics(out / "fsdp2" / "first" / "metrics.jsonl") if r["kind"] == "train"]
    parameters = sum(p.numel() for p in assemble_of(out / "fsdp2" / "first").make_model().parameters())
    for row in rows:
        assert row["communication/bytes_float32"] == 2 * row["communication/bytes_bfloat16"]
        parts = (
            row["communication/gather_weights_bytes_sent"] + row["communication/reduce_gradients_bytes_sent"]
        )
        assert row["communication/bytes_sent"] == parts
        # Two micro-steps of two processes: half of the gradient each; a little padding at most
        reduced = row["communication/reduce_gradients_bytes_sent"] / (parameters * 4)
        assert 0.5 / 4 < reduced < 0.75 / 4
    exact = [r for r in read_metrics(out / "exact" / "first" / "metrics.jsonl") if r["kind"] == "train"]
    assert not any(key.startswith("communication/") for key in exact[0])
    summary = json.loads((out / "fsdp2" / "first" / "summary.json").read_text())
    table = dict(table_rows(summary))
    last = rows[-1]
    assert (
        summary["communication"]["bytes"]["gather_weights"][0]
        == last["communication/gather_weights_bytes_sent"]
    )
    assert "0 of 6 weights lose nothing" in table["weights gathered"]
    assert "error feedback in float32" in table["gradients reduced"]
    assert "weights gathered" not in dict(
        table_rows(json.loads((out / "exact" / "first" / "summary.json").read_text()))
    )


def assemble_of(folder: Path):
    return assemble(saved(folder)["hyper_parameters"]["config"])


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"gather_weights": "int8_row"}, r"trainer.gather_weights='int8_row': one process sends nothing"),
        ({"devices": 2, "gather_weights": "int8_row"}, r"under ddp every process holds the weights whole"),
        (
            {"strategy": "fsdp2", "gather_weights": "int8_row"},
            r"one process sends nothing; set trainer.devices",
        ),
        ({"reduce_gradients": "int8_row"}, r"trainer.reduce_gradients='int8_row': one process sends nothing"),
        ({"devices": 2, "reduce_gradients": "int8_tensor"}, r"crosses the rows"),
    ],
)
def test_what_is_refused(trainer, message):
    with pytest.raises(ValueError, match=message):
        ProcessSettings.of(trainer)


def test_one_process_that_reads_a_run_of_several_has_no_communication(configure, tmp_path):
    parts = assemble(configure(tmp_path, *COMMON, "trainer.devices=2", "trainer.reduce_gradients=int8_row"))
    assert parts.processes.communication.reduce_gradients == QuantSpec.parse("int8_row")
    assert communication_of(parts, parts.make_model()) is None
