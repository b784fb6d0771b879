"""Quantized operands and packed tensors against a slow reference: numpy, block after block, cut out by slices."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qtrain.quant import (
    QTensor,
    QuantSpec,
    dequantize,
    dequantize_values,
    fake_quantize,
    get_format,
    pack,
    quantize,
    quantize_values,
    unpack,
)
from qtrain.quant.formats import CodebookFormat
from qtrain.quant.qtensor import grid_values, to_qtensor

PROFILE = settings(deadline=None, derandomize=True, max_examples=60)
INF, NAN = float("inf"), float("nan")
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


# --- the reference ----------------------------------------------------------------------------------------------


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
EXACT = ("absmax", "percentile:50", "percentile:75", "percentile:90", "percentile:100")


def squared_error(x: np.ndarray, values: np.ndarray, scale: np.floating) -> float:
    return float(np.square(values.astype(np.float64) * float(scale) - x).sum())


@pytest.mark.parametrize("text", SPECS)
def test_equals_the_slow_reference(text):
    """Values bit for bit; scales too where they are a quotient of elements (a root mean square is a sum)."""
    spec = spec_of(text)
    x = operand()
    want = reference(x.numpy(), spec)
    q = quantize_values(x, spec)
    assert q.values.dtype == q.scale.dtype == torch.float32
    assert q.values.shape == x.shape
    assert q.inside is None
    got_values, got_scale = q.values.numpy(), q.scale.numpy()
    if spec.symmetric:
        assert q.zero_point is None
    if spec.clip == "mse":
        # sums in float32 may prefer another ratio, but no worse one (12 digits below the block: exact zeros)
        for at, place in slices(spec.granularity, (7, 13)).items():
            block = x.numpy()[place]
            ours = squared_error(block, got_values[place], got_scale[at])
            best = squared_error(block, want.values[place], want.scale[at])
            assert ours <= best * (1 + 1e-5) + 1e-12 * np.square(block.astype(np.float64)).sum()
            if got_scale[at] == want.scale[at]:
                assert np.array_equal(got_values[place], want.values[place])
        assert (got_scale == want.scale).mean() > 0.5
    elif spec.clip in EXACT:
        assert np.array_equal(got_scale, want.scale)
        assert np.array_equal(got_values, want.values)
        assert spec.symmetric or np.array_equal(q.zero_point.numpy(), want.zero_point)
    else:
        np.testing.assert_allclose(got_scale, want.scale, rtol=2e-6)
        # a scale one unit in the last place off may move a number across a midpoint
        assert (got_values != want.values).sum() <= 1
    if spec.tensor_scale:
        assert q.tensor_scale.shape == ()
        assert torch.equal(q.block_scale * q.tensor_scale, q.scale)
        stored = q.block_scale
    else:
        assert q.tensor_scale is None
        assert torch.equal(q.block_scale, q.scale)
        stored = q.scale
    if spec.scale_format == "e4m3":
        assert torch.equal(stored.to(torch.float8_e4m3fn).to(torch.float32), stored)
    if spec.scale_format.startswith("e8m0"):
        assert bool((torch.frexp(stored).mantissa == 0.5).all())


@pytest.mark.parametrize("text", SPECS)
def test_packed_and_back_is_fake_quantize(text):
    spec = spec_of(text)
    for x in (
        operand(),
        operand(3, 1),
        operand(1, 9),
        operand()[0, 0],
        operand()[1],
        operand(12, 5).reshape(2, 6, 5),
    ):
        packed = quantize(x, spec)
        back = dequantize(packed)
        assert back.dtype == torch.float32
        assert back.shape == x.shape == torch.Size(packed.shape)
        assert torch.equal(back, fake_quantize(x, spec))
        assert packed.codes.dtype == torch.uint8
        assert packed.codes.shape[:-1] == x.shape[:-1]


@pytest.mark.parametrize("text", SPECS)
def test_invariant_of_the_parts(text):
    """x ~ (codes - zero_point) * scale, block by block, from the tensors that are held."""
    spec = spec_of(text)
    x = operand()
    packed = quantize(x, spec)
    codes = unpack(packed.codes, spec.bits, x.shape[1])
    assert int(codes.max()) < 2**spec.bits
    values = spec.number_format.decode(codes).numpy()
    scale = packed.scale
    if spec.scale_format == "e4m3":
        scale = scale.view(torch.float8_e4m3fn)
    elif spec.scale_format != "float32":
        scale = 2.0 ** (scale.to(torch.float32) - 127)
    scale = scale.to(torch.float32).numpy()
    want = np.zeros_like(values)
    for at, place in slices(spec.granularity, tuple(x.shape)).items():
        zero = 0.0 if packed.zero_point is None else float(packed.zero_point[at])
        top = 1.0 if packed.tensor_scale is None else packed.tensor_scale.numpy()
        want[place] = (values[place] - F32(zero)) * F32(scale[at] * F32(top))
    assert np.array_equal(dequantize(packed).numpy(), want)
    inner_values, inner_scale = grid_values(packed)
    q = quantize_values(x, spec)
    assert torch.equal(inner_values, q.values)
    assert torch.equal(inner_scale, q.scale)
    assert torch.equal(dequantize_values(inner_values, inner_scale, spec), dequantize(packed))
    assert torch.equal(to_qtensor(q, spec, (7, 13)).codes, packed.codes)


@pytest.mark.parametrize("text", SPECS)
def test_error_bound(text):
    """Within the range: half of the widest step. Everywhere: what is clipped goes to an end of the grid."""
    spec = spec_of(text)
    grid = spec.number_format
    x = operand()
    q = quantize_values(x, spec)
    scale = spec.blocks.expand(q.scale, (7, 13))
    zero = torch.zeros(()) if q.zero_point is None else spec.blocks.expand(q.zero_point, (7, 13))
    v = x.double() / scale.double() + zero
    low, high = grid.levels()[0].item(), grid.levels()[-1].item()
    inside = (v >= low) & (v <= high)
    error = (q.values + zero - v).abs()
    assert bool((error[inside] <= grid.widest_gap / 2 * (1 + 1e-5)).all())
    on = (q.values + zero)[~inside]
    assert bool((on == torch.where(v[~inside] < low, low, high)).all())


@pytest.mark.parametrize("text", [s for s in SPECS if "midrise" not in s and "nozero" not in s])
def test_zero_stays_zero(text):
    spec = spec_of(text)
    x = operand()
    x[:, ::3] = 0.0
    assert bool((fake_quantize(x, spec)[x == 0] == 0).all())
    zeros = torch.zeros(3, 9)
    q = quantize_values(zeros, spec)
    assert bool((q.scale > 0).all())
    assert torch.equal(dequantize(quantize(zeros, spec)), zeros)


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_poisons_its_block_and_nothing_else(text, bad):
    spec = spec_of(text)
    for at in ((0, 0), (4, 12), (6, 5)):
        x = operand()
        clean = fake_quantize(x, spec)
        x[at] = bad
        want = torch.zeros(7, 13, dtype=torch.bool)
        for place in slices(spec.granularity, (7, 13)).values():
            want[place] = spec.tensor_scale or bool((~x[place].isfinite()).any())
        for y in (fake_quantize(x, spec), dequantize(quantize(x, spec))):
            assert torch.equal(y.isnan(), want)
            assert torch.equal(y[~want], clean[~want])
    assert not quantize_values(x, spec).scale.isfinite().all()


@pytest.mark.parametrize("text", [s for s in SPECS if "e4m3" not in s.partition("scale_format")[2]])
@pytest.mark.parametrize("exponent", [-70, 70])
def test_a_power_of_two_passes_through(text, exponent):
    """Q(2^k x) = 2^k Q(x): no clip overflows or vanishes at magnitudes of 1e-21 or 1e26."""
    spec = spec_of(text)
    x = operand()
    x = torch.where(x == 0, 1.0, x)
    want = fake_quantize(x, spec) * 2.0**exponent
    assert torch.equal(fake_quantize(x * 2.0**exponent, spec), want)


@pytest.mark.parametrize("text", SPECS)
def test_extreme_magnitudes_stay_finite(text):
    spec = spec_of(text)
    for magnitude in (1e-45, 1e-40, 1e-38, 1e-30, 1e30, 1e37):
        y = fake_quantize(torch.tensor([[0.3, -1.0, 0.5]]) * magnitude, spec)
        assert bool(y.isfinite().all())
        # nothing comes back larger than it went in, but for one step of the least scale
        least = 2.0**-9 if spec.scale_format == "e4m3" and not spec.tensor_scale else 2.0**-100
        widest = max(abs(spec.number_format.min), spec.number_format.max)
        assert y.abs().max() <= max(magnitude * 1.7, least * widest)


def test_min_scale():
    x = torch.full((2, 4), 1e-9)
    for text in (
        "int8",
        "int4 symmetric=False",
        "e2m1 scale_format=e8m0_ceil",
        "e2m1 scale_format=e8m0",
        "int8 clip=mse",
    ):
        spec = spec_of(text, min_scale=2.0**-10)
        assert quantize_values(x, spec).scale.tolist() == [[2.0**-10]] * 2
        assert quantize_values(x * 0, spec).scale.tolist() == [[2.0**-10]] * 2
        assert bool((quantize_values(x * 1e10, spec).scale > 2.0**-10).all())
    spec = spec_of("e2m1 scale_format=e8m0", min_scale=1e-5)
    assert quantize_values(x, spec).scale.tolist() == [[2.0**-17]] * 2  # 1e-5 is between 2^-17 and 2^-16
    assert quantize_values(torch.zeros(1, 4), spec_of("int8")).scale.item() == 2.0**-100
    spec = spec_of("e2m1 scale_format=e4m3")
    assert quantize_values(x, spec).scale.tolist() == [[2.0**-9]] * 2


def test_a_huge_outlier_costs_its_own_block_only():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    x[1, 3] = 1e6
    by_row = (fake_quantize(x, spec_of("int8")) - x).abs().amax(1)
    assert by_row[1] > 0.5
    assert bool((by_row[[0, 2, 3]] < 0.02).all())
    by_group = (fake_quantize(x, spec_of("int8 granularity=group:8")) - x).abs()
    assert bool((by_group[1, 8:] < 0.02).all())
    assert bool((by_group[1, :3] > 0).all())


# --- stochastic rounding ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "int4",
        "int8 granularity=group:4",
        "int4 symmetric=False granularity=block:2x3",
        "e2m1 granularity=group:4 scale_format=e8m0",
        "e2m1 granularity=group:4 scale_format=e4m3 tensor_scale=True",
        "midrise4 granularity=column",
        "dynamic8 granularity=tensor",
    ],
)
def test_stochastic_rounding(text):
    """The mean of 500 draws is x within 5.5 sigma of it, a draw's neighbours known from noise 0 and almost 1."""
    spec = spec_of(text, rounding="stochastic")
    x = operand()
    up = fake_quantize(x, spec, torch.zeros(7, 13))
    down = fake_quantize(x, spec, torch.full((7, 13), 1 - 2.0**-24))
    noise = torch.rand(500, 7, 13, generator=torch.Generator().manual_seed(5))
    draws = torch.stack([fake_quantize(x, spec, n) for n in noise])
    assert bool(((draws == up) | (draws == down)).all())
    scale = quantize_values(x, spec, noise[0]).scale
    gap = (spec.blocks.expand(scale, (7, 13)) * spec.number_format.widest_gap).expand(7, 13)
    assert bool((up - down <= gap * (1 + 1e-5)).all())
    inside = (x >= down) & (x <= up)
    assert inside.float().mean() > 0.5
    error = (draws.double().mean(0) - x.double())[inside]
    sigma = ((up - x) * (x - down)).clamp(min=0).sqrt().double()[inside] / 500**0.5
    assert bool((error.abs() <= 5.5 * sigma + gap[inside] * 1e-4).all())
    # element by element against the nearest rule: noise one half decides as nearest does, up to ties
    packed = quantize(x, spec, noise[0])
    assert torch.equal(dequantize(packed), draws[0])


