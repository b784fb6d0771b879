"""gradient_study on cases whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from qtrain.analysis.gradients import Statistics, Sums, gradient_study
from qtrain.quant import DgradRecipe, LinearRecipe, ModelRecipe, WgradRecipe
from qtrain.quant.transforms import Transform

T, IN, OUT = 24, 7, 5


class One(nn.Module):
    """One linear layer with a fixed gradient g of its output: loss = <y, g>."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x, self.g = torch.randn(T, IN, generator=generator), torch.randn(T, OUT, generator=generator)
        self.g[3] = 0.0  # a token without a gradient
        self.linear = nn.Linear(IN, OUT, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(OUT, IN, generator=generator))

    def forward(self) -> Tensor:
        return (self.linear(self.x.clone().requires_grad_()) * self.g).sum()


def study(spec: str | None, draws: int = 64, model: nn.Module | None = None, **more: object):
    linear = LinearRecipe(
        dgrad=DgradRecipe(grad_output=spec, **more), wgrad=WgradRecipe(grad_output=spec, **more)
    )
    recipes = {"it": ModelRecipe(linear=linear)}
    return gradient_study(model or One(), recipes, lambda m: m(), draws=draws)["it"]


def variance_of_rounding(g: Tensor) -> Tensor:
    """Of int4 codes drawn with the unbiased probabilities, one scale a row: s^2 p (1 - p), p = frac(g / s)."""
    scale = g.abs().amax(1, keepdim=True).double() / 7
    p = (g.double() / scale).nan_to_num() % 1.0
    return scale**2 * p * (1 - p)


def test_nothing_quantized_is_nothing_wrong():
    found = study(None)
    for s in (found.total, *found.model.values(), *found.own.values()):
        assert (s.bias, s.deviation, s.decay, s.draws) == (0.0, 0.0, 0.0, 1)
        assert s.cosine == pytest.approx(1.0, abs=1e-12)
        assert s.alignment == 1.0
    assert set(found.model) == {("linear", gemm) for gemm in ("fprop", "dgrad", "wgrad")} == set(found.own)


def test_expectation_and_variance_of_stochastic_rounding_are_the_closed_form():
    """dx = Q(g) W: the errors of a row are independent over O, so that E |dx error|^2 = sum_to var_to |W_o|^2; dW = Q(g)^T x
    with a scale for each output likewise."""
    one, draws = One(), 512
    found = study("int4_row_sr", draws, one)
    w, x, g = one.linear.weight.detach().double(), one.x.double(), one.g
    wanted = {
        "dgrad": (variance_of_rounding(g) @ w.square().sum(1)).sum() / (g.double() @ w).square().sum(),
        "wgrad": (variance_of_rounding(g.t()) @ x.square().sum(1)).sum()
        / (g.t().double() @ x).square().sum(),
    }
    for gemm, relative in wanted.items():
        for where in (found.own, found.model):
            s = where["linear", gemm]
            assert s.deviation == pytest.approx(math.sqrt(relative), rel=0.04)
            # |mean error|^2 has the mean S^2 / N and, of 35 or more directions, a deviation below 0.5 of it
            assert s.bias <= 1.6 * s.floor
            assert s.decay == pytest.approx(-1.0, abs=0.15)
            curve = dict(s.decay_curve)
            assert curve[1] / curve[64] == pytest.approx(64, rel=0.6)
            assert s.alignment == pytest.approx(1.0, abs=4 * s.deviation / math.sqrt(draws))
    assert found.total == found.model["linear", "wgrad"]


def test_nearest_has_a_bias_that_no_draw_removes():
    one = One()
    found = study("int4_row", 64, one)
    scale = one.g.abs().amax(1, keepdim=True) / 7
    rounded = (one.g / scale).nan_to_num().round() * scale
    w = one.linear.weight.detach()
    error, exact = (rounded - one.g) @ w, one.g @ w
    s = found.own["linear", "dgrad"]
    assert s.draws == 1
    assert s.bias == pytest.approx(float(error.norm() / exact.norm()), rel=1e-4)
    assert s.deviation == 0.0
    assert s.decay == 0.0
    assert s.cosine == pytest.approx(
        float((rounded @ w).flatten() @ exact.flatten() / (rounded @ w).norm() / exact.norm()), rel=1e-5
    )


