"""Curves that were made to fail in known ways, step by step through the callback."""

from __future__ import annotations

import json
import math
import random
from types import SimpleNamespace

import pytest

from qtrain.analysis.curve_scores import spike_score
from qtrain.analysis.instrument_records import INSTRUMENTS, read_instruments
from qtrain.analysis.limits import CLIP_LEAST_STEPS, DIVERGED_STEPS
from qtrain.training.callbacks.stability import Stability
from qtrain.training.module import QuantizedTransformer, StepReading
from qtrain.training.verdict import RunStopped, Verdict


def noisy(steps: int, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [2.0 + 3.0 * math.exp(-t / 60) + draw.gauss(0, 0.02) for t in range(steps)]


class Run:
    """A training of curves alone."""

    def __init__(self, folder, instrument: Stability) -> None:
        self.trainer = SimpleNamespace(
            is_global_zero=True, default_root_dir=folder, loggers=[], global_step=0
        )
        self.module = QuantizedTransformer.__new__(QuantizedTransformer)
        self.module.__dict__["settings"] = SimpleNamespace(step_tokens=10)
        self.instrument, self.folder = instrument, folder
        instrument.on_train_start(self.trainer, self.module)

    def take(self, losses, norms=None, clipped=None):
        norms = norms or [1.0] * len(losses)
        clipped = clipped or [False] * len(losses)
        for loss, norm, clip in zip(losses, norms, clipped, strict=True):
            step = self.trainer.global_step = self.trainer.global_step + 1
            self.module.__dict__["reading"] = StepReading(step, loss, norm, clip, 1e-3)
            self.instrument.on_train_batch_end(self.trainer, self.module)
            self.instrument.on_train_batch_end(self.trainer, self.module)  # a micro-batch of the next step

    @property
    def found(self):
        return read_instruments(self.folder / INSTRUMENTS)

    @property
    def alerts(self):
        return [(alert.name.removeprefix("stability/"), alert.step) for alert in self.found.alerts]


def test_healthy_runs_alert_nothing(tmp_path):
    for seed in range(10):
        run = Run(tmp_path / str(seed), Stability(50))
        run.folder.mkdir()
        run.take(noisy(400, seed), noisy(400, seed + 100))
        assert run.alerts == []
        assert sorted(run.found.samples) == [1, *range(50, 401, 50)]


def test_spikes_alone_and_together(tmp_path):
    losses, norms = noisy(400), noisy(400, 1)
    losses[199] += 2.0
    norms[299] *= 3.0
    losses[349] += 2.0
    norms[349] *= 3.0
    run = Run(tmp_path, Stability(100))
    run.take(losses, norms)
    assert run.alerts == [
        ("loss_spike", 200), ("grad_norm_spike", 300), ("loss_spike", 350), ("grad_norm_spike", 350),
        ("joint_spike", 350),
    ]  # fmt: skip
    last = run.found.samples[400]
    assert last["stability/joint_spikes"] == 1
    assert last["stability/loss_spike_share"] == pytest.approx(spike_score(losses), rel=1e-4)
    # The largest since the last sample, not of all
    scores = dict(run.found.curve("stability/loss_robust_score"))
    assert scores[200] > 8 > scores[300]
    assert scores[400] > 8


def test_a_clip_that_trains(tmp_path):
    run = Run(tmp_path, Stability(100))
    clipped = [i % 15 == 0 for i in range(300)]  # 1 of 15
    run.take(noisy(300), clipped=clipped)
    assert run.alerts == [("clip_share", CLIP_LEAST_STEPS)]
    assert run.found.samples[300]["stability/clip_share"] == pytest.approx(1 / 15, rel=1e-4)
    seldom = Run(tmp_path / "seldom", Stability(100))
    seldom.folder.mkdir()
    seldom.take(noisy(300), clipped=[i % 25 == 0 for i in range(300)])
    assert seldom.alerts == []


def test_divergence(tmp_path):
    run = Run(tmp_path, Stability(100))
    run.take([*noisy(200), *[x + 1.0 for x in noisy(400)[200:]]])
    names = [name for name, _ in run.alerts]
    assert names.count("diverged") == 1
    assert dict(run.alerts)["diverged"] == 200 + DIVERGED_STEPS
    assert [v for _, v in run.found.curve("stability/diverged")] == [0, 0, 0, 1, 1]


def test_the_step_that_the_guard_refused(tmp_path):
    run = Run(tmp_path, Stability())
    verdict = Verdict(outcome="non_finite", step=7, message="the loss of step 7 is nan", value=math.nan)
    run.instrument.on_exception(run.trainer, run.module, RunStopped(verdict))
    (alert,) = run.found.alerts
    assert (alert.name, alert.step) == ("stability/non_finite", 7)
    assert "the loss of step 7 is nan" in alert.message
    other = Verdict(outcome="interrupted", step=8, message="m")
    run.instrument.on_exception(run.trainer, run.module, RunStopped(other))
    assert len(run.found.alerts) == 1


def test_it_goes_on_from_its_state(tmp_path):
    losses = noisy(300)
    losses[250] += 2
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = Run(tmp_path / "a", Stability(70))
    whole.take(losses, losses, [i % 10 == 0 for i in range(300)])
    first = Run(tmp_path / "b", Stability(70))
    first.take(losses[:240], losses[:240], [i % 10 == 0 for i in range(240)])
    second = Stability(70)
    second.load_state_dict(json.loads(json.dumps(first.instrument.state_dict())))
    run = Run(tmp_path / "b", second)
    run.trainer.global_step = 240
    run.take(losses[240:], losses[240:], [i % 10 == 0 for i in range(240, 300)])
    assert (tmp_path / "a" / INSTRUMENTS).read_text() == (tmp_path / "b" / INSTRUMENTS).read_text()