def test_noise_belongs_to_its_element_under_ragged_tilings():
    x = torch.full((5, 7), 0.5)
    x[:, 6] = 7.0
    x[4] = 7.0
    noise = (torch.arange(35).reshape(5, 7) % 2) * 0.75
    spec = spec_of("int4 granularity=tensor", rounding="stochastic")
    want = torch.where(noise < 0.5, 1.0, 0.0)
    got = quantize_values(x, spec, noise).values
    assert torch.equal(got[:4, :6], want[:4, :6])
    spec = spec_of("int4 granularity=block:2x4", rounding="stochastic", min_scale=1.0)
    assert torch.equal(quantize_values(x, spec, noise).values[:4, :6], want[:4, :6])


def test_noise_errors():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"^rounding='stochastic' needs noise$"):
        quantize_values(x, spec_of("int8 rounding=stochastic"))
    with pytest.raises(ValueError, match=r"^rounding='nearest' takes no noise$"):
        quantize_values(x, spec_of("int8"), torch.zeros(2, 3))
    with pytest.raises(
        ValueError,
        match=r"^noise of shape \(1, 3\) for an operand of shape \(2, 3\): each element needs its own$",
    ):
        quantize_values(x, spec_of("int8 rounding=stochastic"), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="needs noise"):
        fake_quantize(x, spec_of("int8 rounding=stochastic"))
    with pytest.raises(ValueError, match="takes no noise"):
        quantize(x, spec_of("int8"), x)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_quantize_values_takes_matrices(shape):
    with pytest.raises(ValueError, match="K-major matrix") as raised:
        quantize_values(torch.zeros(shape), spec_of("int8"))
    assert str(raised.value) == (
        f"quantize_values takes a K-major matrix [free, contraction], got the shape {shape}"
    )


