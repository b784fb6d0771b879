"""How a linear layer stores its weight: nn.Linear as [O, I], Conv1D of Hugging Face's GPT-2 as [I, O].

GEMMs, specs and ranges refer to [O, I], whatever the storage. Optimizer states go by the storage: a scale per row of
an optimizer state (dimension 0) is one per output of an nn.Linear and one per input of a Conv1D.
"""

from __future__ import annotations

import sys

from torch import Tensor, nn


def conv1d_class() -> type[nn.Module] | None:
    """Conv1D of Hugging Face, if somebody has imported it: a model that has one has."""
    return getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)


def k_major(layer: nn.Module, matrix: Tensor | None = None) -> Tensor:
    """The weight of a linear layer, or a tensor of its shape such as the gradient, as GEMMs read it: [O, I], a view of
    what is stored."""
    stored = layer.weight if matrix is None else matrix
    assert isinstance(stored, Tensor)
    return stored.t() if getattr(layer, "stores_transposed", not isinstance(layer, nn.Linear)) else stored
