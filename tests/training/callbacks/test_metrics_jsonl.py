"""metrics.jsonl keeps every whole line, whatever happens to the process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys

import pytest

from qtrain.training.callbacks.metrics_jsonl import bits_per_byte, read_metrics

KILLED = """
import json, os, signal, sys
from lightning.pytorch import Callback
from qtrain.training.assembly import assemble
from qtrain.training import fit

class Kill(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

build = fit.build
fit.build = lambda value: Kill() if value == "kill" else build(value)
config = json.loads(sys.stdin.read())
config["callbacks"]["kill"] = "kill"
fit.train(assemble(config))
"""


def test_a_killed_run_keeps_its_metrics(configure, tmp_path):
    config = configure(tmp_path, "run=one")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        input=json.dumps(config),
        text=True,
        capture_output=True,
        env=environment,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    rows = read_metrics(tmp_path / "train" / "one" / "metrics.jsonl")
    assert [(r["kind"], r["step"], r["tokens"]) for r in rows] == [("train", k, 128 * k) for k in (1, 2, 3)]
    assert not (tmp_path / "train" / "one" / "summary.json").exists()


def test_a_part_of_the_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "loss": "nan"}\n{"step": 3, "lo')
    first, second = read_metrics(path)
    assert first == {"step": 1, "loss": 2.5}
    assert math.isnan(second["loss"])


def test_a_broken_line_within_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(path)


def test_bits_per_byte():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(2), 0.25) == pytest.approx(0.25)
