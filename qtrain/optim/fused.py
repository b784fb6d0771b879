"""Which parameters the op ``adamw_step`` steps, many of them in one launch, and how they are handed to it.

The op reads and writes every byte once, where the eager step writes each intermediate to memory. It takes what it has
a layout for; ``refusal_of_*`` name what it has not, and such a parameter is stepped eagerly (``fused=None``) or refused
(``fused=True``). Blocks never cross a row, so the rows of a shard are to the op a parameter like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from qtrain_kernels.adamw_step import DTYPES, MIN_SCALE, WIDEST_BLOCK, adamw_step
from torch import Tensor

from qtrain.quant import NumberFormat, QuantSpec

from . import codec
from .eager import Layouts, Numbers, Part
from .states import KINDS, StateLayout

DEVICES = ("cuda",)  # those the op has a kernel for
WHOLE_ROW = 1 << 30


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


def refusal_of_tensors(weights: Tensor, gradient: Tensor) -> str | None:
    """Why the op cannot step these local rows, whatever their moments; None where it can."""
    if weights.device.type not in DEVICES:
        return f"it lies on {weights.device}, and the op has kernels for {', '.join(DEVICES)}"
    if gradient.dtype not in DTYPES:
        return f"its gradient is {gradient.dtype}"
    if not weights.is_contiguous() or not gradient.is_contiguous():
        return "it or its gradient is not contiguous"
    return None


@dataclass(frozen=True, eq=False)
class Kind:
    """What parameters of one call have in common: the formats of their moments and the columns of a block. One
    object a kind (``kind_of``), so that it is known by its identity."""

    specs: tuple[QuantSpec | None, QuantSpec | None]
    block: int


_kind = cache(Kind)


def kind_of(layouts: Layouts) -> Kind:
    """For layouts that ``refusal_of_layouts`` does not refuse."""
    blocks = [layout.spec.blocks.columns or WHOLE_ROW for layout in layouts if layout.spec is not None]
    # Where the moments' blocks differ, both are longer than a row
    return _kind((layouts[0].spec, layouts[1].spec), max(blocks, default=WHOLE_ROW))


@cache
def _levels(number_format: NumberFormat, device: torch.device) -> Tensor:
    codes = torch.arange(2**number_format.bits, dtype=torch.uint8)
    return number_format.decode(codes).to(device)


class FusedSteps:
    """Collects the parameters of one optimizer step, then steps them in as few calls of the op as there are kinds."""

    def __init__(self) -> None:
        self._calls: dict[tuple[Kind, Numbers, torch.device, torch.dtype, torch.dtype], list[Part]] = {}

    def add(self, kind: Kind, part: Part) -> None:
        """A parameter that neither refusal names."""
        if part.weights.numel():  # a shard may have no rows
            key = kind, part.now, part.weights.device, part.weights.dtype, part.gradient.dtype
            self._calls.setdefault(key, []).append(part)

    def run(self) -> None:
        """Calls the op, once a kind of parameter and of numbers."""
        for (kind, now, device, _, _), parts in self._calls.items():
            moments: list[object] = []
            for name, spec in zip(KINDS, kind.specs, strict=True):
                if spec is None:
                    moments += [[part.held[name] for part in parts], [], None, None, 1.0]
                    continue
                moments += [
                    [part.held[f"{name}.codes"] for part in parts],
                    [part.held[f"{name}.scale"] for part in parts],
                    _levels(spec.number_format, device),
                    codec.code_table_on(spec.number_format, device),
                    spec.number_format.max,
                ]
            adamw_step(
                [part.weights for part in parts],
                [part.gradient for part in parts],
                *moments,  # type: ignore[arg-type]
                kind.block,
                *now,
            )
        self._calls.clear()
