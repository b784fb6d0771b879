"""Moment: what names the random bits of a collective, and whether it belongs to training."""

from __future__ import annotations

import torch
from qtrain_kernels.counter_hash import random_bits, stream_id, uniform
from torch import Tensor

from .row_format import Piece


class Moment:
    """Where a run stands: its ``seed``, the optimizer ``step`` and the micro-step within it.

    live: whether a step has begun. Before that nothing is remembered and gradients travel as they are, so that a probe
    of the model leaves no trace.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.step, self.micro_step, self.live = seed, 0, 0, False

    def begin(self, step: int, micro_step: int) -> None:
        self.step, self.micro_step, self.live = step, micro_step, True

    def noise(self, piece: Piece, what: str, x: Tensor, first_row: int) -> Tensor | None:
        """Uniform float32 of the shape of x, rows of ``piece`` from ``first_row`` on; None where nothing is drawn. By
        (seed, step, piece, what, row, column): the rows of a process are those of the whole."""
        if piece.format.spec is None or not piece.format.spec.stochastic:
            return None
        seed, step = (torch.tensor(n, device=x.device) for n in (self.seed, self.step))
        stream = stream_id(f"{piece.name}/{what}")
        return uniform(random_bits(seed, step, stream, x.shape[0], x.shape[1], row_offset=first_row))
