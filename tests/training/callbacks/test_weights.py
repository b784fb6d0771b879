"""Updates and flipped codes of a run, against its checkpoints."""

from __future__ import annotations

import pytest

from qtrain.analysis.instrument_records import INSTRUMENTS, read_instruments
from qtrain.quant import QuantSpec, dequantize, quantize
from qtrain.training.assembly import assemble
from qtrain.training.fit import train
from qtrain.training.saved import read_checkpoint


@pytest.mark.parametrize("batch", [[], ["micro_batch_sequences=1"]])
def test_they_are_those_of_the_step(configure, tmp_path, batch):
    overrides = ["model.width=32", "model.heads=2", "steps=3", "checkpoint_every_steps=1", "~callbacks.census",
                 "callbacks.checkpoint.keep=null", "callbacks.weights.every_steps=3", "recipe=qpt", "w=int4_row",
                 *batch]  # fmt: skip
    _, folder = train(assemble(configure(tmp_path, *overrides)))
    found = read_instruments(folder / INSTRUMENTS).samples[3]
    before, after = (
        read_checkpoint(folder / "checkpoints" / f"step-{step:06d}")["state_dict"] for step in (2, 3)
    )
    for layer in ("blocks.0.attn.q", "blocks.0.mlp.down", "token_embedding"):
        a, b = before[f"model.{layer}.weight"], after[f"model.{layer}.weight"]
        ratio = float((b - a).norm() / a.norm())
        assert found[f"weights/{layer}/update_ratio"] == pytest.approx(ratio, rel=1e-4)
        if layer == "token_embedding":
            assert f"weights/{layer}/flips" not in found
            continue
        qa, qb = (quantize(w, QuantSpec.of("int4_row")) for w in (a, b))
        moved = (dequantize(qb) - dequantize(qa)).abs().sum() / (b - a).abs().sum()
        assert found[f"weights/{layer}/oscillation"] == pytest.approx(float(moved), rel=1e-4)
        assert 0 < found[f"weights/{layer}/flips"] < 1
    assert not [name for name in found if "norm" in name.split("/")[1]]