# --- estimators' masks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [s for s in SPECS if "mse" not in s and "tensor_scale" not in s])
def test_clipped_mask(text):
    spec = spec_of(text, estimator="clipped")
    x = operand()
    want = reference(x.numpy(), spec)
    # the extreme element itself may land a rounding error outside
    low, high = spec.number_format.min, spec.number_format.max
    inside = (want.v >= low - 1e-6 * high) & (want.v <= high + 1e-6 * high)
    q = quantize_values(x, spec)
    assert q.inside.dtype == torch.bool
    assert np.array_equal(q.inside.numpy(), inside)
    if (
        spec.clip == "absmax"
        and spec.scale_format == "float32"
        and spec.symmetric
        and low < 0
        and low == -high
    ):
        assert bool(q.inside.all())


@pytest.mark.parametrize("text", [s for s in SPECS if "mse" not in s and "tensor_scale" not in s])
def test_trust_mask(text):
    spec = spec_of(text, estimator="trust")
    x = operand()
    want = reference(x.numpy(), spec)
    zero = np.zeros((7, 13), F32)
    for at, place in slices(spec.granularity, (7, 13)).items():
        zero[place] = want.zero_point[at]
    moved = np.abs(want.values.astype(np.float64) + zero - want.v)
    half = float(np.diff(spec.number_format.levels().double().numpy()).max()) / 2
    q = quantize_values(x, spec)
    undecided = np.abs(moved - half) < 1e-5 * half + 1e-6 * np.abs(want.v)
    undecided &= (moved != half) | ("dynamic" in text)  # whose levels float32 rounds
    assert undecided.sum() <= 9
    assert np.array_equal(q.inside.numpy()[~undecided], (moved <= half)[~undecided])


