"""Observations: an operand or a result of a GEMM as it was seen, against what the oracle says it must be.

distinct    an operand of a b-bit format shows at most 2^b values under one scale
agreement   of an operand: the share of its elements that are the oracle's, up to one factor a row, which an
            epilogue can carry, and a rounding to the compute dtype. Of y, dx, dW: the share of elements that follow
            from the product that was seen to execute, the oracle's scales, masks and transforms applied to it. So
            a product that executes beside the real one, with the right operands, proves nothing.
native      where it is configured, the low-precision product must have executed, its rows be the reference's, and y, dx,
            dW be what it gave out, to the bit. Of int8 its rows are to the bit as well: neither a bf16 product inside of
            the op nor one beside it passes. Of fp8, whose sums may err more than those of bf16 units, a bf16 product
            inside of the op is seen by its counters alone (``op.executions``).
sqnr_db     of each operand against what was to be quantized: two-sided, within a band around the oracle's. Too
            good fails as well: nothing was quantized. (Of y, dx, dW, against the unquantized products, it is
            shown only: roundings of bfloat16 speak in it where a bias or a sum cancels.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from qtrain_kernels.counter_hash import stream_id
from torch import Tensor

from qtrain.quant import LinearRecipe, QuantSpec

from .clock import Draws
from .linear import QuantizedLayer
from .native_ops import runs_natively
from .oracle import OracleGemm, OracleOperand, linear_oracle
from .probe import Call, LayerProbe, Product

BAND_DB = 0.5
"""Half width of the band around the oracle's SQNR. Codes agree but for elements within a bf16 rounding of a
threshold; a spec that differs in one bit, its granularity or its clip moves the SQNR by 1 dB or more."""

HIGH_PRECISION_DB = 45.0
"""What an operand that is not quantized must reach: a rounding to bfloat16 errs by at most 2^-8, 48.2 dB, and two
by 45.1 at worst (one gives 52 to 56 dB, and int8 per row of a transformed tensor 41 to 45)."""

OTHER_CODES = 1e-3
"""Share of an operand's elements that may differ from the oracle's, though one element always may: of values that a
transform computes in another order of summation, about one in 10^5 lies so near a threshold that its code flips.
Noise of another step changes every fourth code or more."""

OTHER_RESULTS = 1e-4
"""Share of a result's elements that need not follow from the product that was seen, though one always may: masks
flip as rarely as codes do."""

PROLOGUE_ROUNDINGS = 4.0
"""Of a gradient that a prologue's derivative turns into that of its inputs: dx is rounded, then dx * up or dx * f(gate),
whose factor was rounded, and the result."""

SAMPLED_BLOCKS = 512
"""How many scales of an operand are searched for distinct values, evenly spaced."""


@dataclass(frozen=True)
class Observation:
    """One operand or result of one GEMM of one layer, as it was seen.

    name: ``fprop.input`` .. ``wgrad.input``, or ``y``, ``dx``, ``dW``. distinct: the most values seen under one
    scale, of at most ``levels`` (None: not quantized). sqnr_db against the high-precision tensor, expected_db the
    oracle's. problem: empty, or what is wrong. agreement: the share of elements that are as they must be.
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
    agreement: float = math.nan


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10(sum r^2 / sum (r - a)^2), float64; inf where they are equal; of a reference of
    zeros nan, or -inf if the approximation is not zero."""
    r, a = reference.to(torch.float64), approximation.to(torch.float64)
    power, error = float(r.square().sum()), float((r - a).square().sum())
    if power == 0.0:
        return math.nan if error == 0.0 else -math.inf
    return math.inf if error == 0.0 else 10.0 * math.log10(power / error)


def _tiles(matrix: Tensor, spec: QuantSpec, filler: float) -> Tensor:
    """[F, K] -> [blocks, elements under one scale]; ragged ends hold ``filler``."""
    tiling = spec.blocks
    marks = tiling.blocks(torch.ones_like(matrix, dtype=torch.float32)).permute(0, 2, 1, 3)
    tiles = tiling.blocks(matrix.to(torch.float32)).permute(0, 2, 1, 3)
    tiles = torch.where(marks > 0, tiles, filler)
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], tiles.shape[2] * tiles.shape[3])


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
    power = v.square().sum(1, keepdim=True)
    return v * torch.where(power > 0, (v * s).sum(1, keepdim=True) / power, 0.0)


def _cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.to(torch.float32), b.to(torch.float32)
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-30))


def _executed(products: list[Product], gemm: OracleGemm) -> Product | None:
    """The product with the operands' shapes that is most like them (a transform is a product as well)."""
    shapes = gemm.a.source.shape, gemm.b.source.shape
    fitting = [p for p in products if (p.a.shape, p.b.shape) == shapes]
    return max(fitting, key=lambda p: _cosine(p.a, gemm.a.source) + _cosine(p.b, gemm.b.source), default=None)


