"""Observations: an operand or a result of a GEMM as it was seen, against what the oracle says it must be.

distinct    an operand of a b-bit format shows at most 2^b values under one scale
sqnr_db     of each operand against what was to be quantized, and of y, dx, dW against the unquantized
            products: two-sided, within a band around the oracle's. Too good fails as well: nothing was
            quantized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qtrain.quant import QuantSpec

from .clock import Draws
from .linear import QuantizedLinear
from .oracle import OracleGemm, OracleOperand, linear_oracle
from .probe import LayerProbe, Product

BAND_DB = 0.5
"""Half width of the band around the oracle's SQNR. Codes agree but for elements within a bf16 rounding of a
threshold; a spec that differs in one bit, its granularity or its clip moves the SQNR by 1 dB or more."""

HIGH_PRECISION_DB = 40.0
"""What an operand that is not quantized must reach: bfloat16 rounding alone gives 52 to 55 dB."""

SAMPLED_BLOCKS = 512
"""How many scales of an operand are searched for distinct values, evenly spaced."""


@dataclass(frozen=True)
class Observation:
    """One operand or result of one GEMM of one layer, as it was seen.

    name: ``fprop.input`` .. ``wgrad.input``, or ``y``, ``dx``, ``dW``. distinct: the most values seen under one
    scale, of at most ``levels`` (None: not quantized). sqnr_db against the high-precision tensor, expected_db the
    oracle's. problem: empty, or what is wrong.
    """

    layer: str
    name: str
    spec: str
    kernel: str
    dtype: str
    distinct: int | None
    levels: int | None
    sqnr_db: float
    expected_db: float
    problem: str


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10(sum r^2 / sum (r - a)^2), float64; inf where they are equal, nan where the reference is zero."""
    r, a = reference.to(torch.float64), approximation.to(torch.float64)
    power, error = float(r.square().sum()), float((r - a).square().sum())
    if power == 0.0:
        return math.nan
    return math.inf if error == 0.0 else 10.0 * math.log10(power / error)


def _tiles(matrix: Tensor, spec: QuantSpec, filler: float) -> Tensor:
    """[F, K] -> [blocks, elements under one scale]; ragged ends hold ``filler``."""
    tiling = spec.blocks
    marks = tiling.blocks(torch.ones_like(matrix, dtype=torch.float32)).permute(0, 2, 1, 3)
    tiles = tiling.blocks(matrix.to(torch.float32)).permute(0, 2, 1, 3)
    tiles = torch.where(marks > 0, tiles, filler)
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1)


def most_distinct(matrix: Tensor, spec: QuantSpec) -> int:
    """The largest number of different values under one scale, over evenly sampled scales."""
    tiles = _tiles(matrix, spec, math.nan)
    tiles = tiles[:: max(1, tiles.shape[0] // SAMPLED_BLOCKS)]
    ordered = tiles.sort(dim=1).values
    new = (ordered[:, 1:] != ordered[:, :-1]) & ~ordered[:, 1:].isnan()
    return int(new.sum(1).max()) + 1 if tiles.numel() else 0


def rescaled(values: Tensor, source: Tensor, spec: QuantSpec) -> Tensor:
    """``values`` times the least-squares scale of each block: SQNR of codes whose scales are applied elsewhere.
    As [blocks, elements], beside ``_tiles(source)``."""
    v, s = _tiles(values, spec, 0.0), _tiles(source, spec, 0.0)
    return v * ((v * s).sum(1, keepdim=True) / v.square().sum(1, keepdim=True).clamp(min=1e-300))


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.to(torch.float32), b.to(torch.float32)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30))


def _executed(products: list[Product], gemm: OracleGemm) -> Product | None:
    """The product with the operands' shapes that is most like them (a transform is a product as well)."""
    shapes = gemm.a.source.shape, gemm.b.source.shape
    fitting = [p for p in products if (p.a.shape, p.b.shape) == shapes]
    return max(fitting, key=lambda p: _cosine(p.a, gemm.a.source) + _cosine(p.b, gemm.b.source), default=None)


