"""How far a step moves the weights, and how many of their codes it flips.

On sampled steps the weights before the step are kept beside those after it; of sharded ones each process keeps its rows,
and one parameter at a time is gathered.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from qtrain.analysis.layer_statistics import as_stored, codes_of, quantized_layers, weight_operand
from qtrain.analysis.tensor_statistics import angle, changed, oscillation, update_ratio
from qtrain.nn.linear import QuantizedLayer, k_major

from ..module import QuantizedTransformer
from .instrument import Instrument


class Weights(Instrument):
    """Samples under ``weights/``: of every parameter of two or more dimensions."""

    name = "weights"

    def __init__(self, every_steps: int = 100) -> None:
        super().__init__(every_steps)
        self._before: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        assert isinstance(pl_module, QuantizedTransformer)
        if self.due(trainer.global_step + 1) and self.takes_part(trainer, pl_module):
            self._before = {name: p.detach().clone() for name, p in _matrices(pl_module)}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if not self._before:
            return
        layers, found = quantized_layers(pl_module.model), {}
        for name, p in _matrices(pl_module):
            before, after = _whole(self._before.pop(name)), _whole(p.detach())
            if not trainer.is_global_zero:
                continue
            numbers = {"update_ratio": update_ratio(before, after), "angular_update": angle(before, after)}
            layer = layers.get(name.removesuffix(".weight"))
            if layer is not None:
                numbers |= _of_codes(layer, before, after)
            found[f"weights/{name.removesuffix('.weight')}"] = numbers
        self.record(trainer, pl_module, trainer.global_step, found)


def _matrices(module: QuantizedTransformer) -> list[tuple[str, Tensor]]:
    """Without learned steps, which are no weights."""
    named = ((n.replace("_orig_mod.", ""), p) for n, p in module.model.named_parameters())
    return [(n, p) for n, p in named if p.dim() > 1 and p.requires_grad and ".quantizers." not in n]


def _whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def _of_codes(layer: QuantizedLayer, before: Tensor, after: Tensor) -> dict[str, float]:
    """Of the weight as fprop reads it; nothing where that is high precision."""
    if layer.recipe.fprop.weight is None:
        return {}
    a, b = (weight_operand(layer, k_major(layer, w).contiguous()) for w in (before, after))
    (w_a, q_a), (w_b, q_b) = as_stored(a), as_stored(b)
    return {"oscillation": oscillation(w_a, w_b, q_a, q_b), "flips": changed(codes_of(a), codes_of(b))}
