"""Stalls and zero bins of a run, against the codes of its checkpoints."""

from __future__ import annotations

import pytest
import torch

from qtrain.analysis.instrument_records import INSTRUMENTS, read_instruments
from qtrain.quant import QuantSpec
from qtrain.training.assembly import assemble
from qtrain.training.fit import train
from qtrain.training.saved import read_checkpoint

SMALL = ["model.width=32", "model.heads=2", "steps=3", "checkpoint_every_steps=1", "~callbacks.census",
         "callbacks.checkpoint.keep=null", "callbacks.optimizer_states.every_steps=3"]  # fmt: skip
NAME = "optim/blocks.0.mlp.up.weight"


def run(configure, tmp_path, *overrides):
    _, folder = train(assemble(configure(tmp_path, *SMALL, *overrides)))
    states = [
        read_checkpoint(folder / "checkpoints" / f"step-{step:06d}")["optimizer_states"][0]["state"]
        for step in (2, 3)
    ]
    return read_instruments(folder / INSTRUMENTS).samples.get(3, {}), *states


def test_unchanged_codes_and_the_zero_bin(configure, tmp_path):
    found, before, after = run(
        configure, tmp_path, "m1=int8_row", "m2=int8_row", "optimizer.states.min_numel=1000"
    )
    shape = (128, 32)
    (i,) = [k for k, held in after.items() if held.get("exp_avg.codes") is not None and held["exp_avg.codes"].shape == shape]  # fmt: skip
    for kind in ("exp_avg", "exp_avg_sq"):
        same = (before[i][f"{kind}.codes"] == after[i][f"{kind}.codes"]).double().mean()
        assert found[f"{NAME}/{kind}.unchanged"] == pytest.approx(float(same), rel=1e-4)
    # int8 with a linear grid holds small v in its zero bin (arXiv 2407.11722)
    codes = after[i]["exp_avg_sq.codes"]
    zero = int(QuantSpec.of("int8_row").number_format.encode(torch.zeros(1)))
    zeros = float((codes == zero).double().mean())
    assert zeros > 0
    assert found[f"{NAME}/exp_avg_sq.zero_bin"] == pytest.approx(zeros, rel=1e-3)
    assert found[f"{NAME}/largest_inverse"] == pytest.approx(1e8)


@pytest.mark.parametrize("optimizer", ["adamw", "torch_adamw", "bnb_adamw8bit"])
def test_of_other_states_what_there_is(configure, tmp_path, optimizer):
    more = ["m1=none", "m2=none"] if optimizer == "adamw" else []
    found, _, after = run(configure, tmp_path, f"optimizer={optimizer}", *more)
    of_states = {name: x for name, x in found.items() if name.startswith("optim/")}
    if optimizer == "bnb_adamw8bit":
        assert of_states == {}
        return
    assert {name.rsplit("/", 1)[1] for name in of_states} == {"largest_inverse"}
    # mlp.up, and the positions
    shaped = [h["exp_avg_sq"] for h in after.values() if h["exp_avg_sq"].shape == (128, 32)]
    inverses = [1 / (float(v.min()) ** 0.5 + 1e-8) for v in shaped]
    assert pytest.approx(of_states[f"{NAME}/largest_inverse"], rel=1e-4) in inverses
    assert len(set(inverses)) == 2
