"""A step that is not finite ends the run, unapplied, with everything needed to look into it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lightning.pytorch import Callback

from qtrain.training.assembly import assemble
from qtrain.training.callbacks.metrics_jsonl import read_metrics
from qtrain.training.fit import train
from qtrain.training.saved import checkpoint_of, read_checkpoint


class Poison(Callback):
    """Multiplies the embeddings of the second micro-batch of one step by NaN. ``step``: from 0."""

    step = 2

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        bad = trainer.global_step == self.step and batch_idx % 2 == 1

        def hook(module, arguments, output):
            return output * math.nan if bad else output

        self.handle = pl_module.model.token_embedding.register_forward_hook(hook)

    def on_train_batch_end(self, *_):
        self.handle.remove()


TWO = ["micro_batch_sequences=2", "steps=6"]


@pytest.fixture(scope="module")
def stopped(configure, tmp_path_factory):
    out = tmp_path_factory.mktemp("guard")
    config = configure(out, *TWO)
    config["callbacks"]["poison"] = {"_target_": "qtrain_test_poison.Poison"}
    import sys
    import types

    module = types.ModuleType("qtrain_test_poison")
    module.Poison = Poison
    sys.modules["qtrain_test_poison"] = module
    try:
        verdict, folder = train(assemble(config))
    finally:
        del sys.modules["qtrain_test_poison"]
    return verdict, folder, out


def test_the_verdict_names_step_quantity_value_and_layer(stopped):
    verdict, folder, _ = stopped
    assert not verdict.good
    written = json.loads((folder / "verdict.json").read_text())
    assert written["outcome"] == "non_finite"
    assert (written["step"], written["quantity"], written["value"]) == (3, "loss", "nan")
    assert written["parameter"] == "token_embedding.weight"
    assert written["parameters"] > 1


def test_the_metrics_end_before_it(stopped):
    rows = read_metrics(stopped[1] / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2]


def test_the_last_good_state_is_that_after_the_step_before(stopped, configure):
    _, folder, out = stopped
    saved = read_checkpoint(folder / "checkpoints" / "step-000002")
    assert saved["qtrain"]["step"] == 2
    _, short = train(assemble(configure(out, *TWO, "steps=2", "name=short")))
    reference = read_checkpoint(checkpoint_of(short))
    for key, value in reference["state_dict"].items():
        assert torch.equal(value, saved["state_dict"][key]), key


def test_it_resumes_from_the_last_good_state(stopped, configure):
    _, folder, out = stopped
    _, resumed = train(assemble(configure(out, *TWO, "name=resumed", f"resume={folder}")))
    _, whole = train(assemble(configure(out, *TWO, "name=whole")))
    a, b = (read_checkpoint(checkpoint_of(run))["state_dict"] for run in (resumed, whole))
    assert all(torch.equal(a[key], b[key]) for key in b)