def _out_of_band(seen: float, expected: float, band: float) -> str:
    if min(seen, expected) > 60.0 or abs(seen - expected) <= band or seen == expected:
        return ""
    if math.isnan(seen) and math.isnan(expected):
        return ""
    kind = "too good: not quantized as configured" if seen > expected else "too bad"
    return f"SQNR {seen:.1f} dB, expected {expected:.1f} +- {band} dB ({kind})"


def _rounding(*dtypes: torch.dtype) -> float:
    """The relative error of one rounding to the coarsest of these dtypes; of float32: of a few."""
    return 2.0**-8 if torch.bfloat16 in dtypes else 2.0**-18


def _share(seen: Tensor, wanted: Tensor, tolerance: Tensor) -> tuple[float, int]:
    """(share of elements within the tolerance, how many are not); NaN is at its place where NaN is wanted."""
    fits = ((seen - wanted).abs() <= tolerance) | (seen.isnan() & wanted.isnan()) | (seen == wanted)
    others = fits.numel() - int(fits.sum())
    return 1.0 - others / max(fits.numel(), 1), others


def _row_factors(seen: Tensor, wanted: Tensor) -> Tensor:
    """The least-squares factor of each row of ``seen`` towards ``wanted``, [F, 1]; 1 for a row of zeros. A second
    fit leaves out what the first shows to be another number."""
    near = torch.ones_like(wanted)
    for _ in range(2):
        power = (seen.square() * near).sum(1, keepdim=True)
        factor = torch.where(power > 0, (seen * wanted * near).sum(1, keepdim=True) / power, 1.0)
        near = ((seen * factor - wanted).abs() <= 0.3 * wanted.abs()).to(torch.float32)
    return factor


@dataclass(frozen=True)
class _Seen:
    """An operand as it was seen, beside the oracle's. factors: [F, 1] each, what an epilogue may have to multiply
    into it (two where a scale is so near to one that rounding hides it). exact: whether it is the oracle's without
    rounding, up to such a factor, as codes are."""

    factors: list[Tensor]
    exact: bool
    agreement: float
    problem: str


def _as_multiplied(seen: Tensor, oracle: OracleOperand, *, twice_rounded: bool) -> _Seen:
    """[F, K]; twice_rounded: before a transform and after it."""
    wanted, numbers = oracle.multiplied, seen.to(torch.float32)
    allowed = max(1.0, OTHER_CODES * numbers.numel())
    row = wanted.square().mean(1, keepdim=True).sqrt().nan_to_num()
    # What a transform cancels keeps the absolute error of its sums
    sums = 2.0**-18 * row
    factor = _row_factors(numbers, wanted)
    agreement, others = _share(numbers * factor, wanted, 2.0**-18 * wanted.abs() + sums)
    factors, exact = ([factor], True) if others <= allowed else ([], False)
    rounding = _rounding(seen.dtype)
    tolerance = 1.01 * rounding * wanted.abs() + sums + (4 * rounding * row if twice_rounded else 0.0)
    as_it_is, others = _share(numbers, wanted, tolerance)
    if others <= allowed or not factors:
        factors.append(torch.ones_like(factor))
    agreement = max(agreement, as_it_is)
    if exact or others <= allowed:
        return _Seen(factors, exact, agreement, "")
    what = "the high-precision operand" if oracle.spec is None else "what this spec makes of its source"
    return _Seen(factors, exact, agreement, f"{others} of {seen.numel()} elements are not those of {what}")


