"""What happens to Adam's moments in few bits (arXiv 2407.11722)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qtrain.nn.observation import sqnr_db
from qtrain.optim import AdamStateRecipe, AdamW
from qtrain.quant import QuantSpec, dequantize, quantize

from .bench import SEEDS, Bench, quality
from .claim import Claim, Measured

PAPER = "arXiv 2407.11722, second moment"
# Updates 46 times too large (below) outweigh all others together from this share on: share * 46^2 = 1
HARMFUL = 1 / 46**2
ON_TRAINED = f"matrices of the small model after training, seeds {SEEDS}"


def decoded(v: Tensor, spec: str) -> Tensor:
    """A second moment as it is read back; signed codebooks stand for their unsigned counterparts, as in AdamW."""
    chosen = AdamStateRecipe(exp_avg_sq=spec).exp_avg_sq
    assert isinstance(chosen, QuantSpec)
    return dequantize(quantize(v, chosen))


def lost_share(v: Tensor, spec: str) -> float:
    """Of the entries above zero, those that decode to zero."""
    return float((decoded(v, spec)[v > 0] == 0).double().mean())


def over_trained(bench: Bench, share: Callable[[Tensor], float], kind: str = "exp_avg_sq") -> Measured:
    """The mean over matrices, and its interval over them. kind: of the moment."""
    return Measured.mean(
        [share(v) for seed in SEEDS for v in getattr(bench.baseline(seed), kind).values()], ON_TRAINED
    )


def zero_bin(_: Bench) -> Measured:
    wrong = []
    for seed in SEEDS:
        v = torch.exp(6 * torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)))
        zero = decoded(v, "int8_tensor") == 0
        wrong.append(float((zero != (v < v.max() / 254)).double().mean()))
    return Measured.mean(wrong, "log-normal second moments, 64 x 256, 3 samples")


def update_ratios(beta2: float, steps: int, spec: str, gaussian: bool) -> Tensor:
    """|update| under a quantized second moment over that in float32, once the moment is stationary; elements whose v
    fell into the zero bin of int8. The gradient: +-1, or N(0, 1); one element has 1000 times that, and sets the scale."""
    weights = [torch.zeros(32, 128) for _ in range(2)]
    optimizers = [
        AdamW([w], lr=1.0, betas=(0.0, beta2), eps=0.0, weight_decay=0.0, states={"exp_avg_sq": s})
        for w, s in zip(weights, (None, spec), strict=True)
    ]
    generator = torch.Generator().manual_seed(0)
    moved = weights
    for step in range(steps):
        g = torch.randn(32, 128, generator=generator)
        g = g if gaussian else torch.sign(g)
        g[0, 0] = 1000.0
        for w, optimizer in zip(weights, optimizers, strict=True):
            w.grad = g.clone()
            if step == steps - 1:
                w.zero_()  # what is left afterwards is the update
            optimizer.step()
    ratio = (moved[1] / moved[0]).abs().flatten()[1:]
    return ratio[torch.isfinite(ratio)]


STEPS = 3000  # 1 - .999^3000 = .95


def blow_up(beta2: float, quantile: float, gaussian: bool) -> Callable[[Bench], Measured]:
    def measure(_: Bench) -> Measured:
        ratios = update_ratios(beta2, min(STEPS, round(3 / (1 - beta2))), "int8_tensor", gaussian)
        kind = "Gaussian gradients" if gaussian else "gradients of one magnitude"
        return Measured.exactly(
            float(torch.quantile(ratios, quantile)), f"AdamW, {kind}, {len(ratios):,} elements"
        )

    return measure


def dynamic_ratio(_: Bench) -> Measured:
    ratios = update_ratios(0.999, STEPS, "dynamic8_group128", False)
    worst = torch.maximum(ratios, 1 / ratios).max()
    return Measured.exactly(float(worst), "AdamW, gradients of one magnitude")


def signed_grid(_: Bench) -> Measured:
    gains = []
    for seed in SEEDS:
        v = torch.rand(64, 256, generator=torch.Generator().manual_seed(seed))
        gains.append(sqnr_db(v, decoded(v, "uint8_tensor")) - sqnr_db(v, decoded(v, "int8_tensor")))
    return Measured.mean(gains, "uniform second moments, 3 samples")


def first_moment_gain(bench: Bench) -> Measured:
    return over_trained(bench, lambda m: quality(m, "int4_row") - quality(m, "int4_tensor"), kind="exp_avg")


CLAIMS = (
    Claim(
        name="m2_int8_zero_bin", says="Linear int8 stores every second moment below amax/254 as zero, and no other",
        source=PAPER, quantity="share of entries for which that is wrong", high=1e-4, measure=zero_bin,
    ),
    Claim(
        name="m2_int8_loses", says="so it loses enough entries of real second moments for their updates to outweigh all others", source=PAPER,
        quantity="share of positive entries decoded to 0, one scale a tensor", low=HARMFUL,
        measure=lambda b: over_trained(b, lambda v: lost_share(v, "int8_tensor")),
    ),
    Claim(
        name="m2_int8_blow_up_999", says="an update whose v decodes to 0 is 31.6 times too large at beta2 = .999 and |g| = RMS",
        source=f"{PAPER}: 1/sqrt(1 - beta2)", quantity="median of the ratio to float32", low=28.5, high=34.8,
        measure=blow_up(0.999, 0.5, gaussian=False),
    ),
    Claim(
        name="m2_int8_blow_up_95", says="and 4.5 times at beta2 = .95", source=f"{PAPER}: 1/sqrt(1 - beta2)",
        quantity="median of the ratio to float32", low=4.0, high=5.0, measure=blow_up(0.95, 0.5, gaussian=False),
    ),
    Claim(
        name="m2_int8_blow_up_median", says="with gradients that vary the median is 46 times", source=f"{PAPER}, measured",
        quantity="median of the ratio to float32", low=40, high=52, measure=blow_up(0.999, 0.5, gaussian=True),
    ),
    Claim(
        name="m2_int8_blow_up_p99", says="and the 99th percentile 2500 times", source=f"{PAPER}, measured",
        quantity="99th percentile of the ratio to float32", low=1500, high=4000, measure=blow_up(0.999, 0.99, gaussian=True),
    ),
    Claim(
        name="m2_dynamic8_update", says="Dynamic 8-bit in blocks of 128 leaves updates about as they are",
        source="arXiv 2110.02861", quantity="the worst ratio to float32", high=1.4, measure=dynamic_ratio,
    ),
    Claim(
        name="m2_dynamic8_loses", says="and loses no entry of real second moments to speak of", source="arXiv 2110.02861",
        quantity="share of positive entries decoded to 0", high=1e-3,
        measure=lambda b: over_trained(b, lambda v: lost_share(v, "dynamic8_group128")),
    ),
    Claim(
        name="m2_uint4_loses", says="Linear 4 bits with a zero lose enough of them for that, too", source="arXiv 2309.01507, section 3.2",
        quantity="share of positive entries decoded to 0, blocks of 128", low=HARMFUL,
        measure=lambda b: over_trained(b, lambda v: lost_share(v, "uint4_group128")),
    ),
    Claim(
        name="m2_nozero_keeps", says="and without a zero none", source="arXiv 2309.01507, section 3.2",
        quantity="share of positive entries decoded to 0, blocks of 128", high=0.0,
        measure=lambda b: over_trained(b, lambda v: lost_share(v, "linear4_nozero_group128")),
    ),
    Claim(
        name="m2_signed_grid", says="A signed grid wastes half its codes on the second moment: one bit, 6 dB",
        source=PAPER, quantity="SQNR of uint8 over int8, dB",
        low=20 * math.log10(2) - 0.2, high=20 * math.log10(2) + 0.2, measure=signed_grid,
    ),
    Claim(
        name="m1_4bit_row", says="The first moment in 4 bits is better with a scale a row than with one a tensor",
        source="arXiv 2407.11722, first moment", quantity="SQNR gained, dB", low=0.0, measure=first_moment_gain,
    ),
)  # fmt: skip
