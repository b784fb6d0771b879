"""The instruments leave no trace in a training, and a resumed run finds what the uninterrupted one would have found."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from qtrain.analysis.instrument_records import INSTRUMENTS, read_instruments
from qtrain.nn.clock import Clock
from qtrain.training.assembly import assemble
from qtrain.training.callbacks.instrument import BatchSlice, Instrument, untouched, worst
from qtrain.training.fit import train

from ..crashed_run import HISTORY, NO_CENSUS, crash_then_resume
from ..same_run import assert_same

THEMES = ("stability", "quant_stats", "optimizer_states", "weights", "attention")
OFF = [f"~callbacks.{theme}" for theme in THEMES]
SMALL = ["model.width=64", "model.heads=2", "steps=5", NO_CENSUS]


def sampled(every: int) -> list[str]:
    return [f"callbacks.{theme}.every_steps={every}" for theme in THEMES]


CASES = {
    "what draws bits, accumulates and recomputes": HISTORY,
    "delayed ranges": ["recipe=fp8_delayed", "micro_batch_sequences=2"],
    "learned steps": ["recipe=lsq_w4a4"],
    "native": ["recipe=all_gemms", "compute=native"],
    "float32 and no recipe": ["recipe=none", "precision=fp32", "m1=none", "m2=none"],
    "transforms over tokens": ["recipe=all_gemms_requantized", "+recipe.linear.wgrad.transform=rht:64"],
    "compiled, with delayed ranges": ["recipe=fp8_delayed", "compile=true"],
}


MARKED = [
    pytest.param(o, id=name, marks=[pytest.mark.inductor, pytest.mark.slow] if "compile=true" in o else [])
    for name, o in CASES.items()
]


@pytest.mark.parametrize("overrides", MARKED)
def test_a_run_is_the_same_with_and_without(configure, tmp_path, overrides):
    _, without = train(assemble(configure(tmp_path, *SMALL, *overrides, *OFF, "run=without")))
    _, instrumented = train(assemble(configure(tmp_path, *SMALL, *overrides, *sampled(2), "run=with")))
    assert_same(without, instrumented)
    assert not (without / INSTRUMENTS).exists()
    found = read_instruments(instrumented / INSTRUMENTS)
    assert sorted(found.samples) == [1, 2, 4]
    themes = {name.split("/")[0] for name in found.samples[4]}
    expected = {"stability", "weights", "attention", "optim"}
    assert themes == expected | (set() if "recipe=none" in overrides else {"quant"})


def test_resume_is_bitwise(configure, tmp_path):
    overrides = [*HISTORY, *SMALL, *sampled(3), "steps=12", "checkpoint_every_steps=4"]
    _, straight = train(assemble(configure(tmp_path, *overrides, "run=straight")))
    resumed = crash_then_resume(configure, tmp_path, overrides, at=7)
    assert_same(straight, resumed)
    # Step 6 was found twice, and is there once
    assert (straight / INSTRUMENTS).read_text() == (resumed / INSTRUMENTS).read_text()
    assert sorted(read_instruments(resumed / INSTRUMENTS).samples) == [1, 3, 6, 9, 12]


def test_when_it_looks_and_what_is_refused():
    instrument = Instrument(every_steps=5)
    assert [step for step in range(1, 12) if instrument.due(step)] == [1, 5, 10]
    for bad in (0, -1, 2.5, True, "100"):
        with pytest.raises(ValueError, match=r"callbacks\.instrument\.every_steps"):
            Instrument(every_steps=bad)


def alerted(tmp_path, instrument, crossings):
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path, loggers=[])
    module = SimpleNamespace(settings=SimpleNamespace(step_tokens=10))
    for step, crossed in enumerate(crossings, start=1):
        instrument.alert_where(crossed, trainer, module, step, "a/b", value=2.0, limit=1.0, message="m")
    return [alert.step for alert in read_instruments(tmp_path / INSTRUMENTS).alerts]


def test_an_alert_is_raised_once_a_crossing(tmp_path):
    assert alerted(tmp_path, Instrument(), [False, True, True, False, True]) == [2, 5]


def test_a_crossing_is_remembered(tmp_path):
    before, after = Instrument(), Instrument()
    alerted(tmp_path, before, [True])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert alerted(tmp_path, after, [True, False, True]) == [1, 3]


def test_the_slice_has_the_gradient_that_the_step_gives_each_token(monkeypatch):
    """Loss of the step: the mean over accumulate * B * S tokens."""
    logits = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    batch = {"input": torch.zeros(4, 6, dtype=torch.int64), "target": torch.ones(4, 6, dtype=torch.int64)}
    module = SimpleNamespace(model=torch.nn.Identity(), accumulate=3, first_sequence=lambda i: 0)
    part = BatchSlice(None, module, batch, 0, 2)
    seen = logits.clone().requires_grad_()
    monkeypatch.setattr(part, "logits", lambda model: seen[:2])
    part.loss(None).backward()
    whole = logits.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(whole.flatten(0, 1), batch["target"].flatten())
    (losses / 3).backward()
    torch.testing.assert_close(seen.grad[:2], whole.grad[:2], rtol=1e-5, atol=0)
    assert not seen.grad[2:].any()


def test_the_worst_is_a_number():
    assert worst({"a": 2.0, "b": math.nan, "c": 1.0}, least=True) == ("c", 1.0)
    assert worst({"a": 2.0, "b": math.nan, "c": 1.0}, least=False) == ("a", 2.0)
    assert math.isnan(worst({}, least=True)[1])


def test_a_forward_beside_the_training_puts_the_clock_and_the_random_state_back():
    clock = Clock(seed=5)
    clock.set(step=3, token_offset=7)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with untouched(SimpleNamespace(surgery=SimpleNamespace(clock=clock))):
        clock.set(step=9)
        torch.manual_seed(2)
        assert not torch.is_grad_enabled()
    assert clock.counters.tolist() == [5, 3, 7]
    assert torch.equal(torch.rand(3), expected)
    assert torch.is_grad_enabled()
