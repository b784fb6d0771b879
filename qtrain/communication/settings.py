"""CommunicationSettings: what travels in low bits, checked before anything is connected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qtrain.quant import QuantSpec

# What a residual of error feedback may be kept in
FEEDBACKS = ("float32", "bfloat16")


def as_row_spec(value: Any, name: str) -> QuantSpec | None:
    """A spec whose blocks lie within rows of dim 0, from None or what ``QuantSpec.of`` takes.

    Raises ValueError, naming ``name``, for blocks that cross rows (a process holds some rows and knows no other's), for a
    range with a state, and for whatever is no spec.
    """
    if value is None or value == "none":
        return None
    try:
        spec = QuantSpec.of(value)
    except (ValueError, TypeError) as error:
        raise ValueError(f"trainer.{name}: {error}") from None
    if spec.blocks.rows != 1 or spec.tensor_scale:
        shared = "one scale for the whole tensor" if spec.tensor_scale else f"granularity {spec.granularity}"
        raise ValueError(
            f"trainer.{name}={value!r}: {shared} crosses the rows of dim 0, which the processes share out; use row or "
            "group, as in int8_row or int8_group128"
        )
    if spec.stateful:
        raise ValueError(
            f"trainer.{name}={value!r}: clip={spec.clip!r} has a state, which a layer holds; use absmax, mse or gaussian"
        )
    return spec


@dataclass(frozen=True, kw_only=True)
class CommunicationSettings:
    """gather_weights: the spec in which FSDP2 gathers the weights of linear layers, or None: float32. reduce_gradients:
    that of the gradients of matrices, or None. error_feedback: what the residuals of the reduction are kept in,
    ``float32`` or ``bfloat16``; None: errors are forgotten.

    Specs may be written short. Raises ValueError, naming the value, what is allowed and the remedy.
    """

    gather_weights: Any = None
    reduce_gradients: Any = None
    error_feedback: str | None = "float32"

    def __post_init__(self) -> None:
        for name in ("gather_weights", "reduce_gradients"):
            object.__setattr__(self, name, as_row_spec(getattr(self, name), name))
        if self.error_feedback not in (None, *FEEDBACKS):
            raise ValueError(
                f"trainer.error_feedback={self.error_feedback!r}: allowed are {', '.join(FEEDBACKS)} and null"
            )

    @staticmethod
    def of(trainer: Mapping[str, Any]) -> CommunicationSettings:
        """The settings among the keys of a configuration's ``trainer``."""
        known = [f.name for f in fields(CommunicationSettings)]
        return CommunicationSettings(**{name: trainer[name] for name in known if name in trainer})

    @property
    def active(self) -> bool:
        """Whether anything travels in low bits."""
        return self.gather_weights is not None or self.reduce_gradients is not None
