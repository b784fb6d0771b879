"""Quantized operands and packed tensors against a slow reference: numpy, block after block, cut out by slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtrain.quant import (
    QTensor,
    QuantSpec,
    dequantize,
    dequantize_values,
    fake_quantize,
    quantize,
    quantize_values,
    unpack,
)
from qtrain.quant.formats import CodebookFormat
from qtrain.quant.qtensor import grid_values, to_qtensor

from .slow_reference import F32, SPECS, operand, reference, slices, spec_of

INF, NAN = float("inf"), float("nan")
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


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_quantize_values_takes_matrices(shape):
    with pytest.raises(ValueError, match="K-major matrix") as raised:
        quantize_values(torch.zeros(shape), spec_of("int8"))
    assert str(raised.value) == (
        f"quantize_values takes a K-major matrix [free, contraction], got the shape {shape}"
    )


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