def _out_of_band(seen: float, expected: float, band: float) -> str:
    if min(seen, expected) > 60.0 or abs(seen - expected) <= band:
        return ""
    if math.isnan(seen) and math.isnan(expected):
        return ""
    kind = "too good: not quantized as configured" if seen > expected else "too bad"
    return f"SQNR {seen:.1f} dB, expected {expected:.1f} +- {band} dB ({kind})"


def _observe_operand(layer: str, name: str, seen: Tensor, kernel: str, oracle: OracleOperand) -> Observation:
    dtype, spec, source = str(seen.dtype).removeprefix("torch."), oracle.spec, oracle.source
    if spec is None:
        quality = sqnr_db(source, seen)
        low = quality < HIGH_PRECISION_DB
        problem = (
            f"SQNR {quality:.1f} dB: configured as high precision, which keeps {HIGH_PRECISION_DB}"
            if low
            else ""
        )
        return Observation(layer, name, "none", kernel, dtype, None, None, quality, math.inf, problem)
    seen, source = (seen.t(), source.t()) if oracle.transposed else (seen, source)
    tiles = _tiles(source, spec, 0.0)
    quality = sqnr_db(tiles, rescaled(seen, source, spec))
    expected = sqnr_db(tiles, rescaled(oracle.values, source, spec))
    distinct, levels = most_distinct(seen, spec), 2**spec.bits
    problem = _out_of_band(quality, expected, BAND_DB)
    if distinct > levels:
        problem = f"{distinct} distinct values under one scale, {levels} allowed"
    return Observation(layer, name, str(spec), kernel, dtype, distinct, levels, quality, expected, problem)


def _observe_result(layer: str, name: str, seen: Tensor, exact: Tensor, oracle: OracleGemm) -> Observation:
    quality, expected = sqnr_db(exact, seen), sqnr_db(exact, oracle.result)
    if expected > HIGH_PRECISION_DB:  # from here on the rounding of the compute dtype speaks
        problem = "" if quality > HIGH_PRECISION_DB - 5 else _out_of_band(quality, expected, 2 * BAND_DB)
    else:
        problem = _out_of_band(quality, expected, 2 * BAND_DB)
    dtype = str(seen.dtype).removeprefix("torch.")
    return Observation(layer, name, "", "", dtype, None, None, quality, expected, problem)


def observe_layer(name: str, probe: LayerProbe, *, shared_weight: bool) -> list[Observation]:
    layer = probe.layer
    x, y, g = probe.matrix("x"), probe.matrix("y"), probe.matrix("g")
    if not isinstance(layer, QuantizedLinear) or x is None or y is None or g is None:
        what = (
            "is no QuantizedLinear"
            if not isinstance(layer, QuantizedLinear)
            else "did not run forward and backward"
        )
        return [
            Observation(name, "layer", "", "", "", None, None, math.nan, math.nan, f"{what} in the probe")
        ]
    weight = layer.weight.detach().to(torch.float32)
    gemms = linear_oracle(probe.recipe, Draws(layer.clock.counters, layer.stream), x, weight, g)
    exact = {"y": x @ weight.t(), "dx": g @ weight, "dW": g.t() @ x}
    bias = 0.0 if layer.bias is None else layer.bias.detach().to(torch.float32)
    seen = {"y": y - bias, "dx": probe.matrix("dx"), "dW": None if shared_weight else probe.matrix("dW")}
    observations = []
    for (gemm_name, gemm), result in zip(gemms.items(), ("y", "dx", "dW"), strict=True):
        if gemm_name == "dgrad" and seen["dx"] is None:
            continue  # the input needs no gradient: there is no such GEMM
        product = _executed(probe.products["forward" if gemm_name == "fprop" else "backward"], gemm)
        if product is None:
            shapes = f"{tuple(gemm.a.source.shape)} . {tuple(gemm.b.source.shape)}^T"
            problem = f"no matrix product {shapes} was executed"
            observations.append(
                Observation(name, gemm_name, "", "", "", None, None, math.nan, math.nan, problem)
            )
            continue
        for operand_name, operand, oracle in zip(
            gemm.names, (product.a, product.b), (gemm.a, gemm.b), strict=True
        ):
            observations.append(_observe_operand(name, operand_name, operand, product.kernel, oracle))
        found = seen[result]
        if found is not None:
            observations.append(_observe_result(name, result, found, exact[result], gemm))
    return observations
