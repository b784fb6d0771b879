"""The equations of a quantized linear layer in numpy, one block and one GEMM at a time: the tests' reference.

It shares no code with what it checks. From ``qtrain`` it reads the fields of specs and recipes, and the number
behind ``clip="gaussian"``. Scales and x / scale are float32, where their rounding decides codes; everything else is
float64. T tokens, I in, O out.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

f32, f64 = np.float32, np.float64

WORD = 2**32


def _mix(x: int, second: int = 0) -> int:
    x ^= x >> 16
    x = (x * 0x7FEB352D + second) % WORD
    x ^= x >> 15
    x = (x * 0x846CA68B) % WORD
    return x ^ (x >> 16)


DRAW_NUMBERS = {
    "fprop.input": 1,
    "fprop.weight": 2,
    "fprop.transform": 3,
    "dgrad.grad_output": 4,
    "dgrad.weight": 5,
    "dgrad.transform": 6,
    "wgrad.grad_output": 7,
    "wgrad.input": 8,
    "wgrad.transform": 9,
}


@dataclass(frozen=True)
class Moment:
    """What names the random bits: the clock's seed, step and token offset, and the layer's name."""

    seed: int = 0
    step: int = 0
    token_offset: int = 0
    name: str = "layer"

    def bits(self, draw: str, rows: int, columns: int, row_offset: int) -> np.ndarray:
        """[rows, columns] of 32 bits each."""
        stream = zlib.crc32(self.name.encode()) + DRAW_NUMBERS[draw] * 0x9E3779B9
        keys = []
        for start in (0x243F6A88, 0x85A308D3):
            word = _mix(self.seed % WORD ^ start)
            word = _mix((word + (self.seed >> 32)) % WORD)
            word = _mix(word ^ self.step % WORD)
            keys.append(_mix((word + stream) % WORD))
        out = np.empty((rows, columns), dtype=np.uint64)
        for r in range(rows):
            row = (r + row_offset) % WORD
            r0, r1 = _mix(row ^ keys[0]), _mix((row + keys[1]) % WORD)
            for c in range(columns):
                out[r, c] = _mix(c * 0x9E3779B9 % WORD ^ r0, r1)
        return out

    def noise(self, draw: str, rows: int, columns: int) -> np.ndarray:
        """Uniform [rows, columns] in [0, 1), by the layout that the tensor is stored in."""
        offset = 0 if draw.endswith("weight") else self.token_offset
        return (self.bits(draw, rows, columns, offset) >> np.uint64(8)).astype(f64) * 2.0**-24

    def signs(self, gemm: str, length: int) -> np.ndarray:
        return np.where(self.bits(f"{gemm}.transform", 1, length, 0)[0] >= 2**31, -1.0, 1.0)


def _float_magnitudes(exponent: int, mantissa: int, largest: float) -> np.ndarray:
    bias = 2 ** (exponent - 1) - 1
    values = [
        (f / 2**mantissa + (e > 0)) * 2.0 ** (max(e, 1) - bias)
        for e in range(2**exponent)
        for f in range(2**mantissa)
    ]
    return np.array([v for v in values if v <= largest])


FLOATS = {"e4m3": (4, 3, 448.0), "e5m2": (5, 2, 57344.0), "e2m1": (2, 1, 6.0)}


def grid(name: str, symmetric: bool) -> np.ndarray:
    """All levels, sorted, float64."""
    if name.startswith("int"):
        b = int(name[3:])
        return np.arange(-(2 ** (b - 1)), 2 ** (b - 1)).astype(f64) if symmetric else np.arange(2.0**b)
    if name.startswith("midrise"):
        b = int(name[7:])
        return np.arange(2**b) - (2**b - 1) / 2
    if name in FLOATS:
        magnitudes = _float_magnitudes(*FLOATS[name])
        return np.unique(np.concatenate([-magnitudes, magnitudes]))
    b = int(name.removeprefix("dynamic"))
    positive = [
        10.0 ** (d - b + 2) * (0.1 + 0.9 * (i + 0.5) / 2**d) for d in range(b - 1) for i in range(2**d)
    ]
    levels = np.array([0.0, 1.0, *positive, *(-p for p in positive)])
    return np.unique(levels.astype(f32)).astype(f64)


def round_to(
    v: np.ndarray, levels: np.ndarray, noise: np.ndarray | None, *, codebook: bool = False
) -> np.ndarray:
    """float64 -> the nearest level (ties to even rank as counted from zero; codebooks: to the lower level, at
    midpoints in float32), or up with the chance that makes it unbiased."""
    if codebook:
        middle = (levels.astype(f32)[1:] + levels.astype(f32)[:-1]) / f32(2)
        return levels[np.searchsorted(middle, v, side="left")]
    v = np.clip(v, levels[0], levels[-1])
    low = np.clip(np.searchsorted(levels, v, side="right") - 1, 0, len(levels) - 2)
    below, above = levels[low], levels[low + 1]
    fraction = (v - below) / (above - below)
    if noise is not None:
        return np.where(noise < fraction, above, below)
    zero = int(np.searchsorted(levels, 0.0))
    tie_up = (low + 1 - zero) % 2 == 0
    return np.where((fraction > 0.5) | ((fraction == 0.5) & tie_up), above, below)


@dataclass
class Grid:
    """An operand on its grid: x ~ values * scale, all [F, K]; inside: where its estimator passes the gradient."""

    values: np.ndarray
    scale: np.ndarray
    inside: np.ndarray | None

    @property
    def numbers(self) -> np.ndarray:
        return (self.values.astype(f32) * self.scale.astype(f32)).astype(f64)


def _range(block: np.ndarray, spec: Any) -> tuple[np.float32, np.float32]:
    kind, value = spec.clip_kind_and_value
    magnitudes = np.sort(np.abs(block).ravel())[::-1]
    left_out = math.floor(block.size * (100 - value) / 100 + 1e-6)
    if spec.symmetric:
        hi = magnitudes[0]
        if kind == "percentile":
            hi = magnitudes[left_out]
        elif kind == "rms":
            hi = f32(math.sqrt(float((block.astype(f64) ** 2).mean()))) * f32(value)
        return f32(-hi), f32(hi)
    assert kind in ("absmax", "mse")
    return min(block.min(), f32(0)), max(block.max(), f32(0))


def _scale(lo: np.float32, hi: np.float32, spec: Any, levels: np.ndarray) -> tuple[np.float32, np.float32]:
    """(scale, zero point) of a block, with one level of scales."""
    floor = f32(spec.min_scale)
    if not spec.symmetric:
        scale = max((hi - lo) / f32(levels[-1]), floor)
        return scale, np.clip(np.rint(-lo * (f32(1) / scale)), f32(0), f32(levels[-1]))
    scale = max(hi / f32(levels[-1]), floor)
    if spec.scale_format == "e8m0_ceil":
        scale = f32(2.0 ** math.ceil(math.log2(scale)))
    elif spec.scale_format == "e8m0":
        emax = math.floor(math.log2(levels[-1]))
        scale = f32(2.0 ** (math.floor(math.log2(max(hi, f32(floor * levels[-1])))) - emax))
    return scale, f32(0)


def quantize(x: np.ndarray, spec: Any, noise: np.ndarray | None = None) -> Grid:
    """x [F, K] float32 -> its grid, block by block."""
    x = x.astype(f32)
    levels = grid(spec.format, spec.symmetric)
    tiling = spec.blocks
    r, c = tiling.rows or x.shape[0], tiling.columns or x.shape[1]
    tiles = [
        (slice(i, min(i + r, x.shape[0])), slice(j, min(j + c, x.shape[1])))
        for i in range(0, x.shape[0], r)
        for j in range(0, x.shape[1], c)
    ]

    def on_grid(t: Any, scale: np.float32, zero: np.float32, u: np.ndarray | None) -> np.ndarray:
        v = x[t] * (f32(1) / scale) + zero
        if spec.format.startswith("midrise"):  # v + 1/2 in float32 decides
            half = (v + f32(0.5)).astype(f64)
            return round_to(half, levels + 0.5, u) - 0.5
        return round_to(v.astype(f64), levels, u, codebook="dynamic" in spec.format) - zero

    scales = {}
    for n, t in enumerate(tiles):
        lo, hi = _range(x[t], spec)
        if spec.clip == "mse":
            ratios, errors = [1.0 - i / 40 for i in range(33)], []
            for ratio in ratios:
                s, z = _scale(lo * f32(ratio), hi * f32(ratio), spec, levels)
                errors.append(float(((on_grid(t, s, z, None) * s - x[t]) ** 2).sum()))
            best = f32(ratios[int(np.argmin(errors))])
            lo, hi = lo * best, hi * best
        scales[n] = _scale(lo, hi, spec, levels)
    if spec.tensor_scale:
        magnitudes = _float_magnitudes(*FLOATS["e4m3"])
        top = max(max(s for s, _ in scales.values()) / f32(448), f32(2.0**-126))
        for n, (s, _) in scales.items():
            stored = round_to(np.array([s * (f32(1) / top)]).astype(f64), magnitudes, None)[0]
            scales[n] = (f32(max(stored, 2.0**-9)) * top, f32(0))

    values, scale = np.zeros(x.shape), np.zeros(x.shape)
    inside = None if spec.estimator == "ste" else np.zeros(x.shape, dtype=bool)
    for n, t in enumerate(tiles):
        s, zero = scales[n]
        values[t] = on_grid(t, s, zero, None if noise is None else noise[t])
        scale[t] = s
        if inside is not None:
            v = (x[t] * (f32(1) / s)).astype(f64)
            if spec.estimator == "trust":
                inside[t] = np.abs(values[t] - v) <= np.diff(levels).max() / 2
            else:
                slack = 2.0**-20 * levels[-1]
                inside[t] = (v + zero >= levels[0] - slack) & (v + zero <= levels[-1] + slack)
    return Grid(values, scale, inside)


def hadamard(block: int) -> np.ndarray:
    i = np.arange(block)
    popcount = np.vectorize(lambda n: bin(n).count("1"))
    return (-1.0) ** popcount(i[:, None] & i[None, :]) / math.sqrt(block)


def rotation(transform: Any, moment: Moment, gemm: str, length: int) -> np.ndarray:
    """R [K, K] with T(x) = x R."""
    if transform is None:
        return np.eye(length)
    blocks = np.kron(np.eye(length // transform.block), hadamard(transform.block))
    return np.diag(moment.signs(gemm, length)) @ blocks if transform.randomized else blocks


@dataclass
class Result:
    """value: float64. fp32: how far a float32 GEMM in another order of summation may lie. bf16: how far the
    layer may lie in bfloat16 (each rounding 2^-8 of what it rounds, see ``gemm``)."""

    value: np.ndarray
    fp32: np.ndarray
    bf16: np.ndarray


BF16_ROUNDING = 2.0**-8
"""Half the spacing 2^-7 of bfloat16 numbers in [1, 2)."""


def _dense(x: Any) -> np.ndarray:
    return np.array(torch.as_tensor(x).detach().to(torch.float64).tolist(), dtype=f64).reshape(x.shape)


class _Layer:
    def __init__(self, recipe: Any, moment: Moment) -> None:
        self.recipe, self.moment = recipe, moment

    def rotation(self, gemm: str, length: int) -> np.ndarray:
        return rotation(getattr(self.recipe, gemm).transform, self.moment, gemm, length)

    def grid(self, view: np.ndarray, name: str, *, stored_transposed: bool) -> Grid | None:
        spec = self.recipe.operands()[name]
        if spec is None:
            return None
        noise = None
        if spec.rounding == "stochastic":
            noise = self.moment.noise(name, *(view.shape[::-1] if stored_transposed else view.shape))
            noise = noise.T if stored_transposed else noise
        return quantize(view, spec, noise)

    def exact_in_bf16(self, name: str, *, reused: bool, fold: bool) -> bool:
        """Whether the operand enters a bfloat16 GEMM without rounding: codes with scales for the epilogue."""
        spec = self.recipe.resolved(name)
        if spec is None or "dynamic" in spec.format:
            return False
        if spec.granularity == "tensor":
            return True
        return spec.granularity == "row" and (fold or not reused)


def _multiply(a: np.ndarray, b: np.ndarray, roundings: int) -> Result:
    """a [M, K] . b [N, K]^T; roundings: how many of the two operands a bfloat16 GEMM rounds first."""
    y, magnitude = a @ b.T, np.abs(a) @ np.abs(b).T
    # Float32 GEMM: K products and K - 1 sums, each within 2^-24, in whatever order; scales and casts a few more
    fp32 = (a.shape[1] + 8) * 2.0**-24 * magnitude + 1e-37
    # bfloat16: the product and the result are rounded, then each rounded operand
    return Result(y, fp32, BF16_ROUNDING * (2.02 * np.abs(y) + 1.01 * roundings * magnitude) + fp32)


def _rotated_back(r: Result, rotation: np.ndarray) -> Result:
    """r R^T; an error spreads over a row, whose norm bounds it. The result is rounded once more."""

    def spread(bound: np.ndarray) -> np.ndarray:
        return np.repeat(np.linalg.norm(bound, axis=1, keepdims=True), bound.shape[1], axis=1)

    value = r.value @ rotation.T
    norm = spread(r.value)
    return Result(
        value,
        spread(r.fp32) + 2.0**-20 * norm,
        spread(r.bf16) + BF16_ROUNDING * np.abs(value) + 2.0**-20 * norm,
    )


def layer(
    recipe: Any, x: Any, weight: Any, bias: Any, g: Any, moment: Moment | None = None
) -> dict[str, Result]:
    """y [T, O], dx [T, I], dW [O, I], db [O] of the layer, from tensors x [T, I], weight, bias or None, g [T, O]."""
    at = _Layer(recipe, moment or Moment())
    x, weight, g = _dense(x), _dense(weight), _dense(g)
    tokens, in_features = x.shape
    out_features = weight.shape[0]

    R = at.rotation("fprop", in_features)
    xr, wr = x @ R, weight @ R
    xq = at.grid(xr, "fprop.input", stored_transposed=False)
    wq = at.grid(wr, "fprop.weight", stored_transposed=False)
    rounded = sum(not at.exact_in_bf16(n, reused=False, fold=False) for n in ("fprop.input", "fprop.weight"))
    y = _multiply(xr if xq is None else xq.numbers, wr if wq is None else wq.numbers, rounded)
    if bias is not None:
        b = _dense(bias)
        y = Result(y.value + b, y.fp32 + 2.0**-23 * np.abs(b), y.bf16 + BF16_ROUNDING * np.abs(b))

    def backward(
        gemm: str, other: str, g_view: np.ndarray, tensor: np.ndarray, forward: Grid | None, mask: Any
    ) -> Result:
        """One backward GEMM; g_view [F, K] without transform, tensor [K, F'] as stored."""
        reused = getattr(getattr(recipe, gemm), other) == "fprop"
        R_gemm = at.rotation(gemm, g_view.shape[1])
        spec = recipe.resolved(f"{gemm}.{other}")
        fold = False
        if reused:
            assert forward is not None
            b, a_view = forward.numbers.T, g_view
            quantized = recipe.resolved(f"{gemm}.grad_output") is not None
            if quantized and spec.granularity == "row" and "dynamic" not in spec.format:
                fold = True  # the scale per row of the forward's operand goes into the gradient
                b = forward.values.T
                a_view = (g_view.astype(f32) * forward.scale[:, 0].astype(f32)).astype(f64)
        else:
            a_view, b_view = g_view @ R_gemm, tensor.T @ R_gemm
            q = at.grid(b_view, f"{gemm}.{other}", stored_transposed=True)
            b = b_view if q is None else q.numbers
        gq = at.grid(a_view, f"{gemm}.grad_output", stored_transposed=gemm == "wgrad")
        rounded = sum(
            (
                not at.exact_in_bf16(f"{gemm}.grad_output", reused=False, fold=False),
                not at.exact_in_bf16(f"{gemm}.{other}", reused=reused, fold=fold),
            )
        )
        d = _multiply(a_view if gq is None else gq.numbers, b, rounded)
        if recipe.fprop.transform is None:
            return d if mask is None else Result(*(part * mask for part in (d.value, d.fp32, d.bf16)))
        if not reused:
            if mask is None:
                return d
            d = _rotated_back(d, R.T)
        if mask is not None:
            d = Result(*(part * mask for part in (d.value, d.fp32, d.bf16)))
        return _rotated_back(d, R)

    dx = backward("dgrad", "weight", g, weight, wq, None if xq is None else xq.inside)
    dw = backward("wgrad", "input", g.T, x, xq, None if wq is None else wq.inside)
    db = g.sum(0)
    db_bound = (tokens + 8) * 2.0**-24 * np.abs(g).sum(0)
    assert (dx.value.shape, dw.value.shape) == ((tokens, in_features), (out_features, in_features))
    return {"y": y, "dx": dx, "dW": dw, "db": Result(db, db_bound, db_bound)}
