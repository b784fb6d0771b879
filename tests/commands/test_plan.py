"""qtrain plan from the command line: tables, files, choices, warnings, refusals."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qtrain import cli
from qtrain.communication.row_format import Piece
from qtrain.planning import calibration
from qtrain.quant import QuantSpec
from qtrain.training.assembly import build

SMALL = (
    "model=llama_1m", "compile=false", "batch_sequences=16", "sequence_tokens=64", "recipes=[none]", "hardware=h200",
)  # fmt: skip


def planned(tmp_path: Path, *words: str, code: int = 0) -> dict[str, Any]:
    file = tmp_path / "plan.json"
    assert cli.main(["plan", *SMALL, *words, f"json={file}"]) == code
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_a_plan_adds_up(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.png"
    found = planned(
        tmp_path,
        "recipes=[none,all_gemms,'all_gemms compute=native']",
        "hardware.price_per_hour=2",
        "tokens=1e9",
        f"png={picture}",
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    plans = {plan["name"]: plan for plan in found["plans"]}
    assert list(plans) == ["int8_lean", "none", "all_gemms", "all_gemms compute=native"]
    assert [plan["compute"] for plan in plans.values()] == ["native", "bf16", "simulated", "native"]
    for plan in plans.values():
        time, spent = plan["time"], plan["budget"]
        assert spent["steps"] == -(-(10**9) // (16 * 64))
        assert spent["cost"] == pytest.approx(2 * spent["gpu_hours"])
        assert spent["gpu_hours"] == pytest.approx(
            spent["steps"] * time["total"] / 3600 / (1 - plan["interval"]["lost"])
        )
        assert spent["kwh"] == pytest.approx(0.7 * spent["gpu_hours"])
        assert time["tokens_per_s"] == pytest.approx(16 * 64 / time["total"])
        assert plan["memory"]["weights"] == 4 * plan["parameters"] == plan["memory"]["gradients"]
        assert plan["memory"]["peak"] == max(plan["memory"]["phases"].values())
    assert plans["int8_lean"]["memory"]["kept_bytes"] < 0.8 * plans["none"]["memory"]["kept_bytes"]
    assert "GEMM int8" in plans["int8_lean"]["time"]["parts"]
    assert "GEMM int8" not in plans["all_gemms"]["time"]["parts"]
    assert plans["all_gemms"]["time"]["parts"]["quantization"] > 0
    out = capfd.readouterr().out
    assert "WARNING all_gemms: compute=simulated" in out
    assert "Hoffmann" in out


def test_gpus_are_nodes_and_share_the_batch(tmp_path: Path) -> None:
    ddp = planned(tmp_path, "gpus=16")
    assert ddp["settings"]["strategy"] == "ddp"
    assert ddp["settings"]["micro_batches"] * ddp["settings"]["micro_batch_sequences"] == 1
    sharded = planned(tmp_path, "gpus=16", "trainer.strategy=fsdp2")
    one, two = ddp["plans"][0]["memory"], sharded["plans"][0]["memory"]
    assert two["weights"] < one["weights"] / 10
    assert two["states"] < one["states"] / 10
    assert one["buffers"] == one["gradients"], "buckets"
    assert sharded["plans"][0]["time"]["communication"]["sent_bytes"] > 0


def test_what_travels_as_codes_is_in_the_plan(tmp_path: Path) -> None:
    exact, low = (planned(tmp_path, "gpus=2", f"trainer={t}")["plans"][0] for t in ("ddp", "ddp_int8"))
    sent = [plan["time"]["communication"]["sent_bytes"] for plan in (exact, low)]
    assert sent[1] == pytest.approx((8 + 32 / 128) / 32 * sent[0])
    gradients = exact["memory"]["gradients"]
    assert low["memory"]["buffers"] == exact["memory"]["buffers"] + 1.5 * gradients, (
        "e, and d of half of the rows"
    )
    more = [plan["interval"]["write_seconds"] for plan in (low, exact)]
    assert (more[0] - more[1]) * 2e9 == pytest.approx(2 * 1.5 * gradients), "both processes' are saved"
    whole, coded = (planned(tmp_path, "gpus=2", f"trainer={t}")["plans"][0] for t in ("fsdp2", "fsdp2_int8"))
    assert coded["memory"]["buffers"] == whole["memory"]["buffers"], "errors are forgotten"


@pytest.mark.parametrize("exclude", [["lm_head"], [], ["lm_head", "*.up", "blocks.0.*"]])
def test_fsdp2_gathers_excluded_layers_in_float32(tmp_path: Path, exclude: list[str]) -> None:
    """Against the rows as training would encode them, parameter by parameter."""
    words = [
        "gpus=2",
        "trainer=fsdp2_int8",
        "model.width=512",
        "recipes=[]",
    ]  # so wide that a row's scale is little
    words.append(f"recipe.exclude=[{','.join(exclude)}]")
    found = planned(tmp_path, *words)
    with torch.device("meta"):
        model = build({**found["config"]["model"], "vocab_size": 257}).build(seed=0)
    linears = {f"{name}.weight": name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    sent = 0.0
    for name, p in model.named_parameters():
        coded = name in linears and not any(fnmatch.fnmatchcase(linears[name], e) for e in exclude)
        gather = Piece.of(name, p.shape, QuantSpec.of("int8_row") if coded else None)
        reduce = Piece.of(name, p.shape, QuantSpec.of("int8_group128_sr"))
        again = 2 if name.startswith("blocks.") else 1  # before the forward and before the backward
        sent += (again * gather.format.row_bytes + reduce.format.row_bytes) * len(p) / 2
    plan, settings = found["plans"][0], found["settings"]
    assert plan["time"]["communication"]["sent_bytes"] == pytest.approx(
        settings["micro_batches"] * sent, rel=0.01
    )


def test_the_micro_batch_is_the_largest_that_fits_and_divides(tmp_path: Path) -> None:
    found = planned(tmp_path, "hardware.memory_gib=0.025", "overhead_gib=0")
    settings, plan = found["settings"], found["plans"][0]
    assert 1 < settings["micro_batch_sequences"] < 16
    assert plan["fits"]
    assert plan["memory"]["peak"] <= settings["usable_bytes"]
    assert 16 % settings["micro_batch_sequences"] == 0
    assert settings["micro_batch_sequences"] <= plan["largest"] < 16


def test_what_does_not_fit_says_what_to_change(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = planned(
        tmp_path, "hardware.memory_gib=0.025", "overhead_gib=0", "micro_batch_sequences=16", code=1
    )
    assert not found["plans"][0]["fits"]
    assert "does not fit" in capfd.readouterr().out
    assert "micro_batch_sequences=" in found["plans"][0]["warnings"][0]


def test_a_recipe_that_cannot_run_is_a_line_beside_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = planned(
        tmp_path, "hardware=a100", "recipes=[none,'fp8_rowwise compute=native','qpt compute=native']"
    )
    assert [plan["name"] for plan in found["plans"]] == ["int8_lean", "none"]
    assert "multiplies no fp8" in found["refused"]["fp8_rowwise compute=native"]
    assert "column" in found["refused"]["qpt compute=native"]
    assert "is not planned" in capfd.readouterr().out


def test_auto_is_native_where_there_are_kernels(tmp_path: Path) -> None:
    computes = {
        device: planned(tmp_path, f"hardware={device}", "recipe=fp8_rowwise", "compute=auto", "recipes=[]")[
            "plans"
        ][0]["compute"]
        for device in ("h200", "a100")
    }
    assert computes == {"h200": "native", "a100": "simulated"}


@pytest.mark.parametrize(
    ("words", "unknown"),
    [
        (["gpus=1"], []),
        (["gpus=2"], ["link_gb_per_s=1", "link_us=100"]),
        (["gpus=16"], ["link_gb_per_s=1", "link_us=100", "node_gb_per_s=1", "node_us=100"]),
        (
            ["gpus=16", "+hardware.node_gb_per_s=20", "+hardware.link_us=9"],
            ["link_gb_per_s=1", "node_us=100"],
        ),
        (["gpus=2", "+hardware.link_gb_per_s=100", "+hardware.link_us=9"], []),
        (["gpus=2", "hardware=h200"], []),
    ],
)
def test_links_that_nobody_measured_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], unknown: list[str]
) -> None:
    here = dataclasses.replace(
        calibration.calibrated("cpu", sequence_tokens=64, scale=1 / 64), gpus_per_node=8
    )
    monkeypatch.setattr(calibration, "calibrated", lambda **_: here)
    warnings = planned(tmp_path, "hardware=this", "recipes=[]", *words)["plans"][0]["warnings"]
    found = [text for text in warnings if "how this CPU is connected" in text]
    assert len(found) == bool(unknown)
    for text in found:
        assert f": {', '.join(unknown)} stand for it" in text
        assert "give " + " ".join(f"+hardware.{name.partition('=')[0]}=..." for name in unknown) in text


def test_tokens_for_a_loss_are_an_estimate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = planned(tmp_path, "target_loss=8", "recipes=[]")
    budget = found["plans"][0]["budget"]
    assert budget["loss"] == pytest.approx(8.0)
    assert "estimate" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=12"], "gpus=12: nodes of 8; take gpus=8"),
        (["gpus=0"], "gpus=0"),
        (["gpus=16", "batch_sequences=24"], "batch_sequences=24 is no multiple"),
        (["micro_batch_sequences=5"], "batch_sequences=16 is no multiple of micro_batch_sequences=5"),
        (["sequence_tokens=100000"], "exceeds model.sequence_tokens"),
        (["tokens=-1"], "tokens=-1"),
        (["tokens=1e9", "target_loss=3"], "give one of them"),
        (["scaling_law=moore"], "allowed are hoffmann, besiroglu"),
        (["margin_fraction=-0.1"], "margin_fraction"),
        (["failures.restart_minutes=0"], "failures.restart_minutes=0"),
        (["hardware.copy_gb_per_s=0"], "hardware.copy_gb_per_s=0"),
        (["compile=maybe"], "compile='maybe'"),
        (["json=plan.txt"], "ends in .json"),
        (["recipes=none"], "recipes='none'"),
        (["recipes=[nonne]"], "nonne"),
        (["hardware=a100", "recipe=fp8_rowwise", "compute=native"], "multiplies no fp8"),
        (["recipe=qpt", "compute=native"], "compute=native"),
        (
            ["model=llama_1b", "sequence_tokens=2048", "batch_sequences=128", "micro_batch_sequences=128"],
            "131,071",
        ),
        (["trainer.strategy=deepspeed"], "trainer.strategy"),
        (["hardware=h900"], "h900"),
        (["gpu=4"], "gpu"),
    ],
)
def test_refusals(words: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *SMALL, *words]) == 2
    assert message in capfd.readouterr().err
