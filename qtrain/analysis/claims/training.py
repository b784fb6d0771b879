"""Paired trainings of the small model: the arms of a seed share initial weights and batches.

Thresholds: 0.2 nats (broken) and 0.03 (nothing to speak of) are those of docs/optimizer_states.md, 0.05 for m1 is some two percent
of the loss; W8A8 has the one percent of its claim, the others the sign of theirs.
"""

from __future__ import annotations

from collections.abc import Callable

from qtrain.quant import DgradRecipe, FpropRecipe, LinearRecipe, ModelRecipe, Transform, WgradRecipe

from .bench import SEEDS, Arm, Bench, gap
from .claim import Claim, Measured

PAPER, QUEST = "arXiv 2407.11722", "arXiv 2502.05003"


def _forward(w: str | None, a: str | None, transform: str | None = None) -> ModelRecipe:
    """Forward operands, and again in the backward; gradients stay high precision."""
    linear = LinearRecipe(
        fprop=FpropRecipe(
            input=a, weight=w, transform=None if transform is None else Transform.parse(transform)
        ),
        dgrad=DgradRecipe(weight=None if w is None else "fprop"),
        wgrad=WgradRecipe(input=None if a is None else "fprop"),
    )
    return ModelRecipe(linear=linear, exclude=["lm_head"])


PLAIN = ModelRecipe()
ARMS = {
    "baseline": Arm(PLAIN),
    "w8a8": Arm(_forward("int8_row", "int8_row")),
    "a4_tensor": Arm(_forward(None, "int4_tensor")),
    "a4_token": Arm(_forward(None, "int4_row")),
    "w4a4_absmax": Arm(_forward("int4_row", "int4_row")),
    "w4a4_quest": Arm(_forward("midrise4_row_gaussian_trust", "midrise4_row_gaussian_trust", "hadamard:64")),
    "m2_int8": Arm(PLAIN, exp_avg_sq="int8_tensor"),
    "m2_dynamic8": Arm(PLAIN, exp_avg_sq="dynamic8_group128"),
    "m1_int4_row": Arm(PLAIN, exp_avg="int4_row"),
}


def between(arm: str, reference: str = "baseline", *, percent: bool = False) -> Callable[[Bench], Measured]:
    """The gap of the validation losses, seed by seed."""

    def measure(bench: Bench) -> Measured:
        losses = [bench.losses(name, ARMS[name]) for name in (arm, reference)]
        return Measured.mean(gap(losses[0], losses[1], percent=percent), f"{bench.size.steps} steps of the small model, seeds {SEEDS}")  # fmt: skip

    return measure


NATS = "gap, nats per byte"
CLAIMS = (
    Claim(name="train_w8a8", says="W8A8 trains within one percent of the baseline", source=PAPER, quantity="gap, % of the loss",
          low=-1.0, high=1.0, measure=between("w8a8", percent=True)),
    Claim(name="train_m2_int8", says="m2 in linear int8 with one scale a tensor breaks training", source=PAPER, quantity=NATS, low=0.2, measure=between("m2_int8")),
    Claim(name="train_m2_dynamic8", says="m2 in dynamic 8 bits costs nothing to speak of", source=PAPER, quantity=NATS,
          low=-0.03, high=0.03, measure=between("m2_dynamic8")),
    Claim(name="train_m1_int4", says="m1 tolerates 4 bits with a scale a row", source=PAPER, quantity=NATS,
          low=-0.05, high=0.05, measure=between("m1_int4_row")),
    Claim(name="train_a4_token", says="A4: one scale a tensor trains worse than one a token", source=PAPER, quantity=NATS, low=0.0,
          measure=between("a4_tensor", "a4_token")),
    Claim(name="train_quest", says="W4A4: QuEST trains better than absmax", source=QUEST, quantity=NATS, high=0.0,
          measure=between("w4a4_quest", "w4a4_absmax")),
)  # fmt: skip
