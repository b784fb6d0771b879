"""Claims about low-precision training that ``qtrain verify`` measures on this machine, a file a theme."""

from . import formats, gradients, microscaling, quest, states, training, weights_activations
from .bench import Bench, OutOfTime
from .claim import FAILS, HOLDS, UNKNOWN, Claim, Measured

THEMES: dict[str, tuple[Claim, ...]] = {
    "optimizer states": states.CLAIMS,
    "formats": formats.CLAIMS,
    "blocks, scales, transforms": microscaling.CLAIMS,
    "QuEST": quest.CLAIMS,
    "weights and activations": weights_activations.CLAIMS,
    "gradients": gradients.CLAIMS,
    "trainings": training.CLAIMS,
}
CLAIMS: dict[str, Claim] = {claim.name: claim for claims in THEMES.values() for claim in claims}
"""By name, in the order in which they are verified: cheap ones first."""

__all__ = [
    "CLAIMS",
    "FAILS",
    "HOLDS",
    "THEMES",
    "UNKNOWN",
    "Bench",
    "Claim",
    "Measured",
    "OutOfTime",
]
