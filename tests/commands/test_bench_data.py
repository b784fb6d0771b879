from __future__ import annotations

import json

import numpy as np
import pytest
from composition import composed
from hydra.errors import HydraException

from qtrain.commands import bench, bench_data


def configured(*overrides):
    return composed("bench", "what=data", "device=cpu", *overrides)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("QTRAIN_CACHE", str(tmp_path / "cache"))
    np.random.default_rng(0).integers(0, 257, 60_000).astype("<u2").tofile(tmp_path / "t.bin")
    return ["data=nanogpt_bin", f"data.train={tmp_path / 't.bin'}", "data.val=null", "data.tokenizer=byte"]


def test_a_report_holds_what_was_measured(data, tmp_path, capsys):
    cfg = configured(*data, "need=1000", "seconds=0.2", "sequence_tokens=64", f"output={tmp_path / 'o.json'}")
    bench.check(cfg)
    assert bench.run(cfg) == 0
    report = json.loads((tmp_path / "o.json").read_text())
    (row,) = report["rows"]
    assert row["loader_tokens_per_s"] == pytest.approx(np.mean(report["tokens_per_s"]))
    assert row["ratio"] == pytest.approx(row["loader_tokens_per_s"] / 1000)
    assert row["met"] == (row["ratio"] >= 5)
    assert row["data"].startswith("nanogpt-")
    assert f"| {row['ratio']:.1f} | 5: {'met' if row['met'] else 'MISSED'} |" in capsys.readouterr().out


def test_the_rate_counts_every_batch_that_was_taken(monkeypatch):
    """A clock that a batch moves by a quarter of a second: 1000 tokens in it are 4000 a second."""
    clock = [0.0]

    def batches():
        while True:
            clock[0] += 0.25
            yield None

    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: clock[0])
    assert bench_data.timed(batches(), 1000, 1.0) == [4000.0] * 4


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["step_ms=20", "batch_sequences=4", "sequence_tokens=100"], (20_000.0, "step_ms=20")),
        (["need=gpt2_124m_h100"], (500_000.0, "gpt2_124m_h100")),
        (["need=1234"], (1234.0, "given")),
    ],
)
def test_what_is_needed(overrides, expected):
    assert bench_data.need(configured(*overrides), "cpu") == expected


def test_the_step_is_timed_where_nothing_is_given(monkeypatch):
    monkeypatch.setattr(bench, "_compiler", lambda: None)
    cfg = configured("model=gpt_1m", "model.layers=1", "sequence_tokens=16", "batch_sequences=2", "rounds=5")
    monkeypatch.setattr(bench, "timed_in_turns", lambda steps, *_: ({n: [8.0] for n in steps}, {}))
    assert bench_data.need(cfg, "cpu") == (2 * 16 / 8e-3, "unquantized_eager, timed here")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seconds=0", "seconds=0: must be positive"),
        ("need=much", "need='much': allowed are step, gpt2_124m_h100"),
        ("need=-1", "need=-1"),
        ("step_ms=0", "step_ms=0"),
        ("batch_sequences=0", "batch_sequences=0"),
        ("data.kind=npy", "kind='npy'"),
    ],
)
def test_wrong_values_are_refused(data, override, message):
    with pytest.raises((ValueError, HydraException), match=message):
        bench.check(configured(*data, override))
