"""The census of a run stops it when something else than the recipe runs."""

from __future__ import annotations

import json

import pytest
import torch

from qtrain.nn.linear import QuantizedLinear
from qtrain.training.assembly import assemble
from qtrain.training.fit import train
from qtrain.training.module import QuantizedTransformer


def test_a_layer_that_does_not_quantize_ends_the_run(configure, tmp_path, monkeypatch):
    """The configured layer's class, name and recipe stay; only its product is that of the stored weights."""
    configure_model = QuantizedTransformer.configure_model

    def sabotaged(self):
        configure_model(self)
        layer = self.model.blocks[0].mlp.up
        assert isinstance(layer, QuantizedLinear)
        layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(QuantizedTransformer, "configure_model", sabotaged)
    verdict, folder = train(assemble(configure(tmp_path)))
    assert verdict.outcome == "census_failed"
    assert "blocks.0.mlp.up" in verdict.message
    assert json.loads((folder / "census.json").read_text())["failures"]
    assert json.loads((folder / "verdict.json").read_text())["outcome"] == "census_failed"
    assert not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text()


@pytest.mark.inductor
@pytest.mark.slow
def test_a_compiled_run_compares_both_steps(configure, tmp_path):
    verdict, folder = train(assemble(configure(tmp_path, "compile=true", "steps=2")))
    assert verdict.good
    assert json.loads((folder / "census.json").read_text())["compiled"]["failures"] == []