def test_masks_at_their_ends():
    """scale 1: v is x. int4 ends at -8 and 7, whatever lies a rounding error beyond still counts as inside."""
    x = torch.tensor([[7.0, 7.0001, 7.4, -7.9, -8.0, -8.0001, -8.6, 0.0]])
    spec = spec_of("int4 clip=percentile:60 estimator=clipped", min_scale=1.0)
    x = torch.cat([x, torch.zeros(1, 12)], 1)
    q = quantize_values(x, spec)
    assert q.scale.item() == 1.0
    assert q.inside[0, :8].tolist() == [True, False, False, True, True, False, False, True]
    nearly = torch.tensor([[7.0 * (1 + 2.0**-22), -8.0 * (1 + 2.0**-22), 7.0 * (1 + 2.0**-18)] + [0.0] * 17])
    assert quantize_values(nearly, spec).inside[0, :3].tolist() == [True, True, False]
    spec = spec_of("int4 clip=percentile:60 estimator=trust", min_scale=1.0)
    assert quantize_values(x, spec).inside[0, :8].tolist() == [True] * 6 + [False, True]
    y = torch.tensor([[7.5, 7.500001, -8.5, -8.500001, 2.5, 3.49] + [0.0] * 14])
    assert quantize_values(y, spec).inside[0, :6].tolist() == [True, False, True, False, True, True]


