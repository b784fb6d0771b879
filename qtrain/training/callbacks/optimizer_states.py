"""What storing Adam's moments in few bits does to them: stalled codes, and second moments that became zero.

On sampled steps what the optimizer holds is copied before the step, packed as it is. Of optimizers other than qtrain's
AdamW there is ``largest_inverse`` where they hold ``exp_avg_sq`` itself, and else nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer

from qtrain.analysis.state_statistics import COUNTS, state_counts
from qtrain.optim import AdamW
from qtrain.optim.sharding import local, local_gradient

from ..module import QuantizedTransformer
from ..processes import summed
from .instrument import Instrument

Held = dict[str, Tensor]


class OptimizerStates(Instrument):
    """Samples under ``optim/``, of every parameter of two or more dimensions."""

    name = "optimizer_states"

    def __init__(self, every_steps: int = 100) -> None:
        super().__init__(every_steps)
        self._before: dict[str, Held] | None = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        if self.due(trainer.global_step + 1) and self.takes_part(trainer, pl_module):
            states = {name: optimizer.state.get(p, {}) for name, p, _ in _matrices(pl_module, optimizer)}
            # Of float32 moments nothing is asked that needs them
            self._before = {
                name: {k: t.detach().clone() for k, t in held.items() if "." in k}
                for name, held in states.items()
            }

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self._before is None:
            return
        before, self._before = self._before, None
        optimizer, counted, least, eps = trainer.optimizers[0], {}, {}, {}
        for name, p, group in _matrices(pl_module, optimizer):
            held = optimizer.state.get(p, {})
            if p.grad is None or not held:
                continue
            if isinstance(optimizer, AdamW):
                layouts = optimizer.state_layouts(p)
                gradient, beta2 = local_gradient(name, p), group["betas"][1]
                counted[name], least[name] = state_counts(layouts, before[name], held, gradient, beta2)
            elif "exp_avg_sq" in held:
                counted[name] = [math.nan] * len(COUNTS) + [1.0]
                least[name] = float(local(held["exp_avg_sq"]).min())
            eps[name] = group.get("eps", 0.0)
        found = self._reduced(trainer, pl_module, counted, least, eps)
        self.record(trainer, pl_module, trainer.global_step, found)

    def _reduced(
        self,
        trainer: Trainer,
        module: QuantizedTransformer,
        counted: dict[str, list[float]],
        least: dict[str, float],
        eps: dict[str, float],
    ) -> dict[str, dict[str, float]]:
        """Counts of all shards -> shares; the names are the same on all processes."""
        if not counted:
            return {}
        counts = torch.tensor(list(counted.values()), dtype=torch.float64)
        ends = torch.tensor([-x for x in least.values()], dtype=torch.float64)
        if module.parts.processes.sharding == "fsdp2":
            device = trainer.strategy.root_device
            counts = summed(counts.to(device)).cpu()
            ends = trainer.strategy.reduce(ends.to(device), reduce_op="max").cpu()  # type: ignore[union-attr]
        found = {}
        for name, row, end in zip(counted, counts.tolist(), ends.tolist(), strict=True):
            shares = {k: n / row[-1] for k, n in zip(COUNTS, row, strict=False) if not math.isnan(n)}
            root = math.sqrt(max(-end, 0.0)) + eps[name]
            found[f"optim/{name}"] = {**shares, "largest_inverse": 1.0 / root if root else math.inf}
        return found


def _matrices(module: QuantizedTransformer, optimizer: Optimizer) -> list[tuple[str, Tensor, dict[str, Any]]]:
    """(name, parameter, its group): the order is the model's, on all processes."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = ((n.replace("_orig_mod.", ""), p) for n, p in module.model.named_parameters())
    return [(n, p, groups[id(p)]) for n, p in named if p.dim() > 1 and id(p) in groups]
