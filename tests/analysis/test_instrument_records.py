"""instruments.jsonl, read and rewound."""

from __future__ import annotations

import json
import math

import pytest

from qtrain.analysis.instrument_records import read_instruments, rewound_instruments, rounded


def sample(step: int, **values: dict[str, float | str]) -> str:
    row = {"kind": "sample", "step": step, "tokens": 10 * step}
    return json.dumps({**row, "values": {k.replace("__", "/"): v for k, v in values.items()}}) + "\n"


ALERT = {
    "kind": "alert",
    "step": 2,
    "tokens": 20,
    "name": "a/b",
    "value": "inf",
    "limit": 8.0,
    "message": "m",
}


def test_samples_of_a_step_are_one_and_names_whole(tmp_path):
    path = tmp_path / "instruments.jsonl"
    text = sample(1, quant__x={"sqnr_db": 30.5}) + sample(1, stability={"z_loss": "nan"})
    path.write_text(text + json.dumps(ALERT) + "\n" + sample(3, quant__x={"sqnr_db": 29}) + '{"kind": "sa')
    found = read_instruments(path)
    assert found.curve("quant/x/sqnr_db") == [(1, 30.5), (3, 29.0)]
    assert math.isnan(found.samples[1]["stability/z_loss"])
    (alert,) = found.alerts
    assert (alert.step, alert.tokens, alert.name, alert.value, alert.limit) == (2, 20, "a/b", math.inf, 8.0)


def test_a_run_without_instruments_has_none(tmp_path):
    found = read_instruments(tmp_path / "instruments.jsonl")
    assert (dict(found.samples), found.alerts) == ({}, ())
    assert rewound_instruments(tmp_path / "instruments.jsonl", 3) is None


def test_a_line_that_was_altered_is_named(tmp_path):
    path = tmp_path / "instruments.jsonl"
    path.write_text(sample(1) + '{"kind": "other", "step": 2}\n' + sample(3))
    with pytest.raises(ValueError, match="line 2"):
        read_instruments(path)
    with pytest.raises(ValueError, match="line 2"):
        rewound_instruments(path, 1)


def test_rewinding_drops_what_is_found_again(tmp_path):
    path = tmp_path / "instruments.jsonl"
    kept = sample(1, a={"b": 1.0}) + json.dumps(ALERT) + "\n"
    path.write_text(kept + sample(3, a={"b": 2.0}) + '{"ki')
    assert rewound_instruments(path, 2) == kept


def test_five_digits():
    assert rounded(1234567.0) == 1234600.0
    assert rounded(-1.23456e-7) == -1.2346e-7
    assert math.isnan(rounded(math.nan))
