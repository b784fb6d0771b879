"""How sharp is the minimum that a run stands in? At fixed weights w, over a few micro-batches b with losses L_b.

    m-sharpness   mean over b of  max over |e| <= r of L_b(w + e) - L_b(w),    r = rho |w|     (Foret et al., 2020,
                  arXiv 2010.01412, section 2; m is the number of sequences in a micro-batch)
    eigenvalue    the largest eigenvalue of the Hessian of mean_b L_b, by Hessian-vector products

The maximum is sought by e_0 = 0, e_{t+1} = r * grad L_b(w + e_t) / |grad L_b(w + e_t)|, the best point met counts. Its first step is
that of SAM; its fixed points satisfy the condition of a maximum on the sphere, grad L = mu e; where L_b is convex no step goes
down, and on a quadratic at its minimum it is the power iteration, which finds r^2 lambda_max / 2. What is found is a lower bound.

Hessian-vector products
    double_backward      H v = grad <grad L, v>: exact, of a model that quantizes nothing
    finite_differences   H v ~ (grad L(w + h v) - grad L(w - h v)) / 2h,  h = step |w| / |v|: where rounding is in the graph. A second
                         backward would differentiate straight-through gradients, in which rounding does not occur, so that
                         it answers for another function; a step that moves weights over many rounding thresholds sees the
                         landscape that training sees, blurred over that step. Such a matrix need not be symmetric: the
                         eigenvalue is the Rayleigh quotient, and ``residual`` says how far it is from an eigenpair.
Of exact products Lanczos' method makes the most. Noise it takes for further eigenvalues, so that finite differences go through
power iteration: on H, and on H - lambda I where H's largest in magnitude, lambda, is negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtrain.nn.linear import QuantizedLayer

LossOf = Callable[[nn.Module], Tensor]
DOUBLE_BACKWARD, FINITE_DIFFERENCES = "double_backward", "finite_differences"


@dataclass(frozen=True)
class MSharpness:
    """mean: of the increases of the loss, nats per token. per_batch: each. radius: r, in units of the weights."""

    mean: float
    per_batch: tuple[float, ...]
    radius: float
    loss: float


@dataclass(frozen=True)
class TopEigenvalue:
    """value: v^T H v of the best unit vector v found. residual: |H v - value v| / |value|, small where it converged. iterations:
    Hessian-vector products used. method: ``double_backward`` or ``finite_differences``."""

    value: float
    residual: float
    iterations: int
    method: str


class _Weights:
    """The parameters that are trained, as a list of tensors; they are moved in place and put back exactly."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError("no parameter of the model requires a gradient: there is no direction to go")
        self.start = [p.detach().clone() for p in self.parameters]
        self.norm = norm(self.start)

    @contextmanager
    def moved(self, direction: Sequence[Tensor], length: float) -> Iterator[None]:
        """w + length * direction, within."""
        try:
            with torch.no_grad():
                for p, d in zip(self.parameters, direction, strict=True):
                    p.add_(d, alpha=length)
            yield
        finally:
            with torch.no_grad():
                for p, w in zip(self.parameters, self.start, strict=True):
                    p.copy_(w)

    def gradient(self, loss: Tensor, *, differentiable: bool = False) -> list[Tensor]:
        found = torch.autograd.grad(loss, self.parameters, create_graph=differentiable, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, found, strict=True)]

    def random(self, seed: int) -> list[Tensor]:
        """A unit vector."""
        generator = torch.Generator().manual_seed(seed)
        found = [torch.randn(p.shape, generator=generator).to(p) for p in self.parameters]
        return scaled(found, 1 / norm(found))


def norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean, over all of them."""
    return math.sqrt(sum(float(t.detach().double().square().sum()) for t in tensors))


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.detach().double() * y.detach().double()).sum()) for x, y in zip(a, b, strict=True))


def scaled(tensors: Sequence[Tensor], factor: float) -> list[Tensor]:
    return [t.detach() * factor for t in tensors]


def m_sharpness(
    model: nn.Module, losses: Sequence[LossOf], *, rho: float = 0.005, steps: int = 3, seed: int = 0
) -> MSharpness:
    """losses: of each micro-batch, the model -> its mean loss, 0-d. rho: the radius relative to the norm of all trained
    parameters. steps: of the ascent, a forward and backward each. seed: of the direction taken where the gradient vanishes.

    Raises ValueError for rho or steps that are not positive and for no micro-batch. The model is as before afterwards.
    """
    if not rho > 0 or steps < 1:
        raise ValueError(f"rho={rho}, steps={steps}: both must be positive, for example rho=0.005 steps=3")
    if not losses:
        raise ValueError("no micro-batch: m-sharpness is a mean over micro-batches, give one or more")
    weights = _Weights(model)
    radius = rho * weights.norm
    increases, starts = [], []
    for loss_of in losses:
        loss = loss_of(model)
        starts.append(float(loss.detach()))
        best, gradient = starts[-1], weights.gradient(loss)
        for _ in range(steps):
            length = norm(gradient)
            direction = scaled(gradient, 1 / length) if length > 0 else weights.random(seed)
            with weights.moved(direction, radius):
                loss = loss_of(model)
                gradient = weights.gradient(loss)
            best = max(best, float(loss.detach())) if math.isfinite(float(loss.detach())) else math.inf
            if not math.isfinite(best):
                break
        increases.append(best - starts[-1])
    mean = sum(increases) / len(increases)
    return MSharpness(mean, tuple(increases), radius, sum(starts) / len(starts))


def quantizes(model: nn.Module) -> bool:
    """Whether rounding is in the graph of the model's loss."""
    return any(isinstance(m, QuantizedLayer) and m.recipe.quantizes for m in model.modules())