def _observe_operand(
    layer: str, name: str, seen: Tensor, kernel: str, oracle: OracleOperand, *, transformed: bool
) -> tuple[Observation, list[Tensor]]:
    dtype, spec, source = str(seen.dtype).removeprefix("torch."), oracle.spec, oracle.source
    match = _as_multiplied(seen, oracle, twice_rounded=transformed and spec is None)
    problem = match.problem
    if spec is None:
        quality = sqnr_db(source, seen)
        if quality < HIGH_PRECISION_DB:
            problem = f"SQNR {quality:.1f} dB: configured as high precision, which keeps {HIGH_PRECISION_DB}"
        found = Observation(
            layer, name, "none", kernel, dtype, None, None, quality, math.inf, problem, match.agreement
        )
        return found, match.factors
    rounded = oracle.multiplied.to(seen.dtype)
    if oracle.transposed:  # the spec tiles the layout of the forward
        seen, source, rounded = seen.t(), source.t(), rounded.t()
    entered = oracle.values if match.exact else rounded
    tiles = _tiles(source, spec, 0.0)
    quality = sqnr_db(tiles, rescaled(seen, source, spec))
    expected = sqnr_db(tiles, rescaled(entered, source, spec))
    distinct, levels = most_distinct(seen, spec), 2**spec.bits
    if distinct > levels:
        problem = f"{distinct} distinct values under one scale, {levels} allowed"
    problem = _out_of_band(quality, expected, BAND_DB) or problem
    found = Observation(
        layer, name, str(spec), kernel, dtype, distinct, levels, quality, expected, problem, match.agreement
    )
    return found, match.factors


def _observe_result(
    layer: str,
    name: str,
    seen: Tensor,
    exact: Tensor,
    oracle: Tensor,
    follows: Tensor,
    bias: Tensor,
    rounding: float,
    *,
    slack: Tensor | None,
    mixes: bool,
) -> Observation:
    """seen, exact, oracle, follows: without bias; ``follows`` is what the product that executed must give, up to
    ``slack`` and roundings. mixes: whether a transform mixes the elements of a row."""
    quality, expected = sqnr_db(exact, seen - bias), sqnr_db(exact, oracle)
    problem = ""
    given = follows + bias
    # float32 sums of the epilogue; a transform spreads the roundings of a row, of 1/5 of the bound each, over it
    row = follows.square().mean(1, keepdim=True).sqrt().nan_to_num()
    tolerance = rounding * 1.01 * given.abs() + 2.0**-18 * (follows.abs() + bias.abs() + row)
    if mixes:
        tolerance = tolerance + 4 * rounding * row
    if slack is not None:
        tolerance = tolerance + slack
    agreement, others = _share(seen, given, tolerance)
    if others > max(1.0, OTHER_RESULTS * seen.numel()):
        problem = f"{others} of {seen.numel()} elements do not follow from the product that was executed"
    dtype = str(seen.dtype).removeprefix("torch.")
    return Observation(layer, name, "", "", dtype, None, None, quality, expected, problem, agreement)


def missing(layer: str, what: str) -> Observation:
    """Something that was to be seen and was not."""
    return Observation(layer, "layer", "", "", "", None, None, math.nan, math.nan, f"{what} in the probe")


def observe_layer(
    name: str, recipe: LinearRecipe, probe: LayerProbe, *, native: bool = False
) -> list[Observation]:
    """Every passage through the layer that is called ``name`` and must follow ``recipe``, natively or simulated."""
    layer = probe.layer
    if not isinstance(layer, QuantizedLayer):
        return [missing(name, "is no QuantizedLinear")]
    if not any("g" in call.edges for call in probe.calls):
        return [missing(name, "did not run forward and backward")]
    calls = [call for call in probe.calls if "y" in call.edges]
    return [o for call in calls for o in _observe_call(name, layer, recipe, call, native)]


def _computed_otherwise(call: Call, result: str, product: Product, native: bool) -> str:
    """What is wrong with the way in which a GEMM was computed, whatever its numbers."""
    if not native:
        return "" if product.native is None else "computed natively, configured as simulated"
    dtype = str(product.a.dtype).removeprefix("torch.")
    if product.native is None:
        return f"computed by {product.kernel} on {dtype}, configured as native"
    if product.wrong:
        return f"{product.wrong} rows that {product.kernel} gave out are not the product of its {dtype} codes"
    seen = call.given_out(result)
    assert seen is not None
    dtype_out = call.edges["x" if result == "dx" else result].dtype
    given = call.through(result, product.native.to(dtype_out).to(torch.float32))
    others = int(((seen != given) & ~(seen.isnan() & given.isnan())).sum())
    return f"{others} of {seen.numel()} elements are not what {product.kernel} gave out" if others else ""


