"""The guard: a step whose loss or gradient is not finite is never applied.

It decides when the gradient is complete (accumulated and, over several processes, reduced: so all decide alike),
before clipping and before the optimizer. The weights are then those of the last good step; they are saved, with
optimizer and position, as that step's checkpoint.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ..module import QuantizedTransformer, StepReading
from ..processes import any_rank, summed
from ..verdict import RunStopped, Verdict
from .checkpoint import checkpoint_writer, save


class Guard(Callback):
    """Raises RunStopped before a step with a non-finite loss or gradient."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        reading = pl_module.read_step(optimizer)
        if not any_rank(not (math.isfinite(reading.loss) and math.isfinite(reading.grad_norm))):
            return
        verdict = judge(pl_module, reading)
        save(trainer)
        checkpoint_writer(trainer).wait()
        raise RunStopped(verdict)


def judge(module: QuantizedTransformer, reading: StepReading) -> Verdict:
    """The verdict on a step that is not finite. A non-finite norm of finite gradients is an overflow of the norm
    itself, and names no parameter. All ranks call it."""
    quantity = "loss" if not math.isfinite(reading.loss) else "gradient norm"
    value = reading.loss if quantity == "loss" else reading.grad_norm
    gradients = {n: p.grad for n, p in module.model.named_parameters() if p.grad is not None}
    local = (g.to_local() if isinstance(g, DTensor) else g for g in gradients.values())
    # Where it is sharded, each rank sees its own rows
    bad = summed(torch.tensor([float(not g.isfinite().all()) for g in local]))
    named = [name for name, ranks in zip(gradients, bad.tolist(), strict=True) if ranks]
    where = f"; the first of {len(named)} non-finite gradients is that of {named[0]}" if named else ""
    return Verdict(
        outcome="non_finite",
        step=reading.step,
        message=f"the {quantity} of step {reading.step} is {value}{where}. The step was not applied",
        quantity=quantity,
        value=value,
        parameter=named[0] if named else None,
        parameters=len(named),
    )
