"""fake_quantize and its gradients against masks computed here."""

from __future__ import annotations

import pytest
import torch

from qtrain.quant import QuantSpec, dequantize, fake_quantize, quantize

NAN = float("nan")


def data(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(x: torch.Tensor, spec: QuantSpec, weights: torch.Tensor, noise: torch.Tensor | None = None):
    x = x.clone().requires_grad_()
    y = fake_quantize(x, spec, noise)
    (y * weights).sum().backward()
    return y.detach(), x.grad


@pytest.mark.parametrize(
    "text", ["int4_row", "e2m1_group4", "int8_tensor_asym", "nvfp4", "midrise2_column_gaussian"]
)
@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16), (16,), ()])
def test_ste_passes_the_gradient(text, shape):
    x, weights = data(*shape), data(*shape, seed=1)
    y, grad = gradient(x, QuantSpec.parse(text), weights)
    assert torch.equal(grad, weights)
    assert torch.equal(y, dequantize(quantize(x, QuantSpec.parse(text))))
    assert y.shape == x.shape


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
@pytest.mark.parametrize("text", ["int4 rms:1", "midrise4 rms:1.5", "e2m1 rms:1", "int4 percentile:80"])
def test_clipped_zeroes_what_lies_beyond_the_range(shape, text):
    name, clip = text.split()
    spec = QuantSpec(format=name, clip=clip, estimator="clipped")
    x, weights = data(*shape), data(*shape, seed=1)
    _, grad = gradient(x, spec, weights)
    rows = x.reshape(-1, 16).double()
    if clip == "percentile:80":  # of 16 elements three lie outside
        range_ = rows.abs().sort(1).values[:, 12:13]
    else:
        range_ = rows.square().mean(1, keepdim=True).sqrt() * float(clip.partition(":")[2])
    low = -range_ * (8 / 7 if name == "int4" else 1)  # two's complement reaches one step further down
    mask = ((rows <= range_ * (1 + 1e-6)) & (rows >= low * (1 + 1e-6))).reshape(shape)
    assert 0 < mask.float().mean() < 1
    assert torch.equal(grad, torch.where(mask, weights, 0.0))


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16)])
@pytest.mark.parametrize("name", ["midrise4", "int4", "e2m1"])
def test_trust_zeroes_what_moved_by_more_than_half_a_step(shape, name):
    spec = QuantSpec(format=name, clip="rms:1", estimator="trust")
    x, weights = data(*shape), data(*shape, seed=1)
    y, grad = gradient(x, spec, weights)
    rms = x.reshape(-1, 16).double().square().mean(1, keepdim=True).sqrt()
    # the widest step in units of the largest level
    step = {"midrise4": 2 / 15, "int4": 1 / 7, "e2m1": 2 / 6}[name] * rms
    mask = ((y - x).abs().reshape(-1, 16) <= step / 2 * (1 + 1e-5)).reshape(shape)
    assert 0 < mask.float().mean() < 1
    assert torch.equal(grad, torch.where(mask, weights, 0.0))


def test_trust_is_the_mask_of_quest():
    """M = 1[|q - x| <= a sigma / (2^b - 1)], a = 2.514 at 4 bits: what is clipped far off is not trusted."""
    x = data(4, 512)
    x[:, 0] = 8.0
    y, grad = gradient(
        x, QuantSpec(format="midrise4", clip="gaussian", estimator="trust"), torch.ones(4, 512)
    )
    sigma = x.square().mean(1, keepdim=True).sqrt()
    want = (y - x).abs() <= 2.514 * sigma / 15 * 1.0002
    assert torch.equal(grad == 1, want)
    assert not want[:, 0].any()
    assert want.float().mean() > 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", ["ste", "clipped", "trust"])
def test_dtype_is_kept(dtype, estimator):
    spec = QuantSpec(format="int4", clip="rms:1.5", estimator=estimator)
    x = data(3, 8).to(dtype)
    weights = torch.ones(3, 8, dtype=dtype)
    y, grad = gradient(x, spec, weights)
    assert y.dtype == grad.dtype == dtype
    assert torch.equal(y, dequantize(quantize(x, spec)).to(dtype))


@pytest.mark.parametrize("estimator", ["ste", "clipped", "trust"])
@pytest.mark.parametrize(
    "text", ["int4_row", "int8_group4_asym", "mxfp4", "nvfp4", "e4m3_block2x4", "dynamic8_row"]
)
def test_compiles_whole(text, estimator):
    """fullgraph: no break, and the eager bits, forward and backward."""
    parsed = QuantSpec.parse(text)
    spec = QuantSpec(
        **{**{f: getattr(parsed, f) for f in parsed.__dataclass_fields__}, "estimator": estimator}
    )
    x, weights = data(2, 3, 16), data(2, 3, 16, seed=1)
    want_y, want_grad = gradient(x, spec, weights)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: fake_quantize(t, spec), fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    (y * weights).sum().backward()
    assert torch.equal(y, want_y)
    assert torch.equal(leaf.grad, want_grad)


def test_compiles_with_noise():
    spec = QuantSpec.parse("int4_row_sr")
    x, noise = data(4, 8), torch.rand(4, 8, generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()
    compiled = torch.compile(lambda t, n: fake_quantize(t, spec, n), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, noise), fake_quantize(x, spec, noise))


@pytest.mark.parametrize("shape", [(6, 16), (2, 3, 16), (16,), ()])
def test_stochastic_rounding_takes_noise_of_the_inputs_shape(shape):
    spec = QuantSpec.parse("int4_row_sr")
    x, noise, weights = (
        data(*shape),
        torch.rand(shape, generator=torch.Generator().manual_seed(3)),
        data(*shape),
    )
    y, grad = gradient(x, spec, weights, noise)
    assert torch.equal(y, dequantize(quantize(x, spec, noise)))
    assert torch.equal(grad, weights)
    assert shape == () or not torch.equal(y, fake_quantize(x, QuantSpec.parse("int4_row")))


def test_noise_errors():
    x = data(2, 3, 8)
    with pytest.raises(ValueError, match=r"^rounding='stochastic' needs noise$"):
        fake_quantize(x, QuantSpec.parse("int4_row_sr"))
    with pytest.raises(ValueError, match=r"^rounding='nearest' takes no noise$"):
        fake_quantize(x, QuantSpec.parse("int4_row"), torch.rand(2, 3, 8))
    with pytest.raises(ValueError, match=r"^noise of shape \(3, 8\) for an operand of shape \(6, 8\)"):
        fake_quantize(x, QuantSpec.parse("int4_row_sr"), torch.rand(3, 8))


def test_no_gradient_no_graph():
    x = data(2, 8)
    assert not fake_quantize(x, QuantSpec.parse("int4_row")).requires_grad


def test_a_masked_gradient_is_zero_even_where_it_was_not_finite():
    spec = QuantSpec(format="int4", clip="rms:1", estimator="clipped")
    x = torch.tensor([[0.1, -0.2, 9.0, 0.1]])
    _, grad = gradient(x, spec, torch.tensor([[1.0, 2.0, NAN, 3.0]]))
    assert grad.tolist() == [[1.0, 2.0, 0.0, 3.0]]
