"""Quantization in numpy, block after block, cut out by slices; and the specs and the operand that are held to it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from qtrain.quant import QuantSpec, get_format

F32 = np.float32


def spec_of(text: str, **changes: object) -> QuantSpec:
    """A spec of QuantSpec's fields written as ``field=value`` words after the format."""
    name, *words = text.split()
    values: dict[str, object] = dict(word.split("=") for word in words)
    if "symmetric" in values:
        values["symmetric"] = values["symmetric"] == "True"
    if "tensor_scale" in values:
        values["tensor_scale"] = values["tensor_scale"] == "True"
    return QuantSpec(**{"format": name, **values, **changes})


def slices(granularity: str, shape: tuple[int, int]) -> dict[tuple[int, int], tuple[slice, slice]]:
    """Where each scale's elements lie."""
    F, K = shape
    kind, _, size = granularity.partition(":")
    r, c = {
        "tensor": lambda: (F, K),
        "row": lambda: (1, K),
        "column": lambda: (F, 1),
        "group": lambda: (1, int(size)),
        "block": lambda: tuple(int(n) for n in size.split("x")),
    }[kind]()
    return {
        (i // r, j // c): (slice(i, min(i + r, F)), slice(j, min(j + c, K)))
        for i in range(0, F, r)
        for j in range(0, K, c)
    }


def round_to_grid(v: np.ndarray, name: str, asymmetric: bool) -> np.ndarray:
    """Nearest, from the definition of each family."""
    if asymmetric:
        return np.clip(np.rint(v), 0, 2 ** int(name[-1]) - 1)
    if name.startswith("uint"):
        return np.clip(np.rint(v), 0, 2 ** int(name[-1]) - 1)
    if name.startswith("int"):
        half = 2 ** (int(name[-1]) - 1)
        return np.clip(np.rint(v), -half, half - 1)
    if name.startswith("midrise"):
        end = (2 ** int(name[-1]) - 1) / 2
        return np.clip(np.rint(v + F32(0.5)) - F32(0.5), -end, end)
    if name in ("e4m3", "e5m2"):
        dtype, end = {"e4m3": (torch.float8_e4m3fn, 448), "e5m2": (torch.float8_e5m2, 57344)}[name]
        return torch.from_numpy(np.clip(v, -end, end)).to(dtype).to(torch.float32).numpy()
    levels = get_format(name).levels().double().numpy()
    tie = np.arange(len(levels)) * 1e-15  # to the lower level; e2m1's ties are not met by random numbers
    return levels[(np.abs(v.astype(np.float64)[..., None] - levels) + tie).argmin(-1)].astype(F32)


def reference_range(block: np.ndarray, spec: QuantSpec) -> tuple[np.floating, np.floating]:
    """(lo, hi) of one block."""
    kind, _, number = spec.clip.partition(":")
    if spec.clip == "gaussian":
        kind, number = "rms", {"int4": 2.370256, "midrise4": 2.514005, "e2m1": 2.922476}[spec.format]
    n = block.size
    left_out = int(n * (100 - float(number)) / 100 + 1e-9) if kind == "percentile" else 0
    if spec.symmetric:
        if kind == "rms":
            hi = F32(math.sqrt(np.mean(np.square(block.astype(np.float64)))) * float(number))
        else:
            hi = np.sort(np.abs(block).ravel())[n - 1 - left_out]
        return -hi, hi
    ordered = np.sort(block.ravel())
    return min(ordered[left_out], F32(0)), max(ordered[n - 1 - left_out], F32(0))


def grid_end(spec: QuantSpec) -> float:
    """The largest grid value."""
    name = spec.format
    if not spec.symmetric or name.startswith("uint"):
        return 2 ** int(name[-1]) - 1
    if name.startswith("int"):
        return 2 ** (int(name[-1]) - 1) - 1
    if name.startswith("midrise"):
        return (2 ** int(name[-1]) - 1) / 2
    return {"e4m3": 448, "e5m2": 57344, "e2m1": 6}.get(name, 1)


def reference_scales(ranges: dict, spec: QuantSpec) -> dict:
    """Range of each block -> its scale, from the definitions of the scale formats."""
    end = grid_end(spec)

    def plain(lo: np.floating, hi: np.floating) -> np.floating:
        width = hi if spec.symmetric else hi - lo
        return max(F32(width) / F32(end), F32(spec.min_scale))

    def e4m3(s: np.floating) -> np.floating:
        cast = torch.tensor(min(float(s), 448.0)).to(torch.float8_e4m3fn).to(torch.float32).item()
        return F32(max(cast, 2.0**-9))

    scales = {at: plain(*r) for at, r in ranges.items()}
    if spec.scale_format == "e8m0":
        emax = math.floor(math.log2(end))
        return {
            at: F32(2.0 ** (math.floor(math.log2(max(r[1], spec.min_scale * end))) - emax))
            for at, r in ranges.items()
        }
    if spec.scale_format == "e8m0_ceil":
        return {at: F32(2.0 ** math.ceil(math.log2(s))) for at, s in scales.items()}
    if spec.tensor_scale:
        top = F32(max(scales.values()) / F32(448))
        return {at: e4m3(s * (F32(1) / top)) * top for at, s in scales.items()}
    if spec.scale_format == "e4m3":
        return {at: e4m3(s) for at, s in scales.items()}
    return scales


class Reference(NamedTuple):
    values: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    v: np.ndarray  # x / scale + zero point, before rounding


def on_grid(x: np.ndarray, ranges: dict, scales: dict, spec: QuantSpec) -> Reference:
    cut = slices(spec.granularity, x.shape)
    grid_shape = tuple(1 + max(at[axis] for at in cut) for axis in (0, 1))
    values, v = np.zeros_like(x), np.zeros_like(x)
    scale, zero = np.zeros(grid_shape, F32), np.zeros(grid_shape, F32)
    for at, place in cut.items():
        inverse = F32(1) / F32(scales[at])
        if not spec.symmetric:
            zero[at] = np.clip(np.rint(-ranges[at][0] * inverse), 0, grid_end(spec))
        scale[at] = scales[at]
        v[place] = x[place] * inverse + zero[at]
        values[place] = round_to_grid(v[place], spec.format, not spec.symmetric) - zero[at]
    return Reference(values, scale, zero, v)


def reference(x: np.ndarray, spec: QuantSpec) -> Reference:
    cut = slices(spec.granularity, x.shape)
    ranges = {at: reference_range(x[place], spec) for at, place in cut.items()}
    if spec.clip == "mse":
        ratios = [F32(1 - i / 40) for i in range(33)]
        errors: dict[tuple[int, int], list[float]] = {at: [] for at in cut}
        for ratio in ratios:
            shrunk = {at: (lo * ratio, hi * ratio) for at, (lo, hi) in ranges.items()}
            q = on_grid(x, shrunk, reference_scales(shrunk, spec), spec)
            for at, place in cut.items():
                error = q.values[place].astype(np.float64) * q.scale[at] - x[place]
                errors[at].append(float(np.square(error).sum()))
        best = {at: ratios[int(np.argmin(e))] for at, e in errors.items()}
        ranges = {at: (lo * best[at], hi * best[at]) for at, (lo, hi) in ranges.items()}
    return on_grid(x, ranges, reference_scales(ranges, spec), spec)


def operand(F: int = 7, K: int = 13, seed: int = 0) -> torch.Tensor:
    """Normal numbers with rows of unlike magnitude, a zero row, an outlier and a block of one sign."""
    x = torch.randn(F, K, generator=torch.Generator().manual_seed(seed))
    x = x * torch.tensor([1.0, 1e-3, 30.0, 1.0, 0.0, 1e5, 0.2]).repeat(F // 7 + 1)[:F, None]
    x[0, K // 2] = 400.0
    x[3:4] = x[3:4].abs() + 0.1
    return x


GRANULARITIES = [
    "tensor",
    "row",
    "column",
    "group:4",
    "group:1",
    "group:32",
    "block:2x3",
    "block:3x5",
    "block:9x9",
]
FORMATS = ["int2", "int4", "int8", "uint4", "midrise1", "midrise4", "e4m3", "e5m2", "e2m1"]
FORMATS += ["dynamic4", "dynamic8", "dynamic8_unsigned", "linear4_nozero"]
SPECS = [
    *(f"{f} granularity={g}" for f in ("int4", "e2m1") for g in GRANULARITIES),
    *(f"{f} granularity=row" for f in FORMATS),
    *(f"{f} granularity=group:4" for f in FORMATS),
    *(f"int4 granularity={g} symmetric=False" for g in GRANULARITIES),
    *(f"int{b} granularity=block:2x3 symmetric=False" for b in (2, 3, 8)),
    *(
        f"int4 granularity={g} clip={c}"
        for g in ("tensor", "row", "column", "group:4", "block:3x5")
        for c in ("percentile:90", "percentile:50", "percentile:100", "mse", "rms:1.5", "gaussian")
    ),
    *(
        f"int4 granularity={g} clip={c} symmetric=False"
        for g in ("tensor", "row", "column", "group:4", "block:3x5")
        for c in ("percentile:90", "percentile:75", "mse")
    ),
    *(f"{f} granularity=group:4 clip=mse" for f in ("e2m1", "midrise4", "int8", "dynamic4")),
    *(f"{f} granularity=row clip=gaussian" for f in ("e2m1", "midrise4")),
    *(
        f"{f} granularity={g} scale_format={s}"
        for f in ("int8", "e4m3", "e2m1", "e5m2")
        for g in ("row", "group:4")
        for s in ("e8m0", "e8m0_ceil", "e4m3", "e4m3 tensor_scale=True")
    ),
    *(
        f"e2m1 granularity={g} scale_format={s} clip=mse"
        for g in ("tensor", "block:2x3")
        for s in ("e8m0", "e8m0_ceil", "e4m3", "e4m3 tensor_scale=True")
    ),
    "e2m1 granularity=group:4 scale_format=e8m0 clip=rms:2.5",
    "midrise4 granularity=group:4 scale_format=e8m0",
    "int4 granularity=tensor scale_format=e4m3 tensor_scale=True clip=percentile:90",
]