def test_masks_have_the_operands_shape_under_ragged_tilings():
    for estimator in ("clipped", "trust"):
        q = quantize_values(operand(), spec_of("int4 granularity=block:4x4 clip=rms:1", estimator=estimator))
        assert q.inside.shape == (7, 13)
        assert not q.inside.all()


# --- unusual inputs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["int4", "int4 granularity=group:4 symmetric=False", "e2m1 scale_format=e8m0"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_read_as_float32(text, dtype):
    spec = spec_of(text)
    x = (operand() / 100).to(dtype)
    q, want = quantize(x, spec), quantize(x.to(torch.float32), spec)
    for name, tensor in q.tensors().items():
        assert torch.equal(tensor, want.tensors()[name])
    assert dequantize(q).dtype == torch.float32
    assert fake_quantize(x, spec).dtype == dtype
    assert torch.equal(fake_quantize(x, spec), dequantize(want).to(dtype))


@pytest.mark.parametrize("text", SPECS[::5])
def test_strides_do_not_matter(text):
    spec = spec_of(text)
    x = operand()
    for view in (x.t(), x[::2, 1::3], x[:, :1].expand(7, 6), x.reshape(7, 13, 1).permute(1, 2, 0)):
        q, want = quantize(view, spec), quantize(view.contiguous(), spec)
        assert torch.equal(q.codes, want.codes)
        assert torch.equal(q.scale, want.scale)
        assert torch.equal(fake_quantize(view, spec), dequantize(want))


def test_quantizing_changes_no_input():
    x = operand()
    kept = x.clone()
    for text in ("int8", "int4 symmetric=False clip=mse", "e2m1 granularity=group:4 clip=percentile:90"):
        quantize(x, spec_of(text))
        assert torch.equal(x, kept)


EMPTY = [(0,), (0, 5), (5, 0), (0, 0), (2, 0, 3), (2, 3, 0)]


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int4 granularity=tensor",
        "int3 granularity=group:2 symmetric=False",
        "e2m1 granularity=group:16 scale_format=e4m3 tensor_scale=True",
        "e2m1 granularity=block:2x2 scale_format=e8m0 estimator=trust",
        "int8 granularity=column clip=mse estimator=clipped",
    ],
)
def test_empty_tensors(shape, text):
    spec = spec_of(text)
    x = torch.empty(shape, requires_grad=True)
    assert dequantize(quantize(x.detach(), spec)).shape == shape
    y = fake_quantize(x, spec)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert set(quantize(x.detach(), spec).tensors()) >= {"codes", "scale"}