def _observe_call(
    name: str, layer: QuantizedLayer, recipe: LinearRecipe, call: Call, native: bool
) -> list[Observation]:
    x, weight, y, g = (call.matrix(edge) for edge in ("x", "weight", "y", "g"))
    assert x is not None
    assert weight is not None
    assert y is not None
    # Not the layer's own clock and stream: its bits are those of the report's clock and of its name
    gemms = linear_oracle(recipe, Draws(call.counters, stream_id(name)), x, weight, g, call.given)
    exact = {"y": x @ weight.t()}
    if g is not None:
        exact |= {"dx": g @ weight, "dW": g.t() @ x}
    nothing = weight.new_zeros(())
    entered_bias = call.matrix("bias")
    bias = nothing if entered_bias is None else entered_bias
    needed = {"fprop": True, "dgrad": call.needs_dx, "wgrad": layer.weight.requires_grad}
    observations = []
    for (gemm_name, gemm), result in zip(gemms.items(), ("y", "dx", "dW"), strict=False):
        if not needed[gemm_name]:
            continue
        product = _executed(call.forward if gemm_name == "fprop" else call.backward, gemm)
        seen = call.given_out(result)
        if product is None or seen is None:
            shapes = f"{tuple(gemm.a.source.shape)} . {tuple(gemm.b.source.shape)}^T"
            problem = (
                f"no {result} was given out" if seen is None else f"no matrix product {shapes} was executed"
            )
            observations.append(
                Observation(name, gemm_name, "", "", "", None, None, math.nan, math.nan, problem)
            )
            continue
        factors = []
        for operand_name, operand, oracle in zip(
            gemm.names, (product.a, product.b), (gemm.a, gemm.b), strict=True
        ):
            transformed = getattr(recipe, gemm_name).transform is not None
            observation, of_operand = _observe_operand(
                name, operand_name, operand, product.kernel, oracle, transformed=transformed
            )
            observations.append(observation)
            factors.append(of_operand)
        out, slack = product.out.to(torch.float32), product.slack
        pairs = [a * b.t() for a in factors[0] for b in factors[1]]
        follow = [gemm.given_out(out * pair) for pair in pairs]
        slacks = [None if slack is None else call.through(result, slack * pair.abs()).abs() for pair in pairs]
        of_result = call.edges["x" if result == "dx" else result].dtype
        rounding = _rounding(call.edges["y"].dtype, of_result, product.out.dtype)
        if result == "dx" and call.prologue is not None:
            rounding *= PROLOGUE_ROUNDINGS
        added = bias if result == "y" else nothing
        if product.added:
            follow = [follows - added for follows in follow]
        unrounded, oracle_result = (call.through(result, t) for t in (exact[result], gemm.result))
        found = [
            _observe_result(
                name, result, seen, unrounded, oracle_result, call.through(result, follows), added, rounding,
                slack=slack, mixes=gemm.mixes,
            )
            for follows, slack in zip(follow, slacks, strict=True)
        ]  # fmt: skip
        best = max(found, key=lambda o: (not o.problem, o.agreement))
        otherwise = _computed_otherwise(call, result, product, native and runs_natively(recipe, gemm_name))
        observations.append(replace(best, problem=otherwise or best.problem))
    if g is not None and layer.bias is not None and layer.bias.requires_grad:
        observations.append(_observe_bias(name, call, g))
    return observations


def _observe_bias(name: str, call: Call, g: Tensor) -> Observation:
    """db = sum of g over the tokens, in whatever order."""
    seen, exact = call.matrix("db"), g.sum(0, keepdim=True)
    if seen is None:
        return Observation(name, "db", "", "", "", None, None, math.nan, math.nan, "no db was given out")
    rounding = _rounding(call.edges["db"].dtype, call.edges["y"].dtype)
    tolerance = rounding * exact.abs() + 2.0**-16 * g.abs().sum(0, keepdim=True)
    agreement, others = _share(seen, exact, tolerance)
    problem = f"{others} of {seen.numel()} elements are not the sum of the gradient" if others else ""
    return Observation(
        name, "db", "", "", "float32", None, None, sqnr_db(exact, seen), math.inf, problem, agreement
    )
