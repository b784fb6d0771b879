"""Quantized gradients: direction, length, bias, and what averaging removes (arXiv 2407.11722)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from qtrain.analysis.gradients import Statistics, gradient_study
from qtrain.quant import (
    DgradRecipe,
    FpropRecipe,
    LinearRecipe,
    ModelRecipe,
    QuantSpec,
    WgradRecipe,
    fake_quantize,
)

from .bench import SEEDS, Bench, quality
from .claim import Claim, Measured

SOURCE = "arXiv 2407.11722, gradients"
DRAWS = 8


def gradients_in(spec: str) -> ModelRecipe:
    """Gradients in both backward GEMMs, nothing else."""
    linear = LinearRecipe(dgrad=DgradRecipe(grad_output=spec), wgrad=WgradRecipe(grad_output=spec))
    return ModelRecipe(linear=linear, exclude=["lm_head"])


W8A8G8 = ModelRecipe(
    linear=LinearRecipe(
        fprop=FpropRecipe(input="int8_row", weight="int8_row"),
        dgrad=DgradRecipe(grad_output="int8_row", weight="fprop"),
        wgrad=WgradRecipe(grad_output="int8_row", input="fprop"),
    ),
    exclude=["lm_head"],
)


def of_gradient(recipe: ModelRecipe, number: Callable[[Statistics], float]) -> Callable[[Bench], Measured]:
    """Of the whole gradient of the trained small model, over seeds."""

    def measure(bench: Bench) -> Measured:
        found = []
        for seed in SEEDS:
            model = bench.baseline(seed).model
            loss_of = bench.loss_of(bench.val_batch()[:16])
            study = gradient_study(model, {"it": recipe}, loss_of, draws=DRAWS, seed=seed)
            found.append(number(study["it"].total))
        return Measured.mean(
            found, f"whole gradient of the trained small model, {DRAWS} draws, seeds {SEEDS}"
        )

    return measure


def excess(s: Statistics) -> float:
    """|mean error|^2 over what it is on average where nothing is biased."""
    return 1.0 + (s.bias / s.floor) ** 2 if s.bias > 0 else dict(s.decay_curve)[s.draws] / s.floor**2


def of_output_gradients(number: Callable[[torch.Tensor], float]) -> Callable[[Bench], Measured]:
    """Of the gradients [T, O] that reach the linear layers, over layers and seeds."""

    def measure(bench: Bench) -> Measured:
        found = []
        for seed in SEEDS:
            g = [
                torch.cat(parts).flatten(0, -2).float()
                for n, parts in bench.observed(seed)[1].g.items()
                if n != "lm_head"
            ]
            found += [number(one) for one in g]
        return Measured.mean(found, f"output gradients of the trained small model, seeds {SEEDS}")

    return measure


def underflow(g: torch.Tensor) -> float:
    """Share of what is not zero that int4 with one scale a tensor rounds to zero."""
    return float((fake_quantize(g, QuantSpec.parse("int4_tensor"))[g != 0] == 0).double().mean())


def noise(bench: Bench) -> Measured:
    """Squared error of one draw of stochastic rounding over that of nearest, dB."""
    found = []
    for seed in SEEDS:
        recipes = {spec: gradients_in(spec) for spec in ("int4_row", "int4_row_sr")}
        loss_of = bench.loss_of(bench.val_batch()[:16])
        study = gradient_study(bench.baseline(seed).model, recipes, loss_of, draws=1, seed=seed)
        nearest, stochastic = (study[spec].total.decay_curve[0][1] for spec in recipes)
        found.append(10 * math.log10(stochastic / nearest))
    return Measured.mean(found, f"whole gradient of the trained small model, seeds {SEEDS}")


CLAIMS = (
    Claim(name="g8_cosine", says="W8A8G8 keeps the gradient's direction", source=SOURCE, quantity="cosine", low=0.99,
          measure=of_gradient(W8A8G8, lambda s: s.cosine)),
    Claim(name="g8_alignment", says="and its length", source=SOURCE, quantity="<h, g> / <g, g>", low=0.98, high=1.02,
          measure=of_gradient(W8A8G8, lambda s: s.alignment)),
    Claim(name="g4_sr_unbiased", says="Stochastic rounding of gradients to int4 has no bias", source=SOURCE,
          quantity="|mean error|^2 over its expectation without bias", low=0.7, high=1.3,
          measure=of_gradient(gradients_in("int4_row_sr"), excess)),
    Claim(name="g4_sr_decay", says="so that the error of an average of N draws shrinks as 1/N", source=SOURCE,
          quantity="exponent of N", low=-1.15, high=-0.85, measure=of_gradient(gradients_in("int4_row_sr"), lambda s: s.decay)),
    Claim(name="g4_nearest_bias", says="Rounding to nearest leaves an error that no averaging removes", source=SOURCE,
          quantity="bias over the gradient's length", low=0.01, measure=of_gradient(gradients_in("int4_row"), lambda s: s.bias)),
    Claim(name="g4_sr_noise", says="but it is the more exact one in a single draw: stochastic rounding errs by up to 3 dB more", source=SOURCE,
          quantity="squared error of stochastic over nearest, dB", low=0.0, measure=noise),
    Claim(name="g4_underflow", says="Gradients are hard since most of them are small: int4 with one scale a tensor zeroes them", source=SOURCE,
          quantity="share of nonzero entries decoded to 0", low=0.5, measure=of_output_gradients(underflow)),
    Claim(name="g4_token", says="a scale a token helps", source=SOURCE, quantity="SQNR gained, dB", low=0.0,
          measure=of_output_gradients(lambda g: quality(g, "int4_row") - quality(g, "int4_tensor"))),
)  # fmt: skip
