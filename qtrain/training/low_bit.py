"""What of a run's model travels between its processes in low bits."""

from __future__ import annotations

from typing import Any

from torch import nn

from qtrain.communication.gather import gathers_exactly
from qtrain.communication.low_bit import LowBitCommunication
from qtrain.nn.inventory import gathered_layers, linear_layers

from . import processes
from .assembly import Assembly


def communication_of(parts: Assembly, model: nn.Module) -> LowBitCommunication | None:
    """The low-bit communication of a run, for ``model`` before anything is attached; None where everything travels as
    it is, and in one process, where a checkpoint of several is evaluated."""
    settings = parts.processes.communication
    if not settings.active or processes.world_size() == 1:
        return None
    gathered = {} if settings.gather_weights is None else gathered_layers(model, parts.recipe)
    if settings.gather_weights is not None and not gathered:
        raise ValueError(
            f"trainer.gather_weights={settings.gather_weights}: the model has no linear layer that the recipe does not "
            "exclude and that is not tied to a table; leave it null"
        )
    return LowBitCommunication(settings, seed=parts.settings.seed, gathered=gathered)


def summary_of(parts: Assembly, model: nn.Module, communication: LowBitCommunication) -> dict[str, Any]:
    """What the final table says of it: of the last step, by process. ``exact``: how many of the gathered weights are read
    as the codes that travelled, so that training is as without."""
    found = communication.summary()
    spec = communication.settings.gather_weights
    if spec is not None:
        layers = linear_layers(model)
        found["exact"] = sum(
            gathers_exactly(parts.recipe.for_layer(name), spec)
            and not getattr(layers[name], "stores_transposed", False)
            for name in gathered_layers(model, parts.recipe).values()
        )
    return found
