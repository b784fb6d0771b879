"""How well do quantized gradients stand in for the true ones? At fixed weights and a fixed batch, under any recipes.

g the gradient in high precision, h_1 .. h_N the recipe's under N draws of its random bits (N steps of the clock), e_n = h_n - g:

    cosine      mean_n <h_n, g> / (|h_n| |g|)
    alignment   mean_n <h_n, g> / <g, g>                            1: as long as it should be, along g
    deviation   S / |g|,  S^2 = sum_n |e_n - mean e|^2 / (N - 1)    the noise of one draw
    bias        sqrt(max(0, |mean e|^2 - S^2 / N)) / |g|            what no averaging removes; 0 of unbiased rounding but for noise
    decay       ln( |mean e|^2 / mean_n |e_n|^2 ) / ln N            -1: averages away as 1/N; 0: does not

The subtraction of S^2 / N makes |mean e|^2 an unbiased estimate; ``floor`` = S / (sqrt(N) |g|) says how large a bias has to be to be
seen. A deterministic recipe has one draw, no deviation and decay 0.

Each layer shows its three results, y (fprop), dx (dgrad) and dW (wgrad), twice: ``model``, as they are within the quantized model, where
errors of other layers arrive too, and ``own``, of this layer alone on the high-precision x and g: which GEMM is to blame.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtrain.nn.inventory import linear_layers
from qtrain.nn.quantizers import start_steps
from qtrain.nn.surgery import apply_recipe
from qtrain.quant import ModelRecipe

GEMMS = ("fprop", "dgrad", "wgrad")
LossOf = Callable[[nn.Module], Tensor]


@dataclass
class Sums:
    """What the statistics of a tensor need of its draws, as sums over elements, so that those of several tensors add.

    g2: |g|^2. h2, gh, e2: |h_n|^2, <h_n, g>, |e_n|^2 of each draw. mean_e2: |mean of the first n errors|^2 for n = 1, 2, 4 .. N.
    """

    elements: int = 0
    g2: float = 0.0
    h2: list[float] = field(default_factory=list)
    gh: list[float] = field(default_factory=list)
    e2: list[float] = field(default_factory=list)
    mean_e2: dict[int, float] = field(default_factory=dict)

    @staticmethod
    def of(parts: Iterable[Sums]) -> Sums:
        """Of all elements of several tensors, which have equally many draws."""
        found = list(parts)
        if not found:
            return Sums()
        return Sums(
            elements=sum(p.elements for p in found),
            g2=sum(p.g2 for p in found),
            h2=[sum(x) for x in zip(*(p.h2 for p in found), strict=True)],
            gh=[sum(x) for x in zip(*(p.gh for p in found), strict=True)],
            e2=[sum(x) for x in zip(*(p.e2 for p in found), strict=True)],
            mean_e2={n: sum(p.mean_e2[n] for p in found) for n in found[0].mean_e2},
        )


@dataclass(frozen=True)
class Statistics:
    """See the module. Relative to |g|; of a reference that is zero everywhere: nan. decay_curve: (n, |mean of n errors|^2 / |g|^2)."""

    draws: int
    elements: int
    norm: float
    cosine: float
    alignment: float
    bias: float
    floor: float
    deviation: float
    decay: float
    decay_curve: tuple[tuple[int, float], ...]

    @staticmethod
    def of(s: Sums) -> Statistics:
        draws, norm = len(s.e2), math.sqrt(s.g2)
        if not draws or norm == 0.0:
            nan = math.nan
            return Statistics(draws, s.elements, norm, nan, nan, nan, nan, nan, nan, ())
        lengths = [math.sqrt(h2) * norm for h2 in s.h2]
        cosines = [gh / length if length else 0.0 for gh, length in zip(s.gh, lengths, strict=True)]
        single, averaged = sum(s.e2) / draws, s.mean_e2[draws]
        variance = max(0.0, (sum(s.e2) - draws * averaged) / (draws - 1)) if draws > 1 else 0.0
        decay = math.log(averaged / single) / math.log(draws) if draws > 1 and averaged > 0 else 0.0
        return Statistics(
            draws=draws,
            elements=s.elements,
            norm=norm,
            cosine=sum(cosines) / draws,
            alignment=sum(s.gh) / draws / s.g2,
            bias=math.sqrt(max(0.0, averaged - variance / draws)) / norm,
            floor=math.sqrt(variance / draws) / norm,
            deviation=math.sqrt(variance) / norm,
            decay=decay,
            decay_curve=tuple((n, e2 / s.g2) for n, e2 in sorted(s.mean_e2.items())),
        )


class _Draws:
    """The sums of one tensor, draw after draw. reference: g."""

    def __init__(self, reference: Tensor, draws: int) -> None:
        self.g, self.draws = reference, draws
        self.total: Tensor | None = None
        self.sums = Sums(reference.numel(), _dot(reference, reference))

    def add(self, h: Tensor) -> None:
        error = h.to(torch.float32) - self.g
        for values, dot in (
            (self.sums.h2, _dot(h, h)),
            (self.sums.gh, _dot(h, self.g)),
            (self.sums.e2, _dot(error, error)),
        ):
            values.append(dot)
        self.total = error if self.total is None else self.total.add_(error)
        n = len(self.sums.e2)
        if n == self.draws or n & (n - 1) == 0:
            self.sums.mean_e2[n] = _dot(self.total, self.total) / n**2


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten().to(torch.float64), b.flatten().to(torch.float64)))


@dataclass
class Pass:
    """One forward and backward: of each layer its x, y, g and dx (joined where it is called more than once), and the
    gradient of each parameter."""

    x: dict[str, list[Tensor]] = field(default_factory=dict)
    y: dict[str, list[Tensor]] = field(default_factory=dict)
    g: dict[str, list[Tensor]] = field(default_factory=dict)
    dx: dict[str, list[Tensor]] = field(default_factory=dict)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    loss: float = math.nan

    def results(self) -> dict[tuple[str, str], Tensor]:
        """(layer, fprop or dgrad) -> y or dx, flat."""
        found = {}
        for gemm, tensors in (("fprop", self.y), ("dgrad", self.dx)):
            for name, parts in tensors.items():
                found[name, gemm] = torch.cat([part.flatten() for part in parts]).to(torch.float32)
        return found


@contextmanager
def _recorded(layers: Mapping[str, nn.Module], into: Pass) -> Iterator[None]:
    def after_forward(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            into.x.setdefault(name, []).append(inputs[0].detach())
            into.y.setdefault(name, []).append(output.detach())

        return hook

    def after_backward(name: str) -> Any:
        def hook(
            _: nn.Module, grad_input: tuple[Tensor | None, ...], grad_output: tuple[Tensor, ...]
        ) -> None:
            # The backward meets the calls of a shared layer in reverse order
            into.g.setdefault(name, []).insert(0, grad_output[0].detach())
            if grad_input[0] is not None:
                into.dx.setdefault(name, []).insert(0, grad_input[0].detach())

        return hook

    handles = [layer.register_forward_hook(after_forward(name)) for name, layer in layers.items()]
    handles += [layer.register_full_backward_hook(after_backward(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record_pass(model: nn.Module, loss_of: LossOf) -> Pass:
    """A forward and backward of ``model``, whose gradients are then those of this loss alone."""
    found = Pass()
    model.zero_grad(set_to_none=True)
    with _recorded(linear_layers(model), found), warnings.catch_warnings():
        # A layer that reads the data has no dx; torch says so at each backward
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        loss = loss_of(model)
        loss.backward()
    found.loss = float(loss.detach())
    found.parameters = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    return found


def _alone(model: nn.Module, reference: Pass) -> Iterator[tuple[tuple[str, str], Tensor]]:
    """Each layer by itself on the reference's x and g: its (name, GEMM) and result, flat."""
    for name, layer in linear_layers(model).items():
        results: dict[str, list[Tensor]] = {gemm: [] for gemm in GEMMS}
        for x, g in zip(reference.x[name], reference.g.get(name, []), strict=False):
            x = x.detach().requires_grad_()
            y = layer(x)
            weight = layer.weight
            assert isinstance(weight, Tensor)
            dx, dw = torch.autograd.grad(y, (x, weight), g.to(y.dtype))
            for gemm, tensor in zip(GEMMS, (y.detach(), dx, dw), strict=True):
                results[gemm].append(tensor.flatten())
        if results["wgrad"]:
            yield (name, "fprop"), torch.cat(results["fprop"])
            if name in reference.dx:
                yield (name, "dgrad"), torch.cat(results["dgrad"])
            yield (name, "wgrad"), torch.stack(results["wgrad"]).sum(0)


