"""The clock of a model: what names the random bits of this moment.

    seed           of the run
    step           the optimizer step
    token_offset   index, within the step's global batch, of the first token that this forward sees

Stochastic rounding of an activation or gradient is a function of (seed, step, layer, GEMM, operand, global token,
channel). The token's index in the *step's* batch stands for micro-step and rank alike: splitting a batch over
micro-steps or processes gives every token the bits that it has in one piece, and a weight is rounded alike in all
micro-steps of a step.
"""

from __future__ import annotations

import torch
from qtrain_kernels.counter_hash import GOLDEN, random_bits, random_signs, uniform
from torch import Tensor

from qtrain.quant import QuantSpec, Transform


class Clock:
    """Three int64 counters on the model's device, shared by its quantized layers and advanced in place.

    A plain object: as a buffer, DistributedDataParallel would broadcast rank 0's token offset to all ranks.
    """

    def __init__(self, seed: int = 0) -> None:
        self.counters = torch.tensor([seed, 0, 0], dtype=torch.int64)

    def set(self, *, step: int, token_offset: int = 0) -> None:
        """Before each forward of a stochastic recipe."""
        self.counters[1] = step
        self.counters[2] = token_offset

    def follow(self, device: torch.device) -> None:
        """Move to where the model went (meta stays behind)."""
        if device.type != "meta" and self.counters.device != device:
            self.counters = self.counters.to(device)


DRAWS = tuple(
    f"{gemm}.{operand}"
    for gemm, operands in (
        ("fprop", ("input", "weight", "transform")),
        ("dgrad", ("grad_output", "weight", "transform")),
        ("wgrad", ("grad_output", "input", "transform")),
    )
    for operand in operands
)
"""What a layer may draw bits for; the order numbers its streams."""


class Draws:
    """The random draws of one layer at one moment: ``counters`` [3] (see Clock; None for a deterministic recipe)
    and the layer's ``stream``, which ``stream_id`` made from its name."""

    def __init__(self, counters: Tensor | None, stream: int) -> None:
        self.counters = counters
        self.stream = stream

    def words(self, draw: str) -> tuple[Tensor, Tensor, int, Tensor]:
        """(seed, step, stream, token offset), as kernels that draw their own bits take them."""
        return self._named(draw)

    def _named(self, draw: str) -> tuple[Tensor, Tensor, int, Tensor]:
        assert self.counters is not None, f"a deterministic recipe drew bits for {draw}"
        seed, step, token_offset = self.counters.unbind()
        stream = (self.stream + (DRAWS.index(draw) + 1) * GOLDEN) & 0xFFFFFFFF
        return seed, step, stream - (1 << 32) if stream >= 1 << 31 else stream, token_offset

    def noise(self, spec: QuantSpec, operand: str, shape: tuple[int, int], *, tokens: bool) -> Tensor | None:
        """Uniform [rows, columns] for an operand stored in that layout, None where nothing is drawn. tokens:
        whether rows are tokens, which count from the token offset."""
        if not spec.stochastic:
            return None
        seed, step, stream, token_offset = self._named(operand)
        return uniform(random_bits(seed, step, stream, *shape, row_offset=token_offset if tokens else 0))

    def signs(self, transform: Transform, gemm: str, contraction: int) -> Tensor | None:
        """The +-1 [contraction] that both operands of a GEMM share under a randomized transform."""
        if not transform.randomized:
            return None
        seed, step, stream, _ = self._named(f"{gemm}.transform")
        return random_signs(seed, step, stream, contraction)
