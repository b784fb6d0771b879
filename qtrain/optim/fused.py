"""Which parameters the op ``adamw_step`` steps, many of them in one launch, and how they are handed to it.

The op reads and writes every byte once, where the eager step writes each intermediate to memory. It takes what it has
a layout for; ``refusal`` names what it has not, and such a parameter is stepped eagerly (``fused=None``) or refused
(``fused=True``). Blocks never cross a row, so the rows of a shard are to the op a parameter like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import torch
from qtrain_kernels.adamw_step import DTYPES, MIN_SCALE, WIDEST_BLOCK, adamw_step
from torch import Tensor

from qtrain.quant import NumberFormat, QuantSpec

from . import codec
from .states import StateLayout

DEVICES = ("cuda",)  # those the op has a kernel for
WHOLE_ROW = 1 << 30
Layouts = tuple[StateLayout, StateLayout]


def refusal_of_layout(layout: StateLayout) -> str | None:
    """Why the op has no layout for this moment; None where it has."""
    spec = layout.spec
    if spec is None:
        return None
    stored = f"{layout.kind} as {spec}"
    if not layout.packed:
        return f"{layout.kind} is kept dequantized (packed=false)"
    if spec.stochastic:
        return f"{stored} is rounded stochastically"
    if spec.clip != "absmax" or not spec.symmetric or spec.tensor_scale or spec.scale_format != "float32":
        return f"{stored} is not scaled by one float32 maximum a block"
    if spec.bits not in (4, 8):
        return f"{stored} has codes of {spec.bits} bits, neither 4 nor 8"
    if spec.blocks.rows != 1:
        return f"{stored} has blocks over several rows"
    if spec.min_scale != MIN_SCALE:
        return f"{stored} has a floor of the scale other than {MIN_SCALE:g}"
    if codec.code_table(spec.number_format) is None:
        return f"{stored} is too fine for a table of codes"
    return None


def _columns(layout: StateLayout) -> int:
    assert layout.spec is not None
    return min(layout.spec.blocks.columns or WHOLE_ROW, layout.matrix[1])


@cache
def refusal_of_layouts(layouts: Layouts) -> str | None:
    """Why the op cannot step a parameter with these moments, whatever its device; None where it can."""
    for layout in layouts:
        if (reason := refusal_of_layout(layout)) is not None:
            return reason
    quantized = [layout for layout in layouts if layout.spec is not None]
    widths = {_columns(layout) for layout in quantized}
    if len(widths) > 1:
        return f"its moments have blocks of {' and '.join(map(str, sorted(widths)))} columns"
    for width in widths:
        if width > WIDEST_BLOCK:
            return f"its blocks of {width} columns are longer than {WIDEST_BLOCK}"
        if width % 2 and any(
            x.spec.bits == 4 and width < x.matrix[1] for x in quantized if x.spec is not None
        ):
            return f"its blocks of {width} columns end within a byte of 4-bit codes"
    return None


def refusal(weights: Tensor, gradient: Tensor, layouts: Layouts) -> str | None:
    """Why the op cannot step these local rows; None where it can."""
    if weights.device.type not in DEVICES:
        return f"it lies on {weights.device}, and the op has kernels for {', '.join(DEVICES)}"
    if gradient.dtype not in DTYPES:
        return f"its gradient is {gradient.dtype}"
    if not weights.is_contiguous() or not gradient.is_contiguous():
        return "it or its gradient is not contiguous"
    return refusal_of_layouts(layouts)


class Numbers(NamedTuple):
    """The numbers of one step: ``w = decay * w - step_size * m / (sqrt(v) / root + eps)``."""

    decay: float
    beta1: float
    beta2: float
    step_size: float
    root: float
    eps: float


class _Key(NamedTuple):
    """What one call of the op has in common."""

    device: torch.device
    weights: torch.dtype
    gradients: torch.dtype
    specs: tuple[QuantSpec | None, QuantSpec | None]
    block: int
    now: Numbers


@cache
def _levels(number_format: NumberFormat, device: torch.device) -> Tensor:
    codes = torch.arange(2**number_format.bits, dtype=torch.uint8)
    return number_format.decode(codes).to(device)


class FusedSteps:
    """Collects parameters of one optimizer step, then steps all of them in as few calls as there are kinds."""

    def __init__(self) -> None:
        self._calls: dict[_Key, list[tuple[Tensor, Tensor, Mapping[str, Tensor], Layouts]]] = {}

    def add(
        self, weights: Tensor, gradient: Tensor, held: Mapping[str, Tensor], layouts: Layouts, now: Numbers
    ) -> None:
        """Local rows, their gradient and states, for which ``refusal`` is None."""
        if weights.numel() == 0:  # a shard without rows
            return
        blocks = [x.spec.blocks.columns or WHOLE_ROW for x in layouts if x.spec is not None]
        key = _Key(
            weights.device,
            weights.dtype,
            gradient.dtype,
            (layouts[0].spec, layouts[1].spec),
            max(blocks, default=WHOLE_ROW),  # where they differ, both are longer than a row
            now,
        )
        self._calls.setdefault(key, []).append((weights, gradient, held, layouts))

    def run(self) -> None:
        """Calls the op, once a kind of parameter."""
        for key, members in self._calls.items():
            moments: list[object] = []
            for i, spec in enumerate(key.specs):
                kind = members[0][3][i].kind
                if spec is None:
                    moments += [[held[kind] for _, _, held, _ in members], [], None, None, 1.0]
                    continue
                moments += [
                    [held[f"{kind}.codes"] for _, _, held, _ in members],
                    [held[f"{kind}.scale"] for _, _, held, _ in members],
                    _levels(spec.number_format, key.device),
                    codec.code_table_on(spec.number_format, key.device),
                    spec.number_format.max,
                ]
            adamw_step(
                [weights for weights, _, _, _ in members],
                [gradient for _, gradient, _, _ in members],
                *moments,  # type: ignore[arg-type]
                key.block,
                *key.now,
            )
        self._calls.clear()
