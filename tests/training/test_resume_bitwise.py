"""A resumed run is the same run, bit for bit, whatever its states are kept in."""

from __future__ import annotations

import json

import pytest
import torch

from qtrain.training.assembly import assemble
from qtrain.training.fit import train
from qtrain.training.run_folder import read_lines

from .crashed_run import HISTORY, NO_CENSUS, crash_then_resume
from .same_run import assert_same, state

FORMATS = {
    "float32": ("none", "none"),
    "dynamic8": ("dynamic8", "dynamic8"),
    "dynamic8 stochastic": ("dynamic8_sr", "dynamic8_sr"),
    "4 bits": ("dynamic4", "linear4_nozero"),
    "int8 row": ("int8_row", "uint8_row"),
    "int8 tensor": ("int8_tensor", "int8_tensor"),
    "int4 with zero points": ("int4_row_asym", "uint4_group128_sr"),
    "fp8": ("e4m3_row", "e5m2_row"),
    "mxfp8": ("mxfp8", "mxfp8"),
    "nvfp4": ("nvfp4", "e4m3_tensor"),
}


@pytest.mark.parametrize("states", FORMATS.values(), ids=FORMATS)
def test_resume_is_bitwise(configure, tmp_path, states):
    """20 steps straight, and 10, 3 lost, 10."""
    overrides = [*HISTORY, NO_CENSUS, "steps=20", "checkpoint_every_steps=10", "eval_every_steps=5", "model.width=64",
                 "model.heads=2", f"m1={states[0]}", f"m2={states[1]}"]  # fmt: skip
    _, straight = train(assemble(configure(tmp_path, *overrides, "run=straight")))
    resumed = crash_then_resume(configure, tmp_path, overrides, at=13)
    assert [r["step"] for r in read_lines(resumed / "attempts.jsonl")] == [0, 10]
    assert_same(straight, resumed)
    kinds = {name.rsplit("/", 1)[1] for name in state(straight)}
    assert ("exp_avg" in kinds, "exp_avg.codes" in kinds) == (True, states[0] != "none")


@pytest.mark.parametrize(
    "optimizer", ["adamw_fake", "torch_adamw", "bnb_adamw8bit", "bnb_adamw32bit", "bnb_lion8bit"]
)
def test_resume_is_bitwise_with_every_optimizer(configure, tmp_path, optimizer):
    overrides = [*HISTORY, NO_CENSUS, "steps=8", "checkpoint_every_steps=3", "eval_every_steps=4", "model.width=64",
                 "model.heads=2", f"optimizer={optimizer}"]  # fmt: skip
    _, straight = train(assemble(configure(tmp_path, *overrides, "run=straight")))
    resumed = crash_then_resume(configure, tmp_path, overrides, at=5)
    assert_same(straight, resumed)
    held = state(straight)
    bytes_ = {name for name, t in held.items() if t.dtype == torch.uint8 and "optimizer" in name}
    assert bool(bytes_) == optimizer.endswith("8bit")
    summary = json.loads((straight / "summary.json").read_text())["optimizer_state_bytes"]
    assert (summary["total"] < 0.8 * summary["as_float32"]) == optimizer.endswith("8bit")
