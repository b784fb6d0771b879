"""What storing Adam's moments in few bits does to them, from the stored tensors before and after one step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtrain.optim.states import StateLayout
from qtrain.quant.packing import unpack

COUNTS = ("exp_avg.unchanged", "exp_avg_sq.unchanged", "exp_avg_sq.zero_bin")


def _unchanged(layout: StateLayout, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """How many codes are the same; nan where codes are not what is stored, or nothing was stored before."""
    key = f"{layout.kind}.codes"
    if layout.spec is None or key not in after or key not in before:
        return float("nan")
    columns = layout.matrix[1]
    a, b = (unpack(held[key], layout.spec.bits, columns) for held in (before, after))
    return float((a == b).sum())


@torch.no_grad()
def state_counts(
    layouts: tuple[StateLayout, StateLayout],
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    grad: Tensor,
    beta2: float,
) -> tuple[list[float], float]:
    """(numbers of elements: as COUNTS names them, and all; the least stored second moment) of one parameter or of
    the rows of it that are here. before, after: what the optimizer holds of it; before the first step nothing, which
    stands for zeros. grad: of the step between, as the optimizer got it. A count is nan where the moment is not quantized, and counts of several shards add up."""
    m, v = layouts
    g = grad.to(torch.float32).reshape(v.shape)
    stored = v.read(after)
    zeros = float("nan")
    if v.spec is not None:
        true = (1 - beta2) * g.square()
        if before:
            true += beta2 * v.read(before)
        zeros = float(((true > 0) & (stored == 0)).sum())
    least = float(stored.min()) if stored.numel() else float("inf")
    counts = [_unchanged(m, before, after), _unchanged(v, before, after), zeros, float(stored.numel())]
    return counts, least
