"""What training asks of a model, and nothing more. A model from anywhere that has it is trained like ours.

A frozen dataclass describes the model and builds it; ``_target_`` of a file in configs/model names that class. The
model is a module from tokens to logits that can name its blocks.

B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class ModelConfig(Protocol):
    """The shape and variant of a model; it refuses what cannot be built when it is made (ValueError)."""

    @property
    def vocab_size(self) -> int:
        """V: ids lie in [0, V). At least as many as the tokenizer has."""

    @property
    def sequence_tokens(self) -> int:
        """The longest sequence that the model reads."""

    def build(self, *, seed: int, pretrained: bool = True) -> Any:
        """The ``LanguageModel``, in float32 on the default device.

        seed: of initial weights, the same for the same seed on every machine; torch's global generator is as it was
        afterwards. pretrained: whether weights that the config names elsewhere are read; False where those of a
        checkpoint follow, so that a run goes on without the place that it started from.
        """


class LanguageModel(Protocol):
    """An ``nn.Module``: causal, tokens [B, S] int64 -> logits [B, S, V]."""

    def __call__(self, tokens: Tensor) -> Tensor: ...

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The blocks that hold most of the parameters, in the order they are called in, each called as a module once
        a forward. FSDP2 gathers one at a time, and each is compiled by itself under it."""

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether a block's activations are computed again in the backward pass instead of being kept."""
