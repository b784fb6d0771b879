"""Attention logits and the z-loss: one eager forward, on sampled steps, of a slice of the step's batch.

Queries and keys are caught where the model names them (``attn.q_rope``, ``attn.k_rope``); of a model without these
places, as those of other libraries, there is the z-loss alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from qtrain.analysis.limits import MAX_LOGIT
from qtrain.analysis.tensor_statistics import z_loss
from qtrain.nn.census import named_layers
from qtrain.nn.quantizers import notes_put_back

from ..module import QuantizedTransformer
from .instrument import BatchSlice, Instrument, check_sequences, untouched, worst


def max_logit(q: Tensor, k: Tensor) -> float:
    """max of q k / sqrt(D) over the pairs that a causal mask lets through. q [B, H, S, D], k [B, K, S, D], head h
    reading key head h // (H / K)."""
    q, k = q.to(torch.float32), k.to(torch.float32)
    grouped = q.unflatten(1, (k.shape[1], -1))  # [B, K, H/K, S, D]
    logits = grouped @ k[:, :, None].transpose(-2, -1) / math.sqrt(q.shape[-1])
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return float(logits.masked_fill(future, -math.inf).max())


class AttentionLogits(Instrument):
    """Samples under ``attention/`` and ``stability/z_loss``; alert ``attention/max_logit``. sequences: of the slice."""

    name = "attention"

    def __init__(self, every_steps: int = 100, sequences: int = 1) -> None:
        super().__init__(every_steps)
        check_sequences(self.name, sequences)
        self.sequences = sequences

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        step = trainer.global_step + 1
        if batch_idx % pl_module.accumulate or not self.due(step) or not self.takes_part(trainer, pl_module):
            return
        part = BatchSlice(trainer, pl_module, batch, batch_idx, self.sequences)
        largest: dict[str, float] = {}
        handles = [
            handle
            for name, module in named_layers(pl_module.model).items()
            if isinstance(getattr(module, "q_rope", None), nn.Module)
            for handle in _watch(name, module, largest)
        ]
        try:
            with untouched(pl_module), notes_put_back(pl_module.model):
                logits = part.logits(pl_module.model)
        finally:
            for handle in handles:
                handle.remove()
        found = {f"attention/{name}": {"max_logit": x} for name, x in largest.items()}
        self.record(trainer, pl_module, step, {**found, "stability": {"z_loss": z_loss(logits)}})
        name, value = worst(largest, least=False)
        self.alert_where(
            value > MAX_LOGIT, trainer, pl_module, step, "attention/max_logit", value=value, limit=MAX_LOGIT,
            message=f"the largest attention logit of {name} is {value:.4g}",
        )  # fmt: skip


def _watch(name: str, attention: Any, largest: dict[str, float]) -> list[Any]:
    """Hooks that put its largest logit under ``name``: the key comes after the query."""
    queries: list[Tensor] = []

    def took_key(module: nn.Module, args: Any, k: Tensor) -> None:
        largest[name] = max_logit(queries.pop(), k)

    return [
        attention.q_rope.register_forward_hook(lambda module, args, q: queries.append(q)),
        attention.k_rope.register_forward_hook(took_key),
    ]
