"""Progress without a terminal: the first and the last step, and a line every so many seconds."""

from __future__ import annotations

import re

import pytest

from qtrain.training.assembly import assemble
from qtrain.training.callbacks.progress import Progress
from qtrain.training.fit import train


def test_lines_of_a_short_run(configure, tmp_path, capsys):
    train(assemble(configure(tmp_path, "steps=3", "eval_every_steps=2")))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 2
    assert re.fullmatch(r"step 1/3  loss \d\.\d{4}  [\d,]+ tokens/s  \d+ s left", lines[0])
    assert re.fullmatch(r"step 3/3  loss \d\.\d{4}  val \d\.\d{4}  [\d,]+ tokens/s  0 s left", lines[1])


def test_the_interval_is_checked():
    with pytest.raises(ValueError, match="positive"):
        Progress(every_seconds=0)