def test_the_parts_of_an_empty_operand():
    q = quantize_values(
        torch.empty(0, 5, dtype=torch.bfloat16), spec_of("int4 granularity=group:2", min_scale=0.5)
    )
    assert (q.values.dtype, q.values.shape) == (torch.float32, (0, 5))
    assert (q.scale.dtype, q.scale.shape) == (torch.float32, (0, 3))
    assert q.zero_point is q.inside is q.tensor_scale is None
    assert q.block_scale is q.scale
    q = quantize_values(torch.empty(4, 0), spec_of("int4 granularity=column symmetric=False"))
    assert q.zero_point.shape == q.scale.shape == (1, 0)
    q = quantize_values(torch.empty(4, 0), spec_of("e2m1 scale_format=e4m3 tensor_scale=True"))
    assert q.tensor_scale.item() == 1.0
    # the value of the scales is the least one
    q = quantize_values(torch.empty(0, 3), spec_of("int4 granularity=tensor", min_scale=0.5))
    assert q.scale.tolist() == []


FRESH = CodebookFormat("fresh", (-1.0, -0.25, 0.0, 0.5, 1.0))
"""A format whose properties nobody has asked for before the compiler does."""


@pytest.mark.parametrize("text", ["int3_row_asym", "mxfp4_trust", "nvfp4", f"{__name__}:FRESH"])
def test_packing_compiles_whole_at_its_first_use(text):
    torch._dynamo.reset()
    spec = QuantSpec.parse(text)
    compiled = torch.compile(lambda t: dequantize(quantize(t, spec)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(operand()), fake_quantize(operand(), spec))


# --- packing ------------------------------------------------------------------------------------------------------


def packed_by_hand(codes: list[int], bits: int) -> list[int]:
    """One long little-endian number, cut into bytes, with as many bytes as whole units of codes fill."""
    unit_codes = 8 // math.gcd(8, bits)
    units = -(-len(codes) // unit_codes)
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes(units * unit_codes * bits // 8, "little"))


@PROFILE
@given(data=st.data(), bits=st.integers(1, 8), count=st.integers(0, 35), rows=st.integers(1, 3))
def test_pack(data, bits, count, rows):
    codes = data.draw(
        st.lists(
            st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count),
            min_size=rows,
            max_size=rows,
        )
    )
    tensor = torch.tensor(codes, dtype=torch.uint8).reshape(rows, count)
    packed = pack(tensor, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [packed_by_hand(row, bits) for row in codes]
    back = unpack(packed, bits, count)
    assert back.dtype == torch.uint8
    assert torch.equal(back, tensor)
    assert torch.equal(unpack(pack(tensor[0], bits), bits, count), tensor[0])
    assert torch.equal(pack(tensor[None], bits)[0], packed)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_all_codes(bits):
    codes = torch.arange(2**bits, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.tolist() == packed_by_hand(codes.tolist(), bits)
    assert packed.numel() == max(2**bits * bits // 8, 1)  # two codes of one bit fill a byte
    assert torch.equal(unpack(packed, bits, 2**bits), codes)
    assert pack(codes.flip(0).contiguous(), bits).is_contiguous()


def test_eight_bits_are_not_copied():
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    assert pack(codes, 8).data_ptr() == codes.data_ptr()
    assert unpack(codes, 8, 4).data_ptr() == codes.data_ptr()
    assert pack(codes.t(), 8).is_contiguous()


# --- bytes held -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shape", "want"),
    [
        ("int8", (4, 64), {"codes": 8, "scale": 32 / 64}),
        ("int4", (4, 64), {"codes": 4, "scale": 32 / 64}),
        ("int4 granularity=tensor", (4, 64), {"codes": 4, "scale": 32 / 256}),
        ("int4 granularity=column", (4, 64), {"codes": 4, "scale": 32 / 4}),
        ("int3", (2, 64), {"codes": 3, "scale": 32 / 64}),
        ("int3", (2, 9), {"codes": 8 * 6 / 9, "scale": 32 / 9}),  # 9 codes take 2 units of 8: 6 bytes
        (
            "int4 granularity=group:128 symmetric=False",
            (2, 256),
            {"codes": 4, "scale": 0.25, "zero_point": 8 / 128},
        ),
        ("int4 granularity=group:128", (3, 200), {"codes": 4, "scale": 2 * 32 / 200}),
        ("e2m1 granularity=group:32 scale_format=e8m0", (2, 64), {"codes": 4, "scale": 8 / 32}),
        (
            "e2m1 granularity=group:16 scale_format=e4m3 tensor_scale=True",
            (4, 32),
            {"codes": 4, "scale": 8 / 16, "tensor_scale": 32 / 128},
        ),
        ("e4m3 granularity=block:128x128", (128, 256), {"codes": 8, "scale": 32 / 128**2}),
        ("midrise1", (2, 16), {"codes": 1, "scale": 2}),
        ("int5", (8,), {"codes": 5, "scale": 4}),
        ("int4", (), {"codes": 8, "scale": 32}),
        ("int4 granularity=group:8", (2, 3, 8), {"codes": 4, "scale": 4}),
    ],
)
def test_ledger(text, shape, want):
    q = quantize(torch.ones(shape), spec_of(text))
    ledger = q.ledger()
    assert ledger == {**want, "total": pytest.approx(sum(want.values()))}
    assert list(ledger) == [*want, "total"]
    held = sum(t.untyped_storage().nbytes() for t in q.tensors().values())
    assert held == q.nbytes
    assert ledger["total"] * max(math.prod(shape), 1) / 8 == pytest.approx(q.nbytes, abs=1e-9)
    assert list(q.tensors()) == list(want)


def test_standard_layouts_cost_what_they_are_known_for():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    assert quantize(x, QuantSpec.parse("mxfp4")).ledger()["total"] == 4.25
    assert quantize(x, QuantSpec.parse("mxfp8")).ledger()["total"] == 8.25
    assert quantize(x, QuantSpec.parse("mxint8")).ledger()["total"] == 8.25
    assert quantize(x, QuantSpec.parse("nvfp4")).ledger()["total"] == 4.5 + 32 / (64 * 128)
    assert quantize(x, QuantSpec.parse("int4_group128_asym")).ledger()["total"] == 4 + 40 / 128


def test_ledger_of_nothing():
    q = quantize(torch.empty(0, 5), spec_of("int8"))
    assert q.ledger() == {"codes": 0.0, "scale": 0.0, "total": 0.0}
    assert q.nbytes == 0


def test_stored_scales():
    """e8m0: the biased exponent, 255 for NaN. e4m3: the pattern of the hardware type, 0x7F for NaN."""
    x = torch.zeros(4, 32)
    x[:, 0] = torch.tensor([1.0, 6.0, 1e-3, NAN])
    q = quantize(x, QuantSpec.parse("mxfp4"))
    assert q.scale.dtype == torch.uint8
    assert q.scale.flatten().tolist() == [127 - 2, 127, 127 - 12, 255]
    q = quantize(x, spec_of("e2m1 scale_format=e4m3"))
    assert q.scale.dtype == torch.uint8
    want = (torch.tensor([1.0, 6.0, 0.0117]) / 6).to(torch.float8_e4m3fn)
    assert q.scale.flatten().tolist() == [*want.view(torch.uint8).tolist(), 0x7F]
    q = quantize(x, spec_of("e2m1"))
    assert q.scale.dtype == torch.float32
    assert q.scale[3].isnan()
    q = quantize(x, spec_of("int4 symmetric=False"))
    assert q.zero_point.dtype == torch.uint8
    assert q.zero_point.flatten().tolist() == [0, 0, 0, 0]
    assert quantize(-x[:3], spec_of("int4 symmetric=False")).zero_point.flatten().tolist() == [15, 15, 15]


def test_qtensor_keeps_shape_and_spec():
    spec = spec_of("int4")
    q = quantize(torch.ones(2, 3, 5), spec)
    assert (q.shape, q.spec) == ((2, 3, 5), spec)
    assert isinstance(q, QTensor)
    assert q.codes.shape == (2, 3, 3)
    assert q.scale.shape == (6, 1)
    assert quantize(torch.tensor(2.0), spec).codes.shape == (1,)
    with pytest.raises(AttributeError):
        q.codes = None  # type: ignore[misc]
