"""QTensor: codes, scales and zero points as they lie in memory, and the way there and back.

    x ~ (codes - zero_point) * scale          per block of the K-major view [free, contraction]

``quantize_values`` is the one place where an operand meets its grid. Layers, optimizers and storage all use it,
so that a simulated GEMM, a packed checkpoint and a kernel are held to the same numbers. All of it is float32:
amax, scale = amax / max, v = x * (1 / scale) (one division a block, the same bits on every device), rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import ranges
from .formats.floating import E4M3
from .packing import pack, unpack
from .spec import QuantSpec

F, K = 0, 1  # axes of the K-major view


class Quantized(NamedTuple):
    """An operand on its grid, not yet packed.

    values: [F, K] float32 grid values with the zero point taken off: x ~ values * scale.
    scale: [F/r, K/c] float32, the value of one code step, all levels multiplied.
    zero_point: like scale, or None.
    inside: [F, K] bool, where the estimator passes the gradient; None if everywhere.
    block_scale, tensor_scale: what is stored of the scale: [F/r, K/c] and 0-d (None where there is one level).
    amax: [F/r, K/c] float32, the largest magnitudes, for ranges with a state (else None).
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor | None
    inside: Tensor | None
    block_scale: Tensor
    tensor_scale: Tensor | None
    amax: Tensor | None = None


