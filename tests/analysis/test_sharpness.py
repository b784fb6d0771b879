"""m-sharpness and the top eigenvalue, on functions whose answers have a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qtrain.analysis.sharpness import m_sharpness, quantizes, top_eigenvalue
from qtrain.nn.surgery import apply_recipe
from qtrain.quant import FpropRecipe, LinearRecipe, ModelRecipe

SPECTRUM = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1, 0.0], dtype=torch.float64)


class Quadratic(nn.Module):
    """L = 1/2 (w - c)^T H (w - c) with H = R diag(spectrum) R^T, in two parameters of odd shapes."""

    def __init__(self, spectrum: torch.Tensor, centre: torch.Tensor, start: torch.Tensor) -> None:
        super().__init__()
        n = len(spectrum)
        r, _ = torch.linalg.qr(
            torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        )
        self.h, self.centre = r @ torch.diag(spectrum) @ r.t(), centre
        self.a, self.b = nn.Parameter(start[:1].reshape(1, 1).clone()), nn.Parameter(start[1:].clone())

    def loss(self, scale: float = 1.0) -> torch.Tensor:
        d = torch.cat([self.a.flatten(), self.b]) - self.centre
        return 0.5 * scale * d @ self.h @ d


def at_its_minimum(spectrum: torch.Tensor = SPECTRUM) -> Quadratic:
    w = torch.linspace(1, 2, len(spectrum), dtype=torch.float64)
    return Quadratic(spectrum, w, w)


def test_at_a_minimum_it_is_half_r_squared_times_the_eigenvalue():
    model = at_its_minimum()
    norm = float(torch.cat([model.a.flatten(), model.b]).detach().norm())
    found = m_sharpness(model, [lambda m: m.loss(), lambda m: m.loss(3.0)], rho=0.1, steps=40)
    r2 = (0.1 * norm) ** 2
    assert found.radius == pytest.approx(0.1 * norm)
    assert found.per_batch == pytest.approx([0.5 * r2 * 5, 1.5 * r2 * 5], rel=1e-6)
    assert found.mean == pytest.approx(r2 * 5, rel=1e-6)
    assert found.loss == 0.0


def test_off_a_minimum_it_solves_the_trust_region_problem():
    """max over |e| = r of g e + e H e / 2: e = (mu I - H)^-1 g with mu > lambda_max where |e(mu)| = r, by bisection."""
    start = torch.linspace(1, 2, 6, dtype=torch.float64)
    model = Quadratic(SPECTRUM, torch.zeros(6, dtype=torch.float64), start)
    r, g, eye = 0.3 * float(start.norm()), model.h @ start, torch.eye(6, dtype=torch.float64)
    low, high = 5.0 + 1e-9, 1e6
    for _ in range(200):
        mu = (low + high) / 2
        long = float(torch.linalg.solve(mu * eye - model.h, g).norm()) > r
        low, high = (mu, high) if long else (low, mu)
    e = torch.linalg.solve(low * eye - model.h, g)
    wanted = float(g @ e + 0.5 * e @ model.h @ e)
    found = m_sharpness(model, [lambda m: m.loss()], rho=0.3, steps=200)
    assert found.mean == pytest.approx(wanted, rel=1e-6)
    one = m_sharpness(model, [lambda m: m.loss()], rho=0.3, steps=1).mean
    u = r * g / g.norm()  # SAM's step
    assert one == pytest.approx(float(g @ u + 0.5 * u @ model.h @ u), rel=1e-9)
    assert one < found.mean


def test_a_linear_loss_rises_by_r_times_its_slope():
    p = nn.ParameterList([nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))])
    c = torch.tensor([1.0, -2.0], dtype=torch.float64)
    found = m_sharpness(p, [lambda m: (m[0] * c).sum()], rho=0.2)
    assert found.mean == pytest.approx(0.2 * 5 * math.sqrt(5))
    assert top_eigenvalue(p, [lambda m: (m[0] * c).sum()]).value == 0.0


def test_weights_are_put_back_to_the_bit():
    model = at_its_minimum()
    before = [p.detach().clone() for p in model.parameters()]
    m_sharpness(model, [lambda m: m.loss()])
    top_eigenvalue(model, [lambda m: m.loss()], method="finite_differences")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_loss_never_falls_where_going_up_is_impossible():
    """e = 0 lies in the ball: the maximum is never below zero."""
    model = at_its_minimum(-SPECTRUM)
    assert m_sharpness(model, [lambda m: m.loss()]).mean == 0.0


@pytest.mark.parametrize("method", ["double_backward", "finite_differences"])
def test_the_top_eigenvalue_of_a_known_spectrum(method):
    found = top_eigenvalue(
        at_its_minimum(), [lambda m: m.loss(), lambda m: m.loss(3)], method=method, iterations=60
    )
    assert found.value == pytest.approx(10.0, rel=1e-5)
    assert found.residual < 1e-3
    assert found.method == method
    assert found.iterations < 60


def test_the_largest_not_the_most_negative_one():
    spectrum = torch.tensor([-7.0, 3.0, 1.0, -1.0], dtype=torch.float64)
    for method in ("double_backward", "finite_differences"):
        found = top_eigenvalue(at_its_minimum(spectrum), [lambda m: m.loss()], iterations=200, method=method)
        assert found.value == pytest.approx(3.0, rel=1e-4)


def test_residual_says_when_it_has_not_converged():
    for method in ("double_backward", "finite_differences"):
        found = top_eigenvalue(at_its_minimum(), [lambda m: m.loss()], iterations=2, method=method)
        assert found.residual > 0.01
        assert found.iterations == 2


def test_lanczos_needs_a_product_for_each_eigenvalue_at_most():
    found = top_eigenvalue(at_its_minimum(), [lambda m: m.loss()], method="double_backward", iterations=60)
    assert found.value == pytest.approx(5.0, rel=1e-6)
    assert found.iterations <= len(SPECTRUM)


def quantized() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=False))
    apply_recipe(model, ModelRecipe(linear=LinearRecipe(fprop=FpropRecipe(weight="int8_row"))))
    return model, torch.randn(32, 16)


def test_a_quantized_model_takes_finite_differences():
    """L = mean y^2 / 2 of y = x W^T: H is x^T x / n / 8 for each row of W, whatever int8 blurs of it."""
    model, x = quantized()
    assert quantizes(model)
    loss = lambda m: m(x).square().mean() / 2  # noqa: E731
    found = top_eigenvalue(model, [loss], iterations=60, step=0.05)
    assert found.method == "finite_differences"
    exact = float(torch.linalg.eigvalsh(x.t() @ x / 32 / 8)[-1])
    assert found.value == pytest.approx(exact, rel=0.05)
    with pytest.raises(ValueError, match="no second derivative"):
        top_eigenvalue(model, [loss], method="double_backward")
    apply_recipe(model, ModelRecipe())
    assert not quantizes(model)
    assert top_eigenvalue(model, [loss], iterations=60).method == "double_backward"


def test_what_cannot_be_is_refused():
    model = at_its_minimum()
    with pytest.raises(ValueError, match="rho=0"):
        m_sharpness(model, [lambda m: m.loss()], rho=0)
    with pytest.raises(ValueError, match="no micro-batch"):
        m_sharpness(model, [])
    with pytest.raises(ValueError, match="allowed are double_backward"):
        top_eigenvalue(model, [lambda m: m.loss()], method="newton")
    with pytest.raises(ValueError, match="requires a gradient"):
        m_sharpness(nn.ReLU(), [lambda m: torch.zeros(())])


def test_a_loss_that_becomes_infinite_is_infinitely_sharp():
    p = nn.ParameterList([nn.Parameter(torch.tensor([1.0]))])
    found = m_sharpness(p, [lambda m: torch.where(m[0] > 1.001, m[0] * math.inf, m[0]).sum()], rho=0.1)
    assert found.mean == math.inf