@dataclass(frozen=True)
class RecipeGradients:
    """loss: of the first draw, nats per token. total: over the gradients of all parameters. model, own: by (layer, GEMM)."""

    loss: float
    total: Statistics
    model: Mapping[tuple[str, str], Statistics]
    own: Mapping[tuple[str, str], Statistics]

    def worst(self, count: int) -> list[tuple[str, str]]:
        """The layers and GEMMs of a backward whose own cosine is lowest."""
        backward = [key for key in self.own if key[1] != "fprop" and not math.isnan(self.own[key].cosine)]
        return sorted(backward, key=lambda key: self.own[key].cosine)[:count]


class _Study:
    """The reference of a model on a batch, and recipes held against it, on a copy of the model."""

    def __init__(self, model: nn.Module, loss_of: LossOf, seed: int) -> None:
        self.model = copy.deepcopy(model).eval()
        self.loss_of, self.seed = loss_of, seed
        apply_recipe(self.model, ModelRecipe())
        self.reference = record_pass(self.model, loss_of)
        self.alone = dict(_alone(self.model, self.reference))
        names = {id(p): n for n, p in self.model.named_parameters()}
        layers = linear_layers(self.model)
        self.weights = {name: names[id(layer.weight)] for name, layer in layers.items()}

    def recipe(self, recipe: ModelRecipe, draws: int) -> RecipeGradients:
        report = apply_recipe(self.model, recipe, seed=self.seed)
        if any(layer.learns_steps for layer in report.plan.values()):
            start_steps(self.model, lambda m: self.loss_of(m))
        if not any(layer.stochastic for layer in report.plan.values()):
            draws = 1
        results = {key: _Draws(t, draws) for key, t in self.reference.results().items()}
        parameters = {name: _Draws(t, draws) for name, t in self.reference.parameters.items()}
        own = {key: _Draws(t, draws) for key, t in self.alone.items()}
        loss = math.nan
        for draw in range(draws):
            report.clock.set(step=draw)
            seen = record_pass(self.model, self.loss_of)
            loss = seen.loss if draw == 0 else loss
            for key, tensor in seen.results().items():
                results[key].add(tensor)
            for name, tensor in seen.parameters.items():
                parameters[name].add(tensor)
            for key, tensor in _alone(self.model, self.reference):
                own[key].add(tensor)
        model = {key: Statistics.of(d.sums) for key, d in results.items()}
        model |= {
            (layer, "wgrad"): Statistics.of(parameters[name].sums)
            for layer, name in self.weights.items()
            if name in parameters
        }
        total = Sums.of(d.sums for d in parameters.values())
        return RecipeGradients(
            loss, Statistics.of(total), model, {key: Statistics.of(d.sums) for key, d in own.items()}
        )


def gradient_study(
    model: nn.Module, recipes: Mapping[str, ModelRecipe], loss_of: LossOf, *, draws: int = 8, seed: int = 0
) -> dict[str, RecipeGradients]:
    """Every recipe against the model in high precision. The model itself stays as it is; a copy is worked on, in
    evaluation mode (no dropout).

    loss_of: the model -> its mean loss on the batch, 0-d. draws: of the random bits. Learned ranges begin on this very
    batch, delayed and static ones take the operand's own maximum. The wgrad of a tied weight is the whole gradient of the
    parameter under ``model``. Raises ValueError for draws below 1 and as ``apply_recipe`` does.
    """
    if draws < 1:
        raise ValueError(
            f"draws={draws}: must be 1 or more; the bias of stochastic rounding needs 4 or more to show"
        )
    study = _Study(model, loss_of, seed)
    return {name: study.recipe(recipe, draws) for name, recipe in recipes.items()}