def _product(
    model: nn.Module, losses: Sequence[LossOf], weights: _Weights, method: str, step: float
) -> Callable[[list[Tensor]], list[Tensor]]:
    """v -> H v of the mean loss."""

    def add(total: list[Tensor], more: Sequence[Tensor], factor: float) -> None:
        for t, x in zip(total, more, strict=True):
            t.add_(x.detach(), alpha=factor)

    def double_backward(v: list[Tensor]) -> list[Tensor]:
        total = [torch.zeros_like(p) for p in weights.parameters]
        for loss_of in losses:
            gradient = weights.gradient(loss_of(model), differentiable=True)
            along = torch.stack([(g * x).sum() for g, x in zip(gradient, v, strict=True)]).sum()
            if along.requires_grad:  # of a linear loss the gradient is constant
                add(total, weights.gradient(along), 1 / len(losses))
        return total

    def finite_differences(v: list[Tensor]) -> list[Tensor]:
        h = step * weights.norm / norm(v)
        total = [torch.zeros_like(p) for p in weights.parameters]
        for sign in (1.0, -1.0):
            for loss_of in losses:
                with weights.moved(v, sign * h):
                    add(total, weights.gradient(loss_of(model)), sign / (2 * h * len(losses)))
        return total

    return double_backward if method == DOUBLE_BACKWARD else finite_differences


def top_eigenvalue(
    model: nn.Module,
    losses: Sequence[LossOf],
    *,
    iterations: int = 20,
    step: float = 0.005,
    seed: int = 0,
    method: str | None = None,
) -> TopEigenvalue:
    """The largest (most positive) eigenvalue of the Hessian of the mean over ``losses``.

    iterations: Hessian-vector products, at most (of finite differences, of each power iteration). step: of the finite differences, relative to the norm of the weights. method: None takes
    double_backward where the model quantizes nothing, else finite_differences.

    Raises ValueError for an unknown method, for double_backward on a model that quantizes, for iterations below 2 and for no
    micro-batch.
    """
    if method is None:
        method = FINITE_DIFFERENCES if quantizes(model) else DOUBLE_BACKWARD
    if method not in (DOUBLE_BACKWARD, FINITE_DIFFERENCES):
        raise ValueError(f"method={method!r}: allowed are {DOUBLE_BACKWARD} and {FINITE_DIFFERENCES}")
    if method == DOUBLE_BACKWARD and quantizes(model):
        raise ValueError(
            f"method={method!r} on a quantized model: straight-through gradients have no second derivative that means "
            f"anything; use {FINITE_DIFFERENCES}"
        )
    if iterations < 2 or not losses or not step > 0:
        raise ValueError(
            f"iterations={iterations}, step={step}, {len(losses)} micro-batches: needs 2, >0 and 1 or more"
        )
    weights = _Weights(model)
    product = _product(model, losses, weights, method, step)
    if method == DOUBLE_BACKWARD:
        return TopEigenvalue(*_lanczos(product, weights.random(seed), iterations), method)
    value, residual, used = _power_iteration(product, weights.random(seed), iterations, 0.0)
    if value < 0 and residual < 1:  # it has found that one, rather than nothing yet
        value, residual, more = _power_iteration(product, weights.random(seed + 1), iterations, value)
        used += more
    return TopEigenvalue(value, residual, used, method)


CONVERGED = 1e-3
"""Relative residual at which the iteration stops: the error of the eigenvalue of a symmetric matrix is of its square."""


def _lanczos(
    product: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], iterations: int
) -> tuple[float, float, int]:
    """(largest Ritz value, its residual / |value|, products) of H in the Krylov space of the unit vector v.

    Without orthogonalizing again, so that three vectors are kept: copies of an eigenvalue that has converged may appear,
    which does not move the largest one (Paige, 1972).
    """
    diagonal: list[float] = []
    beside: list[float] = []
    previous: list[Tensor] | None = None
    value, residual = 0.0, math.inf
    for i in range(iterations):
        w = product(v)
        diagonal.append(inner(w, v))
        if not math.isfinite(diagonal[-1]):
            return diagonal[-1], math.inf, i + 1
        w = [x.detach() - diagonal[-1] * y for x, y in zip(w, v, strict=True)]
        if previous is not None:
            w = [x - beside[-1] * y for x, y in zip(w, previous, strict=True)]
        length = norm(w)
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            tridiagonal += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        value, left = float(values[-1]), length * abs(float(vectors[-1, -1]))
        residual = left / abs(value) if value else (math.inf if left else 0.0)
        if residual < CONVERGED:
            return value, residual, i + 1
        previous, v = v, scaled(w, 1 / length)
        beside.append(length)
    return value, residual, iterations


def _power_iteration(
    product: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], iterations: int, shift: float
) -> tuple[float, float, int]:
    """(v^T H v, |H v - value v| / |value|, products) of the largest |eigenvalue| of H - shift I."""
    value, residual = 0.0, math.inf
    for i in range(iterations):
        hv = product(v)
        value = inner(hv, v)
        square = norm(hv) ** 2
        if square == 0.0:
            return 0.0, 0.0, i + 1
        residual = math.sqrt(max(0.0, square - value**2)) / abs(value) if value else math.inf
        if residual < CONVERGED:
            return value, residual, i + 1
        moved = [x.detach() - shift * y for x, y in zip(hv, v, strict=True)]
        length = norm(moved)
        if length == 0.0 or not math.isfinite(length):
            return value, residual, i + 1
        v = scaled(moved, 1 / length)
    return value, residual, iterations
