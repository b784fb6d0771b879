"""The validation windows of a run, of one source or of several, and the loss over them.

    L = sum_k w_k mean(losses of part k's windows)           nats per token; w_k the weight of part k, sum_k w_k = 1

With weights, L is the loss on text drawn as training draws it, however many windows each part has. Bits per byte
follow from tokens per byte, of which a mixture by tokens has 1 / sum_k (w_k / t_k).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from qtrain.data.stream import ValidationWindows


@dataclass(frozen=True)
class ValidationPart:
    """name: of the source. tokens_per_byte: of its validation text; None where no tokenizer is named."""

    name: str
    weight: float
    windows: ValidationWindows
    tokens_per_byte: float | None


class ValidationSet(Dataset[dict[str, Tensor]]):
    """The windows of all parts, one part after the other."""

    def __init__(self, parts: Sequence[ValidationPart]) -> None:
        self.parts = tuple(parts)
        self._all: ConcatDataset[dict[str, Tensor]] = ConcatDataset([part.windows for part in self.parts])

    @staticmethod
    def single(windows: ValidationWindows, tokens_per_byte: float | None) -> ValidationSet:
        return ValidationSet([ValidationPart("", 1.0, windows, tokens_per_byte)])

    def __len__(self) -> int:
        """Number of windows."""
        return len(self._all)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside [0, {len(self)})")
        return self._all[index]

    @property
    def sequence_tokens(self) -> int:
        return self.parts[0].windows.sequence_tokens

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens per UTF-8 byte of text drawn by the weights; None where a part does not know its own."""
        bytes_per_token = 0.0
        for part in self.parts:
            if part.tokens_per_byte is None:
                return None
            bytes_per_token += part.weight / part.tokens_per_byte
        return 1 / bytes_per_token

    def tokens(self) -> NDArray[np.int64]:
        """All windows, [len(self), S + 1] int64."""
        return np.concatenate([part.windows.tokens() for part in self.parts])

    def losses(self, window_losses: Tensor) -> dict[str, float]:
        """[len(self)], nats per token of every window -> the mean of each part."""
        if len(window_losses) != len(self):
            raise ValueError(f"{len(window_losses)} losses for {len(self)} validation windows")
        ends = [0, *self._all.cumulative_sizes]
        means = [float(window_losses[a:b].double().mean()) for a, b in pairwise(ends)]
        return {part.name: mean for part, mean in zip(self.parts, means, strict=True)}

    def loss(self, window_losses: Tensor) -> float:
        """The weighted mean of ``losses``, nats per token."""
        means = self.losses(window_losses)
        return sum(part.weight * means[part.name] for part in self.parts)
