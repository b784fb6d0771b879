"""QuantizedLinear's random bits: named by seed, step, layer, operand and token; the same wherever they are drawn."""

from __future__ import annotations

import equations
import pytest
import torch
from layer_recipes import LAYERS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtrain.nn import Clock, QuantizedLinear
from qtrain.quant import LinearRecipe


def make(recipe: LinearRecipe, *, name: str = "layer", seed: int = 0, widths: tuple[int, int] = (32, 16)):
    torch.manual_seed(0)
    return QuantizedLinear.convert(nn.Linear(*widths), recipe, name=name, clock=Clock(seed))


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    return y.detach(), x.grad, layer.weight.grad


STOCHASTIC = ["saved_stochastic", "rht_forward", "nvfp4", "transforms_alone", "stochastic_column"]


@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_bits(name: str, reentrant: bool) -> None:
    clock = Clock(3)
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
    for key in ("0", "2"):
        QuantizedLinear.convert(body[int(key)], LinearRecipe(**LAYERS[name]), name=key, clock=clock)
    clock.set(step=4, token_offset=32)
    x, g = torch.randn(16, 32, requires_grad=True), torch.randn(16, 32)
    body(x).backward(g)
    plain = [x.grad, *(p.grad for p in body.parameters())]
    x.grad = None
    body.zero_grad()
    checkpoint(body, x, use_reentrant=reentrant).backward(g)
    again = [x.grad, *(p.grad for p in body.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_the_backward_uses_the_bits_of_its_forward_although_the_clock_moved_on() -> None:
    layer, x, g = make(LinearRecipe(**LAYERS["saved_stochastic"])), torch.randn(16, 32), torch.randn(16, 16)
    layer.clock.set(step=1, token_offset=64)
    expected = gradients(layer, x, g)
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    layer.clock.set(step=2, token_offset=0)
    y.backward(g)
    assert torch.equal(leaf.grad, expected[1])
    assert torch.equal(layer.weight.grad, expected[2])


def test_micro_batches_have_the_rows_of_the_whole() -> None:
    """int4_row inputs and int4_column gradients have one scale a token: parts of a batch are rows of the whole,
    and the parts of dW sum to the whole up to the order of summation."""
    recipe = LinearRecipe(
        fprop={"input": "int4_row_sr", "weight": "int4_row_sr"},
        dgrad={"grad_output": "int4_row_sr", "weight": "int4_row_sr"},
        wgrad={"grad_output": "int4_column_sr", "input": "int4_column_sr"},
    )
    layer, x, g = make(recipe, seed=9), torch.randn(24, 32), torch.randn(24, 16)
    layer.clock.set(step=7, token_offset=1000)
    y, dx, dw = gradients(layer, x, g)
    summed = torch.zeros_like(dw)
    for start, stop in ((0, 5), (5, 16), (16, 24)):
        layer.clock.set(step=7, token_offset=1000 + start)
        part = gradients(layer, x[start:stop], g[start:stop])
        torch.testing.assert_close(part[0], y[start:stop], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(part[1], dx[start:stop], rtol=1e-5, atol=1e-6)
        summed += part[2]
    torch.testing.assert_close(summed, dw, rtol=1e-4, atol=1e-5)
    layer.clock.set(step=7)
    assert not torch.allclose(gradients(layer, x[5:16], g[5:16])[0], y[5:16], rtol=1e-3)


@pytest.mark.parametrize(
    "operand",
    ["fprop.input", "fprop.weight", "dgrad.grad_output", "dgrad.weight", "wgrad.grad_output", "wgrad.input"],
)
def test_step_seed_and_layer_change_the_bits_of_every_operand(operand: str) -> None:
    gemm, which = operand.split(".")
    recipe = LinearRecipe(**{gemm: {which: "int4_row_sr"}})
    x, g = torch.randn(16, 32), torch.randn(16, 16)
    result = {"fprop": 0, "dgrad": 1, "wgrad": 2}[gemm]

    def run(*, seed: int = 0, step: int = 0, offset: int = 0, name: str = "layer") -> Tensor:
        layer = make(recipe, name=name, seed=seed)
        layer.clock.set(step=step, token_offset=offset)
        return gradients(layer, x, g)[result]

    base = run()
    assert torch.equal(base, run())
    assert not torch.equal(base, run(seed=1))
    assert not torch.equal(base, run(seed=2**32))
    assert not torch.equal(base, run(step=1))
    assert not torch.equal(base, run(name="other"))
    assert torch.equal(base, run(offset=16)) == (which == "weight")


def test_the_two_gradient_operands_draw_apart() -> None:
    recipe = LinearRecipe(dgrad={"grad_output": "int2_tensor_sr"}, wgrad={"grad_output": "int2_tensor_sr"})
    layer = make(recipe, widths=(16, 16))
    with torch.no_grad():
        layer.weight.copy_(torch.eye(16))
    _, dx, dw = gradients(layer, torch.eye(16), torch.rand(16, 16))
    assert not torch.equal(dx, dw)  # Q(g) I and (I Q(g)^T)^T: the quantized gradients themselves


def test_averaged_dW_is_unbiased_and_its_error_falls_as_one_over_N() -> None:
    """Both operands of wgrad are rounded stochastically and apart, so E dW = g^T x. Over N = 1024 steps each of 30
    means must lie within 4.5 standard errors (a chance of 2e-4 for a correct layer, at this one seed); the mean
    squared error of means over 64 steps is 16 times that over 1024, up to the sampling of 30 chi-squared
    variables (a factor of 2)."""
    recipe = LinearRecipe(wgrad={"grad_output": "int4_row_sr", "input": "int4_row_sr"})
    layer, x, g = make(recipe, widths=(6, 5)), torch.randn(8, 6), torch.randn(8, 5)
    samples = []
    for step in range(1024):
        layer.clock.set(step=step)
        samples.append(gradients(layer, x, g)[2].clone())
    dw, exact = torch.stack(samples).double(), (g.t() @ x).double()
    standard_error = dw.std(0) / 1024**0.5
    assert (standard_error > 0).all()
    assert ((dw.mean(0) - exact).abs() / standard_error).max() < 4.5
    of_64 = (dw.reshape(16, 64, 5, 6).mean(1) - exact).square().mean()
    of_1 = (dw - exact).square().mean()
    assert 32 < of_1 / of_64 < 128
    nearest = make(LinearRecipe(wgrad={"grad_output": "int4_row", "input": "int4_row"}), widths=(6, 5))
    bias = (gradients(nearest, x, g)[2] - exact).square().mean()
    assert (dw.mean(0) - exact).square().mean() < bias / 10


def test_averaged_dx_through_a_random_rotation_is_unbiased() -> None:
    recipe = LinearRecipe(dgrad={"grad_output": "int4_row_sr", "weight": "int4_row_sr", "transform": "rht:8"})
    layer, x, g = make(recipe, widths=(6, 8)), torch.randn(5, 6), torch.randn(5, 8)
    samples = []
    for step in range(512):
        layer.clock.set(step=step)
        samples.append(gradients(layer, x, g)[1])
    dx, exact = torch.stack(samples).double(), (g @ layer.weight).detach().double()
    assert ((dx.mean(0) - exact).abs() / (dx.std(0) / 512**0.5)).max() < 4.5


def test_a_deterministic_recipe_reads_no_clock() -> None:
    layer, x, g = make(LinearRecipe(**LAYERS["int8_reused"])), torch.randn(16, 32), torch.randn(16, 16)
    before = gradients(layer, x, g)
    layer.clock.set(step=99, token_offset=5)
    layer.clock.counters = None  # type: ignore[assignment]
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(layer, x, g), strict=True))


def test_global_random_state_is_neither_read_nor_moved() -> None:
    layer, x, g = make(LinearRecipe(**LAYERS["nvfp4"])), torch.randn(16, 32), torch.randn(16, 16)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gradients(layer, x, g)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(layer, x, g), strict=True))


def test_moment_of_the_equations_is_the_hash_of_the_kernels() -> None:
    """The reference's own hash, so that the tests above compare with what is specified."""
    from qtrain_kernels.counter_hash import random_bits, stream_id

    moment = equations.Moment(seed=2**40 + 3, step=12, name="a.b")
    stream = (stream_id("a.b") + 4 * 0x9E3779B9) & 0xFFFFFFFF
    stream = stream - 2**32 if stream >= 2**31 else stream
    ours = random_bits(torch.tensor(2**40 + 3), torch.tensor(12), stream, 3, 5, row_offset=9)
    theirs = torch.tensor(moment.bits("dgrad.grad_output", 3, 5, 9).astype("int64"))
    assert torch.equal(ours.to(torch.int64) & 0xFFFFFFFF, theirs)