class Stretched(Transform):
    """Not orthogonal, on purpose: both operands times sqrt(0.8), so that the product is 0.8 of itself."""

    def forward(self, x: Tensor, signs: Tensor | None = None) -> Tensor:
        return x.to(torch.float32) * math.sqrt(0.8)

    inverse = forward


def test_a_scaled_gradient_has_the_scale_as_its_alignment():
    found = study(None, transform=f"{__name__}:Stretched")
    for key in (("linear", "dgrad"), ("linear", "wgrad")):
        s = found.own[key]
        assert s.alignment == pytest.approx(0.8, rel=1e-5)
        assert s.cosine == pytest.approx(1.0, abs=1e-6)
        assert s.bias == pytest.approx(0.2, rel=1e-4)
    assert found.own["linear", "fprop"].alignment == 1.0


class Two(nn.Module):
    """Two layers; the second one's weight is met twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.x = torch.randn(10, 6)

    def forward(self) -> Tensor:
        return self.b(torch.tanh(self.b(torch.tanh(self.a(self.x))))).square().mean()


def test_an_error_is_blamed_on_the_layer_that_makes_it():
    """a gets a wrong gradient from b, and makes no error of its own; the first layer's input needs no gradient."""
    rounded = LinearRecipe(
        dgrad=DgradRecipe(grad_output="int2_row"), wgrad=WgradRecipe(grad_output="int2_row")
    )
    found = gradient_study(Two(), {"it": ModelRecipe(linear=rounded, exclude=["a"])}, lambda m: m())["it"]
    assert found.model["a", "wgrad"].cosine < 0.999
    assert found.own["a", "wgrad"].cosine == pytest.approx(1.0, abs=1e-12)
    assert found.own["b", "wgrad"].cosine < 0.999
    assert ("a", "dgrad") not in found.model
    assert found.worst(1)[0][0] == "b"
    assert found.model["b", "dgrad"].elements == 2 * 60
    own_b = found.own["b", "wgrad"]
    assert own_b.norm == pytest.approx(found.model["b", "wgrad"].norm, rel=1e-5), "both calls count"


def test_the_model_is_left_as_it_is():
    model = Two().train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradient_study(
        model, {"it": ModelRecipe(linear=LinearRecipe(wgrad={"grad_output": "int4_row_sr"}))}, lambda m: m()
    )
    assert model.training
    assert type(model.a) is nn.Linear
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])


def test_sums_of_tensors_add():
    whole = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    from qtrain.analysis.gradients import _Draws

    g, hs = whole[0], whole[1:]
    parts, one = [_Draws(g[:20], 3), _Draws(g[20:], 3)], _Draws(g, 3)
    for h in hs:
        one.add(h)
        for d, piece in zip(parts, (h[:20], h[20:]), strict=True):
            d.add(piece)
    joined, direct = Statistics.of(Sums.of(d.sums for d in parts)), Statistics.of(one.sums)
    assert joined.cosine == pytest.approx(direct.cosine)
    e = (hs - g).double()
    assert joined.deviation == pytest.approx(float((e.var(0).sum()).sqrt() / g.double().norm()), rel=1e-6)
    assert joined.alignment == pytest.approx(
        float((hs @ g).double().mean() / g.double().square().sum()), rel=1e-6
    )
    unbiased = e.mean(0).square().sum() - e.var(0).sum() / 3
    assert joined.bias == pytest.approx(float(unbiased.clamp(min=0).sqrt() / g.double().norm()), rel=1e-6)
    assert [n for n, _ in joined.decay_curve] == [1, 2, 3]


def test_a_gradient_that_is_zero_everywhere_has_no_direction():
    s = Statistics.of(Sums(elements=3, g2=0.0, h2=[0.0], gh=[0.0], e2=[0.0], mean_e2={1: 0.0}))
    assert math.isnan(s.cosine)
    assert s.norm == 0.0


def test_no_draws_are_refused():
    with pytest.raises(ValueError, match="draws=0"):
        study(None, draws=0)
