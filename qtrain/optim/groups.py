"""Parameter groups: which weights decay, and whose optimizer states may be quantized.

matrices (linear layers)      decay       quantized states
norm gains, biases            no decay    (float32 states: fewer than two dimensions)
learned quantizer ranges      no decay    quantized where large
embeddings, tied heads        by choice   float32 states: rows seen rarely have gradients far apart in size
                                          (arXiv 2110.02861)

Quantized states go by a parameter's storage: a block or scale never crosses a row of dimension 0, which is an output of
an nn.Linear and an input of Hugging Face's Conv1D (GPT-2), stored [I, O].
"""

from __future__ import annotations

from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = False
) -> list[dict[str, Any]]:
    """Groups for ``AdamW``, every trainable parameter exactly once, empty groups left out.

    model: any module; frozen parameters are skipped. weight_decay: of the decaying groups. decay_embeddings:
    whether embeddings are among them. A weight that an ``nn.Embedding`` shares with another module is an
    embedding. Each group holds ``params``, ``names`` (as ``model.named_parameters`` gives them: of tied ones the
    first), ``weight_decay`` and ``quantize_states``.

    Raises ValueError for a negative weight_decay or a model without trainable parameters.
    """
    if not weight_decay >= 0.0:
        raise ValueError(f"weight_decay={weight_decay!r}: must be 0 or more, for example 0.1")
    embeddings = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for p in module.parameters(recurse=False)
    }
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        embedding = id(p) in embeddings
        # Ranges of learned quantizers may be columns [O, 1]; shrinking them is no regularisation
        decays = decay_embeddings if embedding else p.dim() >= 2 and "quantizers" not in name.split(".")
        new = {
            "params": [],
            "names": [],
            "weight_decay": weight_decay if decays else 0.0,
            "quantize_states": not embedding,
        }
        group = groups.setdefault((decays, not embedding), new)
        group["params"].append(p)
        group["names"].append(name)
    if not groups:
        raise ValueError("the model has no trainable parameters: check requires_grad")
    return [groups[key] for key in sorted(groups, reverse=True)]
