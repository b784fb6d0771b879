"""A run that breaks off like a crash and goes on."""

from __future__ import annotations

import pytest
from lightning.pytorch import Callback

from qtrain.training.assembly import assemble
from qtrain.training.fit import train

# Everything that could depend on what ran before
HISTORY = [
    "recipe=qpt", "w=int8_row_sr", "a=int8_row_sr", "g=int8_column_sr", "model.dropout=0.1", "micro_batch_sequences=2",
    "activation_checkpointing=true", "schedule=cosine", "schedule.warmup_steps=2",
]  # fmt: skip
NO_CENSUS = "~callbacks.census"


class Stops(Callback):
    """Breaks off like a crash, after ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


def crash_then_resume(configure, out, overrides, *, at: int) -> object:
    """A run ``crashed`` that breaks off before step ``at`` + 1, and goes on by the same command."""
    config = configure(out, *overrides, "run=crashed", "resume=auto")
    crashing = {
        **config,
        "callbacks": {**config["callbacks"], "stops": {"_target_": "tests.stops", "step": at}},
    }
    parts = assemble(config)
    from qtrain.training import fit

    built = fit.build

    def build(c):
        return Stops(at) if c.get("_target_") == "tests.stops" else built(c)

    fit.build = build
    try:
        with pytest.raises(RuntimeError, match="crash"):
            train(assemble(crashing))
    finally:
        fit.build = built
    verdict, folder = train(parts)
    assert verdict.good
    return folder
