"""Weights and activations of a trained model in few bits (arXiv 2407.11722)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qtrain.nn.observation import sqnr_db
from qtrain.nn.surgery import apply_recipe
from qtrain.quant import FpropRecipe, LinearRecipe, ModelRecipe, QuantSpec, fake_quantize

from .bench import SEEDS, Bench, quality
from .claim import Claim, Measured

PAPER = "arXiv 2407.11722"
OUTLIERS, FACTOR = 2, 30.0  # channels made large, and how large: what transformers of many sizes show


def weights(bench: Bench, seed: int) -> Iterator[Tensor]:
    """[O, I] of every linear layer but the head."""
    return (
        w.float()
        for name, w in bench.baseline(seed).model.state_dict().items()
        if w.dim() == 2 and name.startswith("blocks.")
    )


def activations(bench: Bench, seed: int, ending: str = "") -> Iterator[Tensor]:
    """[T, I] into every linear layer of the blocks whose name ends so."""
    for name, parts in bench.observed(seed)[1].x.items():
        if name.startswith("blocks.") and name.endswith(ending):
            yield torch.cat([p.flatten(0, -2) for p in parts]).float()


def mean_gain(
    tensors: Callable[[Bench, int], Iterator[Tensor]], gain: Callable[[Tensor], float], of: str
) -> Callable[[Bench], Measured]:
    """The mean over layers and seeds, its interval over them: of what such a layer gains."""

    def measure(bench: Bench) -> Measured:
        found = [gain(t) for seed in SEEDS for t in tensors(bench, seed)]
        return Measured.mean(found, f"{of} of the trained small model, seeds {SEEDS}")

    return measure


def with_outliers(x: Tensor) -> Tensor:
    """The first channels FACTOR times as large."""
    x = x.clone()
    x[:, :OUTLIERS] *= FACTOR
    return x


def better(one: str, other: str) -> Callable[[Tensor], float]:
    return lambda x: quality(x, one) - quality(x, other)


def lost_to_outliers(x: Tensor) -> float:
    """SQNR that the ordinary channels lose when a few others are large, a scale a token, dB."""
    spec, ordinary = QuantSpec.parse("int4_row"), x[:, OUTLIERS:]
    alone = fake_quantize(x, spec)[:, OUTLIERS:]
    beside = fake_quantize(with_outliers(x), spec)[:, OUTLIERS:]
    return sqnr_db(ordinary, alone) - sqnr_db(ordinary, beside)


def w8a8_loss(bench: Bench) -> Measured:
    gaps = []
    recipe = ModelRecipe(
        linear=LinearRecipe(fprop=FpropRecipe(input="int8_row", weight="int8_row")), exclude=["lm_head"]
    )
    for seed in SEEDS:
        model = bench.baseline(seed).model
        loss_of = bench.loss_of(bench.val_batch())
        with torch.no_grad():
            plain = float(loss_of(model))
            apply_recipe(model, recipe)
            gaps.append(100 * (float(loss_of(model)) / plain - 1))
    return Measured.mean(gaps, f"validation loss of the trained small model, seeds {SEEDS}")


CLAIMS = (
    Claim(name="w4_row", says="W4: a scale a row is better than one a tensor on trained weights", source=PAPER,
          quantity="SQNR gained, dB", low=0.0, measure=mean_gain(weights, better("int4_row", "int4_tensor"), "weights")),
    Claim(name="a4_token", says="A4: one scale a tensor is worse than one a token where channels are outliers", source=PAPER,
          quantity="SQNR gained by tokens, dB", low=0.0,
          measure=mean_gain(activations, lambda x: better("int4_row", "int4_tensor")(with_outliers(x)), "activations with 2 channels x 30")),
    Claim(name="a4_outliers", says="A4 suffers from outlier channels: they take the levels of all others", source=PAPER,
          quantity="SQNR lost by the other channels, dB", low=6.0, measure=mean_gain(activations, lost_to_outliers, "activations with 2 channels x 30")),
    Claim(name="a4_asymmetric", says="A zero point helps activations that lie on one side of zero (after GELU)", source=PAPER,
          quantity="SQNR gained, dB", low=1.0,
          measure=mean_gain(lambda b, s: activations(b, s, "mlp.down"), better("int4_row_asym", "int4_row"), "inputs of mlp.down")),
    Claim(name="w8a8_forward", says="W8A8 leaves the loss of a trained model as it is", source=PAPER,
          quantity="change of the loss, %", low=-1.0, high=1.0, measure=w8a8_loss),
)  # fmt: skip
