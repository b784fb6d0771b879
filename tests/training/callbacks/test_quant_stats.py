"""What the callback writes is what the layers show: in the file, and in W&B with histograms and tokens as the axis."""

from __future__ import annotations

import pytest

from qtrain.analysis.instrument_records import INSTRUMENTS, read_instruments
from qtrain.training.assembly import assemble
from qtrain.training.callbacks.quant_stats import QuantStats
from qtrain.training.fit import train

from ..crashed_run import crash_then_resume
from ..wandb_records import read_run, records

SMALL = ["model.width=32", "model.heads=2", "~callbacks.census", "callbacks.quant_stats.every_steps=2"]
LAYER = "quant/blocks.0.mlp.up"


def sqnr(found, operand: str) -> float:
    return found[f"{LAYER}/{operand}/sqnr_db"]


def test_fewer_bits_show_in_their_operand_alone(configure, tmp_path):
    """From 8 to 4 bits a Gaussian loses 24 dB of SQNR."""
    found = {}
    for w in ("int8_row", "int4_row"):
        overrides = [*SMALL, "steps=2", "recipe=all_gemms_requantized", f"w={w}", f"run={w}"]
        _, folder = train(assemble(configure(tmp_path, *overrides)))
        found[w] = read_instruments(folder / INSTRUMENTS).samples[1]
    assert sqnr(found["int8_row"], "fprop.weight") - sqnr(found["int4_row"], "fprop.weight") == pytest.approx(
        24, abs=3
    )
    assert sqnr(found["int8_row"], "fprop.input") == pytest.approx(
        sqnr(found["int4_row"], "fprop.input"), abs=1
    )
    assert sqnr(found["int8_row"], "y") - sqnr(found["int4_row"], "y") > 10
    assert not [name for name in found["int4_row"] if name.startswith("quant/lm_head")]  # high precision


def test_a_gradient_below_its_noise_alerts_once(configure, tmp_path, monkeypatch):
    import qtrain.training.callbacks.quant_stats as quant_stats

    monkeypatch.setattr(quant_stats, "NOISE_FLOOR", 1e6)
    _, folder = train(assemble(configure(tmp_path, *SMALL, "steps=4", "recipe=all_gemms")))
    (alert,) = read_instruments(folder / INSTRUMENTS).alerts
    assert (alert.name, alert.step, alert.limit) == ("quant/noise_floor", 1, 1e6)
    assert "quant/blocks.0" in alert.message


def test_wandb_has_one_curve_over_tokens_of_a_resumed_run(configure, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    overrides = [*SMALL, "steps=6", "checkpoint_every_steps=3", "recipe=all_gemms", "logger=wandb",
                 "callbacks.stability.every_steps=2"]  # fmt: skip
    folder = crash_then_resume(configure, tmp_path, overrides, at=4)
    logs = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 2
    (first, a), (second, b) = (read_run(log) for log in logs)
    assert first == second
    rows = {row["_step"]: row for row in [*a, *b]}  # a step that was done twice is the same row
    written = read_instruments(folder / INSTRUMENTS)
    for name in (f"{LAYER}/fprop.input/sqnr_db", "stability/clip_share"):
        curve = [(step, row[name]) for step, row in sorted(rows.items()) if name in row]
        assert curve == written.curve(name)
        assert [step for step, _ in curve] == [1, 2, 4, 6]
    assert all(row["tokens"] == 128 * step for step, row in rows.items() if step)
    assert rows[2][f"{LAYER}/fprop.weight/codes._type"] == "histogram"
    assert sum(rows[2][f"{LAYER}/fprop.weight/codes.values"]) == 32 * 128
    metrics = [r.metric for log in logs for r in records(log) if r.HasField("metric")]
    globs = {m.glob_name: m.step_metric for m in metrics if m.glob_name}
    for theme in ("stability", "quant", "optim", "weights", "attention"):
        assert globs[f"{theme}/*"] == "tokens"


def test_arguments():
    with pytest.raises(ValueError, match=r"callbacks\.quant_stats\.sequences"):
        QuantStats(sequences=0)