def _clip(
    blocks: Tensor, shape: tuple[int, int], spec: QuantSpec, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(lo, hi) a block, [nr, 1, nc, 1]; symmetric ranges have lo = -hi. What searches the grid is left to the
    caller."""
    kind, value = spec.clip_kind_and_value
    if spec.symmetric:
        hi = amax = ranges.absmax(blocks)
        if kind == "percentile":
            hi = ranges.rank_from_top(blocks.abs(), spec.blocks.counts(shape, blocks.device), value)
        elif kind == "rms":
            hi = ranges.root_mean_square(blocks, spec.blocks.counts(shape, blocks.device)) * value
        elif kind == "absmean":
            hi = ranges.mean_magnitude(blocks, spec.blocks.counts(shape, blocks.device)) * value
        elif kind == "fixed":
            hi = torch.full_like(amax, value)
        elif given is not None:
            hi = given * spec.number_format.max if kind == "learned" else torch.where(given > 0, given, amax)
        elif kind == "plugin":
            hi = spec.clip_function(blocks, spec.blocks.counts(shape, blocks.device))
        if hi is not amax:
            hi = torch.where(torch.isfinite(amax), hi, amax)
        return -hi, hi
    lo = torch.clamp(blocks.amin((1, 3), keepdim=True), max=0.0)
    hi = torch.clamp(blocks.amax((1, 3), keepdim=True), min=0.0)
    if kind == "percentile":
        counts = spec.blocks.counts(shape, blocks.device)
        finite = torch.isfinite(lo) & torch.isfinite(hi)
        lo, hi = (
            torch.where(finite, -torch.clamp(ranges.rank_from_top(-blocks, counts, value), min=0.0), lo),
            torch.where(finite, torch.clamp(ranges.rank_from_top(blocks, counts, value), min=0.0), hi),
        )
    return lo, hi


def _scale(lo: Tensor, hi: Tensor, spec: QuantSpec, largest: Tensor) -> tuple[Tensor, ...]:
    """Range -> (scale, block scale as stored, tensor scale, zero point), the last two None where there are none.
    largest: 0-d, the end of the widest range, which a tensor scale is made of."""
    grid = spec.number_format
    # A tensor divisor: CUDA's division by a Python scalar multiplies by its reciprocal, one unit in the last place off
    width = torch.full_like(hi, grid.max)
    if not spec.symmetric:
        scale = torch.clamp((hi - lo) / width, min=spec.min_scale)
        zero_point = torch.clamp(torch.round(-lo * (1.0 / scale)), 0.0, grid.max)
        return scale, scale, None, torch.nan_to_num(zero_point, nan=0.0)  # type: ignore[return-value]
    scale = torch.clamp(hi / width, min=spec.min_scale)
    # An infinite scale would be saturated by e4m3, and times a level other than zero is not NaN
    scale = torch.where(torch.isfinite(scale), scale, torch.nan)
    stored = tensor_scale = None
    if spec.scale_format.startswith("e8m0"):
        amax = torch.clamp(hi, min=spec.min_scale * grid.max)
        scale = stored = ranges.e8m0(scale, amax, grid, spec.scale_format)
        if spec.scale_format == "e8m0_prescale":
            scale = stored * (1.0 / ranges.prescale(grid))
    elif spec.tensor_scale:
        top = ranges.FOUR_SIX_TOP if spec.clip == "four_six" else E4M3.max
        largest = torch.clamp(largest / width.flatten()[0], min=spec.min_scale)
        largest = torch.where(torch.isfinite(largest), largest, torch.nan)
        stored, tensor_scale = ranges.e4m3_under_tensor_scale(scale, largest, top)
        scale = stored * tensor_scale
    elif spec.scale_format == "e4m3":
        scale = torch.clamp(E4M3.round(scale), min=2.0**-9)
    return scale, scale if stored is None else stored, tensor_scale, None  # type: ignore[return-value]


def _round_blocks(
    blocks: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(v = blocks / scale, its grid values less the zero point)."""
    v = blocks * (1.0 / scale)
    if zero_point is None:
        return v, spec.number_format.round(v, noise)
    return v, spec.number_format.round(v + zero_point, noise) - zero_point


def _inside(v: Tensor, values: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor | None:
    grid = spec.number_format
    if spec.estimator == "ste":
        return None
    if spec.estimator == "trust":
        return (values - v).abs() <= grid.widest_gap / 2
    if spec.estimator_function is not None:
        return spec.estimator_function(v, values)
    # v = x * (1 / scale) of the extreme element itself may exceed the end of the grid by rounding
    slack = 2.0**-20 * grid.max + (grid.widest_gap / 2 if spec.estimator == "seq" else 0.0)
    shifted = v if zero_point is None else v + zero_point
    return (shifted >= grid.min - slack) & (shifted <= grid.max + slack)


def _at_ratio(
    blocks: Tensor, x: Tensor, lo: Tensor, hi: Tensor, spec: QuantSpec
) -> Callable[[float], Tensor]:
    """What becomes of the blocks of x when their ranges are multiplied by a ratio."""
    true = spec.blocks.blocks(torch.ones_like(x, dtype=torch.float32)) > 0
    fixed = spec.clip == "four_six"  # the tensor scale is that of ratio 1

    def round_at(ratio: float) -> Tensor:
        scale, _, _, zero = _scale(lo * ratio, hi * ratio, spec, hi.amax() * (1.0 if fixed else ratio))
        rounded = _round_blocks(blocks, scale, zero, spec, None)[1] * scale
        return torch.where(true, rounded, blocks)  # the filling of a ragged block does not err

    return round_at


def quantize_values(
    x: Tensor, spec: QuantSpec, noise: Tensor | None = None, given: Tensor | None = None
) -> Quantized:
    """The operand x [F, K] (any float dtype) on the grid of ``spec``.

    given: [F/r, K/c] float32, needed exactly when the range has a state (``spec.stateful``): the learned step, or the
    range's end, 0 for the operand's own maximum.

    noise: [F, K] uniform float32 in [0, 1), needed exactly when ``spec.rounding`` is stochastic (else, or in
    another shape, ValueError). Differentiable code goes through ``qtrain.quant.fake_quantize`` or the layers.
    """
    if x.dim() != 2:
        raise ValueError(
            f"quantize_values takes a K-major matrix [free, contraction], got the shape {tuple(x.shape)}"
        )
    if (noise is not None) != spec.stochastic:
        raise ValueError(f"rounding={spec.rounding!r} {'needs' if spec.stochastic else 'takes no'} noise")
    if (given is not None) != spec.stateful:
        raise ValueError(
            f"clip={spec.clip!r} {'has a state, which a quantized layer holds; elsewhere' if spec.stateful else 'has none:'} "
            "use a clip without one: absmax, mse, gaussian, fixed:A"
        )
    if noise is not None and noise.shape != x.shape:
        raise ValueError(
            f"noise of shape {tuple(noise.shape)} for an operand of shape {tuple(x.shape)}: each element needs its own"
        )
    shape = (x.shape[F], x.shape[K])
    tiling = spec.blocks
    if x.numel() == 0:
        scale = x.new_full(tiling.scale_shape(*shape), spec.min_scale, dtype=torch.float32)
        zero_point = None if spec.symmetric else torch.zeros_like(scale)
        return Quantized(
            x.to(torch.float32),
            scale,
            zero_point,
            None,
            scale,
            scale.new_tensor(1.0) if spec.tensor_scale else None,
            torch.zeros_like(scale) if spec.stateful else None,
        )

    blocks = tiling.blocks(x.to(torch.float32))
    noise_blocks = None if noise is None else tiling.blocks(noise)
    if given is not None:
        given = given.detach().to(torch.float32)[:, None, :, None]
    lo, hi = _clip(blocks, shape, spec, given)
    ratios = {"mse": ranges.MSE_RATIOS, "four_six": ranges.FOUR_SIX_RATIOS}.get(spec.clip)
    largest = hi.amax()
    if ratios is not None:
        ratio = ranges.best_ratio(blocks, _at_ratio(blocks, x, lo, hi, spec), ratios)
        lo, hi = lo * ratio, hi * ratio
        largest = hi.amax() if spec.clip == "mse" else largest
    scale, block_scale, tensor_scale, zero_point = _scale(lo, hi, spec, largest)
    if spec.clip == "learned" and given is not None:  # the step itself, not (step * max) / max
        scale = block_scale = torch.where(torch.isfinite(scale), given.clamp(min=spec.min_scale), torch.nan)
    v, values = _round_blocks(blocks, scale, zero_point, spec, noise_blocks)
    inside = _inside(v, values, zero_point, spec)

    def flat(t: Tensor) -> Tensor:
        return t.reshape(t.shape[0], t.shape[2])

    return Quantized(
        values=tiling.unblock(values, shape),
        scale=flat(scale),
        zero_point=None if zero_point is None else flat(zero_point),
        inside=None if inside is None else tiling.unblock(inside, shape),
        block_scale=flat(block_scale),
        tensor_scale=tensor_scale,
        amax=None if given is None else flat(ranges.absmax(blocks)),
    )


def dequantize_values(values: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Grid values [F, K] times their scales [F/r, K/c]: float32 [F, K]."""
    return values * spec.blocks.expand(scale, (values.shape[F], values.shape[K]))


def _store_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    if spec.scale_format == "float32":
        return scale
    if spec.scale_format == "e4m3":
        codes = E4M3.encode(scale)
        return torch.where(torch.isnan(scale), 0x7F, codes.to(torch.int16)).to(torch.uint8)
    exponent = (scale.view(torch.int32) >> 23) & 0xFF  # e8m0 is the exponent field of float32; 255 is NaN
    return torch.where(torch.isfinite(scale), exponent, 255).to(torch.uint8)


def _load_scale(stored: Tensor, spec: QuantSpec) -> Tensor:
    if spec.scale_format == "float32":
        return stored
    if spec.scale_format == "e4m3":
        return E4M3.decode(stored)
    power = (stored.to(torch.int32) << 23).view(torch.float32)
    power = torch.where(stored == 255, torch.nan, power)
    return (
        power * (1.0 / ranges.prescale(spec.number_format)) if spec.scale_format == "e8m0_prescale" else power
    )


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor as it is stored.

    codes: uint8, leading dimensions of ``shape`` and packed bytes along the last. scale: [F/r, K/c] in the
    spec's scale format (float32, or uint8 patterns of e8m0 and e4m3). zero_point: uint8 like scale, or None.
    tensor_scale: 0-d float32 or None. F is the product of all leading dimensions, K the last.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    tensor_scale: Tensor | None
    shape: tuple[int, ...]
    spec: QuantSpec

    def tensors(self) -> dict[str, Tensor]:
        """The tensors held, by name."""
        held = {
            "codes": self.codes,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "tensor_scale": self.tensor_scale,
        }
        return {name: t for name, t in held.items() if t is not None}

    def ledger(self) -> dict[str, float]:
        """Bits per element by part, and their ``total``: exactly the bytes held, padding included in codes."""
        elements = max(math.prod(self.shape), 1)
        parts = {name: 8.0 * t.numel() * t.element_size() / elements for name, t in self.tensors().items()}
        return {**parts, "total": sum(parts.values())}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())


def _as_matrix(x: Tensor) -> Tensor:
    return x.reshape(1, -1) if x.dim() < 2 else x.flatten(0, -2)


def to_qtensor(q: Quantized, spec: QuantSpec, shape: tuple[int, ...]) -> QTensor:
    """Pack an operand on its grid; ``shape`` [..., K] is the shape to give back."""
    values = q.values
    if q.zero_point is not None:
        values = values + spec.blocks.expand(q.zero_point, (values.shape[F], values.shape[K]))
    codes = pack(spec.number_format.encode(values), spec.bits)
    return QTensor(
        codes=codes.reshape(*shape[:-1], codes.shape[-1]),
        scale=_store_scale(q.block_scale, spec),
        zero_point=None if q.zero_point is None else q.zero_point.to(torch.uint8),
        tensor_scale=q.tensor_scale,
        shape=tuple(shape),
        spec=spec,
    )


def grid_values(q: QTensor) -> tuple[Tensor, Tensor]:
    """Unpack: (grid values less the zero point [F, K], scale [F/r, K/c]), both float32; x ~ values * scale."""
    values = q.spec.number_format.decode(
        unpack(_as_matrix(q.codes), q.spec.bits, q.shape[-1] if q.shape else 1)
    )
    shape = (values.shape[F], values.shape[K])
    if q.zero_point is not None:
        values = values - q.spec.blocks.expand(q.zero_point.to(torch.float32), shape)
    scale = _load_scale(q.scale, q.spec)
    return values, scale if q.tensor_scale is None else scale * q.tensor_scale


def quantize(x: Tensor, spec: QuantSpec, noise: Tensor | None = None) -> QTensor:
    """x [..., K] in any float dtype -> packed QTensor. The free axis is all leading dimensions together (a
    vector is one row). noise: uniform float32 of x's shape for stochastic rounding."""
    q = quantize_values(_as_matrix(x), spec, None if noise is None else _as_matrix(noise))
    return to_qtensor(q, spec, tuple(x.shape))


def dequantize(q: QTensor) -> Tensor:
    """float32 of the original shape."""
    values, scale = grid_values(q)
    return dequantize_values(values, scale, q.spec).reshape(q.shape)
