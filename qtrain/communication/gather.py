"""The all-gather of weights under FSDP2, in low bits.

    process r:  its rows W_r [c, K] of the float32 master  ->  codes and scales  ->  all processes
    everyone:   W^ = decode(codes, scales) [R, K], the same float32 numbers everywhere, the own rows included

The master and its optimizer state stay float32 rows; what blocks compute with is W^. As a custom all-gather of FSDP's
(``FSDPModule.set_custom_all_gather``) rather than a tensor subclass: parameters, their checkpoints and the compiled
code of the blocks don't know of it, and rows may be shared out unevenly, which FSDP's tensor extensions refuse.

Differs from ZeRO++'s qwZ (arXiv 2306.10209, section 3.1): blocks lie within rows, so that they are the same for every
number of processes; and a module in eval mode gathers its weights as they are: validation and samples are those of
the master, which the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.quant import LinearRecipe, QuantSpec, dequantize, quantize

from .exchange import Exchange, Traffic
from .moment import Moment
from .row_format import Piece

PURPOSE = "gather_weights"


def gathers_exactly(recipe: LinearRecipe | None, spec: QuantSpec) -> bool:
    """Whether a layer of ``recipe`` computes the same, bit for bit, with weights [O, I] gathered in ``spec``: where it
    reads nothing of W but the codes that it would have made of the master."""
    if recipe is None or recipe.fprop.transform is not None or recipe.fprop.weight != spec:
        return False
    plain = spec.symmetric and spec.clip == "absmax" and spec.scale_format == "float32"
    return recipe.dgrad.weight == "fprop" and plain and not spec.stochastic and _ends_alike(spec)


def _ends_alike(spec: QuantSpec) -> bool:
    """Whether a block's largest number comes back as large with either sign. In dynamic8 a negative one does not, and what
    arrived then has a smaller scale."""
    up, down = dequantize(quantize(torch.tensor([[1.0], [-1.0]]), spec))
    return bool(up == -down)


class WeightGather:
    """FSDP2's all-gather of one module's parameters, ``pieces`` in FSDP's order; those with a spec travel in it while
    ``module`` trains."""

    def __init__(self, module: nn.Module, pieces: Sequence[Piece], moment: Moment, traffic: Traffic) -> None:
        self.module, self.pieces, self.moment, self.traffic = module, tuple(pieces), moment, traffic

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Of FSDP's interface ``Comm``."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        """input_tensor [n] float32: this process's padded rows of each piece, one piece after the other; may be a
        part of output_tensor [W n], which holds those of all processes afterwards. Raises TypeError for parameters
        in another dtype."""
        if input_tensor.dtype != torch.float32:
            raise TypeError(
                f"trainer.gather_weights takes float32 parameters, these are {input_tensor.dtype}; leave it null"
            )
        exchange = Exchange(self.traffic, group)
        pieces = self.pieces if self.module.training else [piece.exact for piece in self.pieces]
        sizes = [piece.chunk(exchange.world) * piece.columns for piece in pieces]
        encoded = []
        for piece, flat in zip(pieces, input_tensor.split(sizes), strict=True):
            rows = flat.view(-1, piece.columns)
            noise = self.moment.noise(piece, "gather", rows, exchange.rank * len(rows))
            encoded.append(piece.format.encode(rows, noise))
        gathered = exchange.all_gather(encoded, PURPOSE, input_tensor.numel())
        places = output_tensor.view(exchange.world, -1).split(sizes, 1)
        for piece, place, rows in zip(pieces, places, gathered, strict=True):
            place.copy_(piece.format.decode(rows).view(exchange.world, -1))
