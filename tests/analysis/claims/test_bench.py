"""The trainings of the bench, very short."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch

from qtrain.analysis.claims import Bench, OutOfTime
from qtrain.analysis.claims.bench import Arm, Size, gap
from qtrain.analysis.claims.training import ARMS, between
from qtrain.quant import ModelRecipe

TINY = Size(steps=6, sequences=4, tokens=16, width=64, layers=1, val_windows=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


def bench(folder, **more) -> Bench:
    found = Bench(folder, size=TINY, **more)
    text = torch.arange(5000) * 7 % 251  # no reading of the library
    found.__dict__["text"] = (text, text[:600])
    return found


def test_arms_of_a_seed_share_batches_and_weights(folder):
    one, again = bench(folder), bench(folder)
    assert torch.equal(one.batch(1, 2), again.batch(1, 2))
    assert not torch.equal(one.batch(1, 2), one.batch(2, 2))
    plain = one.val_loss("baseline", ARMS["baseline"], 0)
    assert 1 < plain < 5.6
    assert one.val_loss("twin", Arm(ModelRecipe()), 0) == plain
    quantized = one.val_loss("w8a8", ARMS["w8a8"], 0)
    assert 0 < abs(quantized - plain) < 0.05
    assert one.val_loss("m2_int8", ARMS["m2_int8"], 0) != plain


def test_what_was_trained_is_not_trained_again(folder):
    first = bench(folder).val_loss("w8a8", ARMS["w8a8"], 0)
    late = bench(folder, deadline=time.monotonic() - 1)
    assert late.val_loss("w8a8", ARMS["w8a8"], 0) == first
    with pytest.raises(OutOfTime):
        late.val_loss("w8a8", ARMS["w8a8"], 1)
    with pytest.raises(OutOfTime):  # the same name, another arm
        late.val_loss("w8a8", ARMS["a4_token"], 0)
    assert not list((folder / "trainings").glob("*.partial"))


def test_the_baseline_keeps_weights_and_moments(folder):
    model, m, v = bench(folder).baseline(0)
    assert (
        set(m)
        == set(v)
        == {n for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("blocks.")}
    )
    assert all(bool((t >= 0).all()) for t in v.values())
    assert any(bool((t < 0).any()) for t in m.values())
    seen = bench(folder).observed(0)[1]
    assert seen.loss == pytest.approx(bench(folder).val_loss("baseline", ARMS["baseline"], 0), rel=0.05)
    assert seen.x["blocks.0.mlp.up"][0].shape == (8, 16, 64)


def test_a_run_that_diverged_is_infinite(folder):
    path = folder / "trainings" / f"a4_tensor-seed0-{TINY.key}.json"
    path.write_text(json.dumps({"arm": repr(ARMS["a4_tensor"]), "val_loss": math.inf}))
    assert bench(folder).val_loss("a4_tensor", ARMS["a4_tensor"], 0) == math.inf
    assert gap([math.inf, 2.0], [1.0, 1.0]) == [math.inf, 1.0]
    assert gap([1.1, 2.0], [1.0, 1.0], percent=True) == pytest.approx([10, 100])


def test_an_arm_against_itself_has_no_gap(folder):
    m = between("baseline")(bench(folder))
    assert (m.value, m.low, m.high) == (0.0, 0.0, 0.0)
    assert between("m1_int4_row")(bench(folder)).value != 0.0
